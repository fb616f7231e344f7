"""Matrix products for the Hexagon NPU of Qualcomm's chips, with float16 or int8 weights.

Both are Gemm with weights in the order of the file, (n, k). So no matrix is transposed, here or
when a graph is compiled, and rows are written slice by slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.errors import UnsupportedError
from edge.files.gguf import GGUF, Tensor
from edge.graph.ops import Matmul
from edge.onnx.export.blocks import floats, slices
from edge.onnx.export.writer import DataFile, GraphWriter, StoredTensor, onnx

__all__ = ["Float16Linears", "Int8Linears", "Range", "Ranges"]

_MOST_FLOAT16 = float(np.finfo(np.float16).max)
_MOST_INT8 = 127
#: Ranges are this many times as wide as measured: other texts exceed the measured ranges, and 16
#: bits have room for that. Largest KL divergence of a token of another text, SmolLM2: 0.27 with 1,
#: 0.09 with 1.5, 0.27 with 4.
_MARGIN = 1.5


class Range(NamedTuple):
    """The minimum and the maximum of a value."""

    low: float
    high: float


class Ranges(NamedTuple):
    """The ranges of a product's input x and output y."""

    x: Range
    y: Range


class Float16Linears:
    """Products of float16 in a graph whose other values are float32.

    The NPU computes the whole graph in float16, so the casts cost nothing there. As float32 the
    weights would take twice the space on the disk. A weight is written at its first use.
    """

    def __init__(self, model: GGUF, data: DataFile) -> None:
        self._model, self._data = model, data
        self._stored: dict[tuple[str, ...], StoredTensor] = {}

    def apply(self, g: GraphWriter, x: str, op: Matmul) -> str:
        """x (1, n, k) @ W.T for each W, outputs side by side: (1, n, sum of rows).

        Raises UnsupportedError for a weight beyond float16, ModelFileError for NaN or infinity in
        a weight, OSError.
        """
        weights = op.weights
        if weights not in self._stored:
            n, k, pieces = _rows(self._model, weights)
            rows = (_float16(tensor, w) for tensor, w in pieces)
            self._stored[weights] = self._data.add(g.types.FLOAT16, (n, k), rows)
        stored = self._stored[weights]
        x = g.node("Cast", _matrix(g, x, stored), to=g.types.FLOAT16)
        y = g.node("Gemm", x, g.weight("+".join(weights), stored), transB=1)
        return _tokens(g, g.node("Cast", y, to=g.types.FLOAT), stored)


class Int8Linears:
    """Products of uint16 activations and int8 weights, with a scale for each row of weights.

    Only the products are quantised; values between them stay float16 on the NPU. ranges: of each
    matmul of the graph, by the name of its output. A weight is written at its first use.
    """

    def __init__(self, model: GGUF, data: DataFile, ranges: Mapping[str, Ranges]) -> None:
        self._model, self._data, self._ranges = model, data, ranges
        self._stored: dict[tuple[str, ...], tuple[StoredTensor, StoredTensor]] = {}

    def apply(self, g: GraphWriter, x: str, op: Matmul) -> str:
        """x (1, n, k) @ W.T for each W, outputs side by side: (1, n, sum of rows).

        Raises ModelFileError for NaN or infinity in a weight, OSError.
        """
        weights = op.weights
        if weights not in self._stored:
            self._stored[weights] = self._write(weights)
        codes, scales = self._stored[weights]
        name, ranges = "+".join(weights), self._ranges[op.output]
        x = _through_uint16(g, _matrix(g, x, codes), ranges.x)
        w = g.node(
            "DequantizeLinear",
            g.weight(name, codes),
            g.weight(f"{name}.scales", scales),
            axis=0,
        )
        y = _through_uint16(g, g.node("Gemm", x, w, transB=1), ranges.y)
        return _tokens(g, y, codes)

    def _write(self, weights: tuple[str, ...]) -> tuple[StoredTensor, StoredTensor]:
        """Write the codes (n, k) and the scales (n,) of weights."""
        types = onnx().TensorProto
        n, k, pieces = _rows(self._model, weights)
        scales: list[NDArray[np.float32]] = []

        def quantised() -> Iterator[NDArray[np.int8]]:
            for _, w in pieces:
                scale = np.abs(w).max(1) / np.float32(_MOST_INT8)
                scale[scale == 0] = 1
                scales.append(scale)
                w /= scale[:, None]
                yield np.rint(w, out=w).astype(np.int8)

        codes = self._data.add(types.INT8, (n, k), quantised())
        return codes, self._data.add(types.FLOAT, (n,), scales)


def _rows(
    model: GGUF, weights: tuple[str, ...]
) -> tuple[int, int, Iterator[tuple[Tensor, NDArray[np.float32]]]]:
    """The shape (n, k) of some weights, stacked by rows, and their rows in slices."""
    tensors = [model.tensors[name] for name in weights]

    def pieces() -> Iterator[tuple[Tensor, NDArray[np.float32]]]:
        for tensor in tensors:
            for first, n in slices(tensor):
                yield tensor, floats(tensor, first, n)
                model.forget()

    return sum(t.shape[0] for t in tensors), tensors[0].shape[1], pieces()


def _float16(tensor: Tensor, w: NDArray[np.float32]) -> NDArray[np.float16]:
    most = float(np.abs(w).max())
    if most > _MOST_FLOAT16:
        raise UnsupportedError(
            f"{tensor.path}: tensor {tensor.name} has a weight of {most:.4g}, float16 ends at "
            f"{_MOST_FLOAT16:.0f}: export int8 weights",
            what="float16 weights",
        )
    return w.astype(np.float16)


def _through_uint16(g: GraphWriter, x: str, measured: Range) -> str:
    """x rounded to 65536 steps over its measured range and a margin; 0 is one of the steps."""
    low, high = (_MARGIN * v for v in (min(measured.low, 0.0), max(measured.high, 0.0)))
    step = (high - low) / 65535 or 1.0
    scale = g.constant(np.array(step, np.float32))
    zero = g.constant(np.array(round(-low / step), np.uint16))
    return g.node("DequantizeLinear", g.node("QuantizeLinear", x, scale, zero), scale, zero)


def _matrix(g: GraphWriter, x: str, weight: StoredTensor) -> str:
    """(1, n, k) -> (n, k)."""
    return g.node("Reshape", x, _shape(g, -1, weight.shape[1]))


def _tokens(g: GraphWriter, y: str, weight: StoredTensor) -> str:
    """(n, rows) -> (1, n, rows)."""
    return g.node("Reshape", y, _shape(g, 1, -1, weight.shape[0]))


def _shape(g: GraphWriter, *shape: Any) -> str:
    return g.constant(np.array(shape, np.int64))
