"""Optional packages, and how to install them.

edge is installed from a clone or from a wheel file, and no package index has it, so pip cannot find
its extras by name. Messages name the packages instead, which every installation can get.
"""

from __future__ import annotations

__all__ = ["EXTRAS", "install"]

#: Extra -> its packages, as in pyproject.toml; only the extras that messages name.
EXTRAS = {
    "bench": ("matplotlib>=3.7",),
    "onnx": ("onnx>=1.18", "onnxruntime>=1.22"),
    "openvino": ("onnxruntime-openvino>=1.24.1",),
    "qnn": ("onnxruntime>=1.24.2", "onnxruntime-qnn>=2.7"),
}


def install(extra: str) -> str:
    """The command that installs the packages of an extra."""
    return " ".join(["pip install", *(f'"{package}"' for package in EXTRAS[extra])])
