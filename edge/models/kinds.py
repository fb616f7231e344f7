"""Kinds of GGUF files that are not language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.errors import UnsupportedError, brief

#: `general.type` -> what the message says. Older converters did not write this key.
_TYPES = {
    "adapter": "is a LoRA adapter: name its model, and this file with --lora",
    "imatrix": "is an importance matrix, which quantisers read: name the model itself",
    "mmproj": "is a projector of pictures or sound (mmproj): name the model that it belongs to",
}
#: `general.architecture` -> what the message says, for files without a type of their own.
_ARCHITECTURES = {
    "clip": _TYPES["mmproj"],
    "controlvector": "is a control vector, which steers a model: name the model itself",
}
#: Keys that only files of a type have -> the type, for those that do not name it.
_KEYS = {"adapter.type": "adapter", "imatrix.chunk_count": "imatrix"}


def require_model(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: str
) -> None:
    """Raise UnsupportedError, which says what the file is, for one that is not a model."""
    shown = next((kind for key, kind in _KEYS.items() if key in metadata), "model")
    kind = metadata.get("general.type", shown)
    architecture = metadata.get("general.architecture")
    if kind != "model":
        is_known = isinstance(kind, str) and kind in _TYPES
        what = _TYPES[kind] if is_known else f"is no model: its general.type is {brief(kind)}"
    elif isinstance(architecture, str) and architecture in _ARCHITECTURES:
        what = _ARCHITECTURES[architecture]
    elif architecture is None:
        what = "is no language model: it names no architecture (general.architecture)"
    elif not shapes:
        what = "is a vocabulary without weights: name the model itself"
    else:
        return
    raise UnsupportedError(f"{path} {what}", what=what)
