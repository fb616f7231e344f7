"""Products of uint8 and int8, which onnxruntime adds in 16 bits on x86 CPUs without VNNI.

The sum of two such products is up to 2 * 255 * 127, which 16 bits cannot hold. onnxruntime clips it
without an error, and logits are wrong by half of their spread. `edge-run export` writes no such
products: MatMulNBits has codes of 4 bits, or multiplies them without their signs, and int8 weights
have uint16 activations. Graphs of other exporters do have them (`model_int8.onnx` and
`model_quantized.onnx` of many folders). For these, onnxruntime can convert the weights to uint8,
which is exact but needs memory for a copy.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from edge.errors import UnsupportedError
from edge.onnx.files.proto import OnnxFile, OnnxNode
from edge.onnx.providers.providers import onnxruntime

__all__ = ["exact_bytes", "inexact", "saturates", "settings"]

_EXACT = "session.x64quantprecision"

_PRODUCTS = {
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearMatMul",
}

_K = 8
#: A model of one node: y = MatMulInteger(a, b), a: uint8 (1, 8), b: int8 (8, 1).
_PROBE = bytes.fromhex(
    "0808 3a5c"  # ir_version 8, the graph:
    "0a18 0a0161 0a0162 120179 220d" + b"MatMulInteger".hex() + "120167"
    "5a13 0a0161 120e 0a0c 0802 1208 0a020801 0a020808"
    "5a13 0a0162 120e 0a0c 0803 1208 0a020808 0a020801"
    "6213 0a0179 120e 0a0c 0806 1208 0a020801 0a020801"
    "4204 0a00 100a"  # opset 10
)


def settings(graph: OnnxFile) -> dict[str, str]:
    """The settings of a session that make this graph's products exact on this CPU.

    Raises UnsupportedError for products in an inner graph: onnxruntime does not convert those.
    """
    if not exact_bytes(graph):
        return {}
    if any(_is_product(graph, node) for node in graph.inner_nodes):
        raise inexact(graph.path, "graphs inside the graph multiply")
    return {_EXACT: "1"}


def exact_bytes(graph: OnnxFile) -> int:
    """Bytes of the copies of weights that make products exact on this CPU."""
    if not any(_is_product(graph, node) for node in (*graph.nodes, *graph.inner_nodes)):
        return 0
    n = sum(t.n_bytes for t in graph.tensors if t.dtype == "int8" and len(t.dims) > 1)
    return n if n and saturates() else 0


def inexact(path: Path, why: str) -> UnsupportedError:
    """The error for a graph whose products onnxruntime cannot make exact on this CPU."""
    return UnsupportedError(
        f"{path}: on this CPU, which has no VNNI, onnxruntime cuts off products of uint8 and int8, "
        f"and cannot do without here, because {why}: take the model with weights of 4 bits, uint8 "
        "or float16, or a CPU with VNNI",
        what="products of uint8 and int8",
    )


def _is_product(graph: OnnxFile, node: OnnxNode) -> bool:
    """Whether a node multiplies uint8, or quantises an operand of a product to uint8."""
    if node.op != "QuantizeLinear":
        return node.op in _PRODUCTS
    zero = graph.initializers.get(node.inputs[2]) if len(node.inputs) > 2 else None
    return zero is None or zero.dtype == "uint8"


@cache
def saturates() -> bool:
    """Whether such products overflow on this CPU: onnxruntime computes one as a test."""
    ort = onnxruntime()
    session = ort.InferenceSession(_PROBE, providers=["CPUExecutionProvider"])
    a, b = np.full((1, _K), 255, np.uint8), np.full((_K, 1), 127, np.int8)
    return int(session.run(None, {"a": a, "b": b})[0].item()) != _K * 255 * 127
