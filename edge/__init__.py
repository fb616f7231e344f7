"""Language models in GGUF files, run on small devices.

    import edge

    with edge.load("model.gguf") as model:
        for piece in model.chat().stream("Why is the sky blue?"):
            print(piece.text, end="", flush=True)

Names are imported when they are first used, so that `import edge` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edge.errors import (
    CancelledError,
    ContextError,
    EdgeError,
    EdgeWarning,
    InputError,
    MemoryBudgetError,
    ModelFileError,
    NativeError,
    SessionFileError,
    TemplateError,
    UnsupportedError,
)
from edge.version import __version__

if TYPE_CHECKING:
    from edge.conversation import Chat
    from edge.model import Model, load
    from edge.restore import resume
    from edge.results import Completion, Piece, TokenLogprob, Usage
    from edge.sampler import SamplingOptions
    from edge.session import Session
    from edge.stream import Stream

__all__ = [
    "CancelledError",
    "Chat",
    "Completion",
    "ContextError",
    "EdgeError",
    "EdgeWarning",
    "InputError",
    "MemoryBudgetError",
    "Model",
    "ModelFileError",
    "NativeError",
    "Piece",
    "SamplingOptions",
    "Session",
    "SessionFileError",
    "Stream",
    "TemplateError",
    "TokenLogprob",
    "UnsupportedError",
    "Usage",
    "__version__",
    "load",
    "resume",
]

_MODULE_OF = {
    "Chat": "edge.conversation",
    "Completion": "edge.results",
    "Model": "edge.model",
    "Piece": "edge.results",
    "SamplingOptions": "edge.sampler",
    "Session": "edge.session",
    "Stream": "edge.stream",
    "TokenLogprob": "edge.results",
    "Usage": "edge.results",
    "load": "edge.model",
    "resume": "edge.restore",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'edge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
