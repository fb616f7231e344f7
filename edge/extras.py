"""Packages that edge needs for some of what it can do, and how to get them.

edge is installed from a clone or from a wheel's file, and no package index has it, so the name of
an extra alone would not be found: messages name the packages, which any installation can take.
"""

from __future__ import annotations

__all__ = ["EXTRAS", "install"]

#: Extras that messages speak of -> their packages, as pyproject.toml has them.
EXTRAS = {
    "bench": ("matplotlib>=3.7",),
    "onnx": ("onnx>=1.18", "onnxruntime>=1.22"),
    "openvino": ("onnxruntime-openvino>=1.24.1",),
    "qnn": ("onnxruntime>=1.24.2", "onnxruntime-qnn>=2.7"),
}


def install(extra: str) -> str:
    """The command that gets the packages of an extra."""
    return " ".join(["pip install", *(f'"{package}"' for package in EXTRAS[extra])])
