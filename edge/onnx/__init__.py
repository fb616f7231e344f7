"""Models as ONNX graphs: made from GGUF files, run by onnxruntime's execution providers.

    files/      reading folders of graphs, with checks
    providers/  execution providers, and sessions on them
    run/        the engine that runs a folder of graphs
    export/     writing a model as ONNX files

Each folder imports only from the folders above it.
"""

from __future__ import annotations

import os

__all__ = ["is_onnx"]


def is_onnx(path: str) -> bool:
    """Whether this package opens a path: a folder, or a name that ends in .onnx."""
    return os.path.isdir(path) or path.endswith(".onnx")
