"""Models as ONNX graphs: made from GGUF files, run by onnxruntime's execution providers.

    files/      folders of graphs, checked while they are read
    providers/  execution providers, and the sessions that they open
    run/        folders of graphs, run: the engine
    export/     from a graph to ONNX files

Each imports from those above it.
"""

from __future__ import annotations

import os

__all__ = ["is_onnx"]


def is_onnx(path: str) -> bool:
    """Whether a path, by its kind and name alone, is for this package: a folder or .onnx file."""
    return os.path.isdir(path) or path.endswith(".onnx")
