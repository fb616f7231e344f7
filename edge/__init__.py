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
    from edge.model import Model, load
    from edge.quantizer.job import Quantized, quantize
    from edge.session.chat import Chat
    from edge.session.restore import resume
    from edge.session.results import Completion, Piece, TokenLogprob, Usage
    from edge.session.sampler import SamplingOptions
    from edge.session.session import Session
    from edge.session.stream import Stream

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
    "Quantized",
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
    "quantize",
    "resume",
]

_MODULE_OF = {
    "Chat": "edge.session.chat",
    "Completion": "edge.session.results",
    "Model": "edge.model",
    "Piece": "edge.session.results",
    "Quantized": "edge.quantizer.job",
    "SamplingOptions": "edge.session.sampler",
    "Session": "edge.session.session",
    "Stream": "edge.session.stream",
    "TokenLogprob": "edge.session.results",
    "Usage": "edge.session.results",
    "load": "edge.model",
    "quantize": "edge.quantizer.job",
    "resume": "edge.session.restore",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'edge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
