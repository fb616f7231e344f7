"""Bytes that identify a model, wherever and in whatever file it is."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from edge import native
from edge.graph.graph import Graph
from edge.graph.ops import Rope, shown_name
from edge.native import ffi, lib

if TYPE_CHECKING:
    from edge.files.gguf import Metadata
    from edge.models.adapters import Adapter
    from edge.weights.joined import JoinedWeights

__all__ = ["fingerprint"]

_VECTOR_BYTES = 1024  # of the start of each vector


def fingerprint(
    metadata: Metadata, graph: Graph, weights: JoinedWeights, adapters: Sequence[Adapter] = ()
) -> bytes:
    """32 bytes, a hash of: the numbers of the architecture; the rotary embeddings in use; the
    windows, where layers differ in them; the name (without `.weight`) and shape of each weight, and
    values of it: two rows of a matrix, the start of a vector; the scales of adapters.

    It is the same for a file and one packed from it, for both forms of its weights, and on every
    machine. Models that differ only in other rows have the same fingerprint. The weights must be in
    memory.
    """
    out = blake2b(digest_size=32)
    _add(out, repr(_numbers(metadata)).encode())
    _add(out, repr(sorted(map(_text, graph.ropes))).encode())
    windows = [op.window for op in graph.attentions]
    if len(set(windows)) > 1:  # else the numbers of the architecture have the one window
        _add(out, repr(windows).encode())
    for adapter in adapters:
        scales = {name: low.scale for name, low in sorted(adapter.pairs.items())}
        _add(out, repr(scales).encode())
    for name in sorted(weights.names, key=shown_name):
        entry = weights.entry(name)
        _add(out, f"{shown_name(name)} {entry.n} {entry.k}".encode())
        if entry.layout == lib.EDGE_LAYOUT_VECTOR:
            _add(out, bytes(ffi.buffer(entry.data, min(entry.n_bytes, _VECTOR_BYTES))))
            continue
        row = ffi.new("float[]", entry.k)
        for i in sorted({entry.n // 2, entry.n - 1}):
            native.check(lib.edge_weight_unpack(ffi.addressof(entry), i, 1, row))
            _add(out, ffi.buffer(row))
    return out.digest()


def _text(rope: Rope) -> str:
    text = repr(replace(rope, factors=rope.factors and shown_name(rope.factors)))
    return text if rope.ramp is None else f"{text} {rope.ramp}"


def _numbers(metadata: Metadata) -> Mapping[str, Any]:
    """The architecture's keys that are not lists -> their values, in the order of their names."""
    prefix = f"{metadata['general.architecture']}."
    keys = sorted(key for key in metadata if key.startswith(prefix) and not metadata.is_array(key))
    return {key: metadata[key] for key in keys}


def _add(out: Any, data: Any) -> None:
    """Add a part with its length, so that no two lists of parts give the same bytes."""
    out.update(struct.pack("<q", len(data)))
    out.update(data)
