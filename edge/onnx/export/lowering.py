"""Lowers a graph's ops to ONNX nodes: the part that both dialects share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import (
    Activate,
    Activation,
    Adapt,
    Add,
    Attention,
    Bias,
    Embed,
    Experts,
    Gain,
    Gated,
    HeadNorm,
    LayerNorm,
    Matmul,
    Multiply,
    Op,
    Rescale,
    RmsNorm,
    Rope,
    Rotate,
    Route,
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
            case LayerNorm():
                return self.lower_layer_norm(op, *inputs)
            case HeadNorm():
                return self.lower_head_norm(op, *inputs)
            case Bias():
                return self.lower_bias(op, *inputs)
            case Gain():
                return self.lower_gain(op, *inputs)
            case Temperature():
                return self.lower_temperature(op, *inputs)
            case Activate():
                return self.activate(op.activation, *inputs)
            case Xielu():
                return self.lower_xielu(op, *inputs)
            case Sparsify():
                return self.lower_sparsify(op, *inputs)
            case Rescale():
                return self.lower_rescale(op, *inputs)
            case Scale():
                return self.g.node("Mul", *inputs, self.number(op.factor))
            case Softcap():
                return self.softcap(op.cap, *inputs)
            case Multiply():
                return self.g.node("Mul", *inputs)
            case Slice():
                n = self.graph.dims[op.output]
                return self.part(inputs[0], op.first, op.first + n)
            case Adapt() | Route() | Experts():
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
        if any(len(self.model.tensors[name].shape) > 2 for name in op.weights):
            raise self.missing("a stack of matrices")
        return self.linears.apply(self.g, x, op)

    def lower_layer_norm(self, op: LayerNorm, x: str) -> str:
        """(x - mean) / std * w (+ b)."""
        weights = map(self.vector, op.weights)
        return self.g.node("LayerNormalization", x, *weights, axis=-1, epsilon=op.eps)

    def lower_head_norm(self, op: HeadNorm, x: str) -> str:
        """The norm of each head in a range of elements; the others stay."""
        g, end = self.g, op.first + op.n_heads * op.head_dim
        shape = g.constant(np.array([0, 0, op.n_heads, op.head_dim]))
        heads = g.node("Reshape", self.part(x, op.first, end), shape)
        last = g.constant(np.array([-1]))
        if op.is_centred:
            heads = g.node("Sub", heads, g.node("ReduceMean", heads, last, keepdims=1))
        mean = g.node("ReduceMean", g.node("Mul", heads, heads), last, keepdims=1)
        heads = g.node("Div", heads, g.node("Sqrt", g.node("Add", mean, self.number(op.eps))))
        for weight in op.weights:
            tensor = self.model.tensors[weight]
            rows = floats(tensor, 0, 1 if len(tensor.shape) == 1 else op.n_heads)
            heads = g.node("Mul", heads, g.constant(rows))
        normed = g.node("Reshape", heads, g.constant(np.array([0, 0, end - op.first])))
        return self.among(op, x, normed, op.first, end)

    def among(self, op: Op, x: str, changed: str, first: int, end: int) -> str:
        """The op's input x, but its elements first .. end - 1 are `changed`."""
        dim = self.graph.dims[op.output]
        before = [self.part(x, 0, first)] if first else []
        after = [self.part(x, end, dim)] if end < dim else []
        if not before and not after:
            return changed
        return self.g.node("Concat", *before, changed, *after, axis=-1)

    def lower_gain(self, op: Gain, x: str) -> str:
        """A range of elements, times a vector."""
        end = op.first + op.n
        changed = self.g.node("Mul", self.part(x, op.first, end), self.vector(op.weights[0]))
        return self.among(op, x, changed, op.first, end)

    def lower_sparsify(self, op: Sparsify, x: str) -> str:
        """max(0, x - mean - factor * std) of the first elements."""
        g, last = self.g, self.g.constant(np.array([-1]))
        first = self.part(x, 0, op.n)
        off = g.node("Sub", first, g.node("ReduceMean", first, last, keepdims=1))
        std = g.node("Sqrt", g.node("ReduceMean", g.node("Mul", off, off), last, keepdims=1))
        kept = g.node("Relu", g.node("Sub", off, g.node("Mul", std, self.number(op.factor))))
        return self.among(op, x, kept, 0, op.n)

    def lower_rescale(self, op: Rescale, x: str, y: str) -> str:
        """x, as large as y."""
        g, last = self.g, self.g.constant(np.array([-1]))
        of_x, of_y = (
            g.node("ReduceMean", g.node("Mul", value, value), last, keepdims=1) for value in (x, y)
        )
        share = g.node("Div", of_y, g.node("Max", of_x, self.number(op.floor)))
        return g.node("Mul", x, g.node("Sqrt", share))

    def lower_bias(self, op: Bias, x: str) -> str:
        """x plus the weights, side by side from an element on."""
        added = np.zeros(self.graph.dims[op.output], np.float32)
        weights = np.concatenate([read_vector(self.model, name) for name in op.weights])
        added[op.first : op.first + len(weights)] = weights
        return self.g.node("Add", x, self.g.constant(added))

    def lower_temperature(self, op: Temperature, x: str) -> str:
        """The first elements, scaled by the position."""
        raise self.missing(op.kind)

    def lower_gated(self, op: Gated, x: str) -> str:
        """activation(gate) * up, x = [gate | up]."""
        g = self.g
        gate, up = g.nodes("Split", x, n_outputs=2, axis=-1, num_outputs=2)
        if op.activation != "swiglu_oai":
            return g.node("Mul", self.activate(op.activation, gate), up)
        gate = g.node("Min", gate, self.number(7))
        up = g.node("Max", g.node("Min", up, self.number(7)), self.number(-7))
        steep = g.node("Sigmoid", g.node("Mul", gate, self.number(1.702)))
        return g.node("Mul", g.node("Mul", gate, steep), g.node("Add", up, self.number(1)))

    def activate(self, activation: Activation, x: str) -> str:
        """activation(x)."""
        g = self.g
        match activation:
            case "silu":
                return g.node("Mul", x, g.node("Sigmoid", x))
            case "gelu_tanh":
                return g.node("Gelu", x, approximate="tanh")
            case "gelu_erf":
                return g.node("Gelu", x, approximate="none")
            case "relu2":
                positive = g.node("Relu", x)
                return g.node("Mul", positive, positive)
            case "sigmoid":
                return g.node("Sigmoid", x)
            case "tanh":
                return g.node("Tanh", x)
            case _:
                assert_never(activation)

    def lower_xielu(self, op: Xielu, x: str) -> str:
        """alpha_p x^2 + beta x above 0, alpha_n (expm1(min(x, eps)) - x) + beta x else."""
        g = self.g
        positive = g.node("Relu", x)
        above = g.node("Mul", g.node("Mul", positive, positive), self.number(op.alpha_p))
        small = g.node("Sub", g.node("Exp", g.node("Min", x, self.number(op.eps))), self.number(1))
        below = g.node("Mul", g.node("Sub", small, x), self.number(op.alpha_n))
        curved = g.node("Where", g.node("Greater", x, self.number(0)), above, below)
        return g.node("Add", curved, g.node("Mul", x, self.number(op.beta)))

    def softcap(self, cap: float, x: str) -> str:
        """cap tanh(x / cap)."""
        small = self.g.node("Tanh", self.g.node("Div", x, self.number(cap)))
        return self.g.node("Mul", small, self.number(cap))

    def lower_add(self, op: Add, x: str, y: str) -> str:
        """x + y."""
        return self.g.node("Add", x, y)

    def number(self, value: float) -> str:
        """A constant."""
        return self.g.constant(np.array(value, np.float32))

    def part(self, x: str, first: int, end: int) -> str:
        """Elements first .. end - 1 of the last axis."""
        bounds = (self.g.constant(np.array([v])) for v in (first, end, -1))
        return self.g.node("Slice", x, *bounds)

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
    scale = np.full(len(pair), rope.scale)
    if rope.ramp is not None:
        low, high = rope.ramp
        kept = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
        scale = kept + (1 - kept) * rope.scale
    frequency = scale * rope.base ** (-2 * pair / rope.n_rot)
    if rope.factors is not None:
        factors = read_vector(model, rope.factors)
        check_factors(rope.factors, factors.tolist(), model.path)
        frequency /= factors
    for first in range(0, n, _PIECE):
        angle = np.arange(first, min(first + _PIECE, n))[:, None] * frequency
        cos, sin = np.cos(angle) * rope.magnitude, np.sin(angle) * rope.magnitude
        yield cos.astype(np.float32), sin.astype(np.float32)
