"""Small ONNX graphs: what a provider takes whole, and what it leaves to the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers import compiled
from edge.onnx.providers.providers import Target
from edge.onnx.providers.sessions import OpenedGraph

K, N = 64, 32


def read(paths: Mapping[str, Path]) -> dict[str, OnnxFile]:
    """The graphs in files."""
    return {name: OnnxFile.read(path) for name, path in paths.items()}


def open_sessions(
    paths: Mapping[str, Path], target: Target, key: bytes | None = None
) -> dict[str, OpenedGraph]:
    """Sessions of graphs in files."""
    return compiled.open_sessions(read(paths), target, key)


def quantized(path: Path, rows: int = 1, seed: int = 0) -> Path:
    """relu(x @ w), x and the product as uint16, w as int8 with a scale for each column: what HTP
    wants. x: (1, rows, K); y: (1, rows, N). The weights of a seed are the same for all rows.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "w": rng.integers(-127, 127, (K, N)).astype(np.int8),
        "w_scale": np.full(N, 0.001, np.float32),
        "w_zero": np.zeros(N, np.int8),
        "scale": np.float32(0.001),
        "zero": np.uint16(1 << 15),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], "q.x"),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], "dq.x"),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], "dq.w", axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["m"], "matmul"),
        helper.make_node("QuantizeLinear", ["m", "scale", "zero"], ["mq"], "q.m"),
        helper.make_node("DequantizeLinear", ["mq", "scale", "zero"], ["md"], "dq.m"),
        helper.make_node("Relu", ["md"], ["y"], "relu"),
    ]
    return _save(path, nodes, weights, rows)


def blocks(path: Path, seed: int = 0) -> Path:
    """relu(x @ w), w as 4-bit blocks of 32: MatMulNBits."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": rng.integers(0, 255, (N, K // 32, 16)).astype(np.uint8),
        "scales": np.full((N, K // 32), 0.01, np.float32),
    }
    form = {"domain": "com.microsoft", "K": K, "N": N, "bits": 4, "block_size": 32}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "w", "scales"], ["m"], "matmul", **form),
        helper.make_node("Relu", ["m"], ["y"], "relu"),
    ]
    return _save(path, nodes, weights, 1)


def context(path: Path) -> Path:
    """As a compiled graph looks, without a binary."""
    return _save(path, [helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")], {}, 1)


def cut(path: Path) -> Path:
    """x @ w, and an operator in the middle that only the CPU has."""
    weights = {"w": np.ones((K, N), np.float32), "g": np.ones(N, np.float32)}
    norm = ["m", "m", "g"]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "matmul"),
        helper.make_node(
            "SkipSimplifiedLayerNormalization", norm, ["n"], "norm", domain="com.microsoft"
        ),
        helper.make_node("Relu", ["n"], ["y"], "relu"),
    ]
    return _save(path, nodes, weights, 1)


def _save(path: Path, nodes: list[Any], weights: dict[str, Any], rows: int) -> Path:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, rows, n])
        for name, n in (("x", K), ("y", N))
    ]
    tensors = [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
