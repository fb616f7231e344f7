"""Lowers a graph's ops to ONNX nodes: the part that both dialects share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import UnsupportedError
from edge.files.gguf import GGUF
from edge.graph import (
    Activate,
    Add,
    Attention,
    Bias,
    Embed,
    Gain,
    Gated,
    Graph,
    HeadNorm,
    LayerNorm,
    Matmul,
    Multiply,
    Op,
    Rescale,
    RmsNorm,
    Rope,
    Rotate,
    Scale,
    Slice,
    Softcap,
    Sparsify,
    Temperature,
    Xielu,
    assert_never,
    check_factors,
)
from edge.onnx.export.blocks import floats
from edge.onnx.export.writer import GraphWriter

__all__ = ["Linears", "Lowering", "read_vector", "rotations"]

Floats = NDArray[np.float32]

#: Positions of a piece of `rotations`.
_PIECE = 4096


class Linears(Protocol):
    """Writes matrix products with weights of one form."""

    def apply(self, g: GraphWriter, x: str, op: Matmul) -> str:
        """[x W0^T | x W1^T | ...]: x (1, n, k) -> (1, n, rows of all)."""


class Lowering(ABC):
    """Walks a graph's ops. A dialect implements the abstract methods.

    Each of them takes the op and the names of its inputs, and returns the name of its output.
    Values are (1, tokens, dim) float32. values: a value of the graph -> its name in g.
    """

    def __init__(self, graph: Graph, model: GGUF, g: GraphWriter, linears: Linears) -> None:
        self.graph, self.model, self.g, self.linears = graph, model, g, linears
        self.values: dict[str, str] = {}

    def run(self, on_op: Callable[[Op], None]) -> str:
        """Lower all ops; returns the name of the graph's output. on_op: called after each op.

        Raises UnsupportedError for an op that this dialect cannot express.
        """
        for op in self.graph.ops:
            self.values[op.output] = self._lower(op, [self.operand(op, x) for x in op.inputs])
            on_op(op)
        return self.values[self.graph.output]

    def _lower(self, op: Op, inputs: list[str]) -> str:
        match op:
            case Embed():
                return self.lower_embed(op)
            case RmsNorm():
                return self.lower_rms_norm(op, *inputs)
            case Matmul():
                return self.lower_matmul(op, *inputs)
            case Rotate():
                return self.lower_rope(op, *inputs)
            case Attention():
                return self.lower_attention(op, *inputs)
            case Gated():
                return self.lower_gated(op, *inputs)
            case Add():
                return self.lower_add(op, *inputs)
            case (
                LayerNorm()
                | HeadNorm()
                | Bias()
                | Gain()
                | Temperature()
                | Activate()
                | Xielu()
                | Sparsify()
                | Rescale()
                | Scale()
                | Softcap()
                | Multiply()
                | Slice()
            ):
                raise self.missing(op.kind)
            case _:
                assert_never(op)

    def missing(self, what: str) -> UnsupportedError:
        """The error for an op, or a form of one, that this dialect lacks."""
        return UnsupportedError(
            f"{self.graph.path}: the model needs {what}, which has no ONNX form yet", what=what
        )

    def operand(self, op: Op, value: str) -> str:
        """The name in g of the op's input `value`."""
        return self.values[value]

    @abstractmethod
    def lower_embed(self, op: Embed) -> str:
        """The rows of the embedding."""

    @abstractmethod
    def lower_rms_norm(self, op: RmsNorm, x: str) -> str:
        """x / rms(x) * w."""

    @abstractmethod
    def lower_rope(self, op: Rotate, x: str) -> str:
        """Rotate the first heads of x, or leave that to `lower_attention`."""

    @abstractmethod
    def lower_attention(self, op: Attention, x: str) -> str:
        """softmax(scale q k^T + mask) v, x = [q | k | v]."""

    def lower_matmul(self, op: Matmul, x: str) -> str:
        """[W0 x | W1 x | ...]."""
        return self.linears.apply(self.g, x, op)

    def lower_gated(self, op: Gated, x: str) -> str:
        """activation(gate) * up, x = [gate | up]."""
        if op.activation != "silu":
            raise UnsupportedError(
                f"{self.graph.path}: the activation {op.activation} has no ONNX form yet",
                what=op.activation,
                supported=["silu"],
            )
        gate, up = self.g.nodes("Split", x, n_outputs=2, axis=-1, num_outputs=2)
        silu = self.g.node("Mul", gate, self.g.node("Sigmoid", gate))
        return self.g.node("Mul", silu, up)

    def lower_add(self, op: Add, x: str, y: str) -> str:
        """x + y."""
        return self.g.node("Add", x, y)

    def vector(self, name: str) -> str:
        """A constant with a vector of the model."""
        return self.g.constant(read_vector(self.model, name))


def read_vector(model: GGUF, name: str) -> Floats:
    """A vector of the model, (k,).

    Raises ModelFileError for NaN and infinity, UnsupportedError for a type that edge cannot run.
    """
    vector: Floats = floats(model.tensors[name])[0]
    return vector


def rotations(model: GGUF, rope: Rope, n: int) -> Iterator[tuple[Floats, Floats]]:
    """cos and sin of the positions 0..n-1, times the magnitude, in pieces (rows, n_rot / 2).

    They are computed in float64, then rounded. Raises ModelFileError for divisors of frequencies
    that are out of range.
    """
    pair = np.arange(rope.n_rot // 2, dtype=np.float64)
    frequency = rope.scale * rope.base ** (-2 * pair / rope.n_rot)
    if rope.factors is not None:
        factors = read_vector(model, rope.factors)
        check_factors(rope.factors, factors.tolist(), model.path)
        frequency /= factors
    for first in range(0, n, _PIECE):
        angle = np.arange(first, min(first + _PIECE, n))[:, None] * frequency
        cos, sin = np.cos(angle) * rope.magnitude, np.sin(angle) * rope.magnitude
        yield cos.astype(np.float32), sin.astype(np.float32)
