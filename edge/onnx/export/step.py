"""The graphs of dialect npu that run on the NPU: n tokens behind a cache, see `npu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edge.errors import UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import Attention, Embed, Heads, RmsNorm, Rope, Rotate
from edge.onnx.export.lowering import Linears, Lowering
from edge.onnx.export.writer import GraphWriter

__all__ = ["FUSED_NORM", "Shape", "StepLowering", "shape_of"]

#: The first opset with RMSNormalization as one operator.
FUSED_NORM = 23


@dataclass(frozen=True)
class Shape:
    """The properties that all layers of a model share, and that its graphs depend on.

    half_cache: keys and values are float16. A token then reads half the bytes, and the provider
    computes in float16 anyway.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int  # positions that a token sees, itself included; 0: all
    scale: float  # of scores, 0: 1 / sqrt(head_dim)
    softcap: float  # of scores, 0: none
    rope: Rope
    context: int
    half_cache: bool

    @property
    def n_angles(self) -> int:
        """Pairs of a head that are rotated."""
        return self.rope.n_rot // 2


class _Layer(NamedTuple):
    """The properties of a layer. rope: None: queries and keys are not rotated together."""

    heads: Heads
    window: int
    scale: float
    softcap: float
    rope: Rope | None


def shape_of(graph: Graph, context: int, *, half_cache: bool = False) -> Shape:
    """The shape of a model's layers.

    Raises UnsupportedError if they differ in heads, window, scale or rotation, or if queries and
    keys are not rotated together.
    """
    rotations = {op.output: op for op in graph.ops if isinstance(op, Rotate)}
    kinds = set[_Layer]()
    for op in graph.attentions:
        rotate = rotations.get(op.inputs[0])
        alike = rotate is not None and rotate.n_heads == op.heads.n_heads + op.heads.n_kv_heads
        rope = rotate.rope if rotate and alike else None
        kinds.add(_Layer(op.heads, op.window, op.scale, op.softcap, rope))
    layers = [op.layer for op in graph.attentions]
    if len(kinds) != 1 or len(rotations) != len(layers) or layers != list(range(len(layers))):
        raise UnsupportedError(
            f"{graph.path}: its layers differ in heads, window or rotation", what="dialect npu"
        )
    heads, window, scale, softcap, rope = kinds.pop()
    if rope is None:
        raise UnsupportedError(
            f"{graph.path}: queries and keys are not rotated alike", what="dialect npu"
        )
    return Shape(
        n_layers=len(layers),
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        window=window,
        scale=scale,
        softcap=softcap,
        rope=rope,
        context=context,
        half_cache=half_cache,
    )


class StepLowering(Lowering):
    """Lowers the graph of n tokens behind a cache.

    The opset of g says whether the norm is one operator. Heads are values [1, heads, n, D]. The
    heads that share a key head are rows of one matrix, so that no key or value is repeated.
    """

    def __init__(
        self, graph: Graph, model: GGUF, g: GraphWriter, linears: Linears, *, shape: Shape, n: int
    ) -> None:
        super().__init__(graph, model, g, linears)
        self.shape, self.n = shape, n
        self.kv = g.types.FLOAT16 if shape.half_cache else g.types.FLOAT
        self.group = shape.n_heads // shape.n_kv_heads
        f32, angles = g.types.FLOAT, (1, 1, n, shape.n_angles)
        dim = graph.dims[graph.ops[0].output]
        self.hidden = g.input("hidden", f32, (1, n, dim))
        cos = g.input("cos", f32, (1, n, shape.n_angles))
        sin = g.input("sin", f32, (1, n, shape.n_angles))
        self.cos, self.sin = self.reshape(cos, *angles), self.reshape(sin, *angles)
        mask = g.input("mask", f32, (1, 1, n, shape.context + n))
        self.mask = g.node("Concat", *[mask] * self.group, axis=2) if self.group > 1 else mask

    def lower_embed(self, op: Embed) -> str:
        """The input `hidden`, which has the rows already."""
        return self.hidden

    def lower_rms_norm(self, op: RmsNorm, x: str) -> str:
        """x / rms(x) * w."""
        g, weight, eps = self.g, self.vector(op.weights[0]), op.eps
        if g.opset >= FUSED_NORM:
            return g.node("RMSNormalization", x, weight, axis=-1, epsilon=eps)
        last = g.constant(np.array([-1], np.int64))
        mean = g.node("ReduceMean", g.node("Mul", x, x), last, keepdims=1)
        rms = g.node("Sqrt", g.node("Add", mean, g.constant(np.array(eps, np.float32))))
        return g.node("Mul", g.node("Div", x, rms), weight)

    def lower_rope(self, op: Rotate, x: str) -> str:
        """The heads [1, heads of q, k and v, n, D]; `lower_attention` rotates those of q and k."""
        n_all = self.graph.dims[op.output] // self.shape.head_dim
        return self.heads_first(x, n_all)

    def lower_attention(self, op: Attention, heads: str) -> str:
        """softmax(scale q k^T + mask) v, over the cache and the new tokens."""
        g, s, i = self.g, self.shape, op.layer
        if op.weights:
            raise self.missing("sinks of an attention")
        n_turned = s.n_heads + s.n_kv_heads
        turned = self.turn(self.slice(heads, 0, n_turned, 1))
        q = self.slice(turned, 0, s.n_heads, 1)
        q = g.node("Mul", q, g.constant(np.array(s.scale or s.head_dim**-0.5, np.float32)))
        q = self.reshape(q, 1, s.n_kv_heads, self.group * self.n, s.head_dim)
        k = self.keys_transposed(self.slice(turned, s.n_heads, n_turned, 1))
        v = self.slice(heads, n_turned, n_turned + s.n_kv_heads, 1)
        past_k, past_v = self.cache(i, k, v)
        scores = g.node("Concat", self.of_cache(q, past_k), g.node("MatMul", q, k), axis=-1)
        if s.softcap:
            scores = self.softcap(s.softcap, scores)
        p = g.node("Softmax", g.node("Add", scores, self.mask), axis=-1)
        past = self.of_cache(self.slice(p, 0, s.context, 3), past_v)
        new = g.node("MatMul", self.slice(p, s.context, s.context + self.n, 3), v)
        return self.heads_last(g.node("Add", past, new))

    def cache(self, i: int, k: str, v: str) -> tuple[str, str]:
        """Declare the inputs and outputs of layer i for the cache; returns the inputs' names."""
        g, s, heads, d = self.g, self.shape, self.shape.n_kv_heads, self.shape.head_dim
        if s.half_cache:
            k, v = (g.node("Cast", value, to=self.kv) for value in (k, v))
        g.output(g.rename(k, f"new_key.{i}"), self.kv, (1, heads, d, self.n))
        g.output(g.rename(v, f"new_value.{i}"), self.kv, (1, heads, self.n, d))
        past_k = g.input(f"past_key.{i}", self.kv, (1, heads, d, s.context))
        past_v = g.input(f"past_value.{i}", self.kv, (1, heads, s.context, d))
        return past_k, past_v

    def of_cache(self, x: str, cached: str) -> str:
        """x @ cached, in the cache's type: x is the smaller matrix to convert."""
        if not self.shape.half_cache:
            return self.g.node("MatMul", x, cached)
        product = self.g.node("MatMul", self.g.node("Cast", x, to=self.kv), cached)
        return self.g.node("Cast", product, to=self.g.types.FLOAT)

    def turn(self, x: str) -> str:
        """Rotate heads [1, heads, n, D].

        Dimensions that rotate as adjacent pairs come out as two halves. Queries and keys have the
        same new order, so their products do not change.
        """
        g, n_rot, d, half = self.g, self.shape.rope.n_rot, self.shape.head_dim, self.shape.n_angles
        if self.shape.rope.interleaved:
            a, b = (self.slice(x, first, n_rot, 3, step=2) for first in (0, 1))
        else:
            a, b = self.slice(x, 0, half, 3), self.slice(x, half, n_rot, 3)
        parts = [
            g.node("Sub", g.node("Mul", a, self.cos), g.node("Mul", b, self.sin)),
            g.node("Add", g.node("Mul", a, self.sin), g.node("Mul", b, self.cos)),
        ]
        parts += [self.slice(x, n_rot, d, 3)] if n_rot < d else []
        return g.node("Concat", *parts, axis=3)

    def heads_first(self, x: str, n_heads: int) -> str:
        """[1, n, heads D] -> [1, heads, n, D]."""
        d = self.shape.head_dim
        if self.n == 1:
            return self.reshape(x, 1, n_heads, 1, d)
        x = self.reshape(x, 1, self.n, n_heads, d)
        return self.g.node("Transpose", x, perm=[0, 2, 1, 3])

    def heads_last(self, x: str) -> str:
        """[1, Hkv, group n, D] -> [1, n, heads D]."""
        s = self.shape
        if self.n > 1:
            x = self.reshape(x, 1, s.n_heads, self.n, s.head_dim)
            x = self.g.node("Transpose", x, perm=[0, 2, 1, 3])
        return self.reshape(x, 1, self.n, s.n_heads * s.head_dim)

    def keys_transposed(self, k: str) -> str:
        """[1, Hkv, n, D] -> [1, Hkv, D, n]."""
        if self.n == 1:
            return self.reshape(k, 1, self.shape.n_kv_heads, self.shape.head_dim, 1)
        return self.g.node("Transpose", k, perm=[0, 1, 3, 2])

    def reshape(self, x: str, *shape: int) -> str:
        """Give x another shape."""
        return self.g.node("Reshape", x, self.g.constant(np.array(shape, np.int64)))

    def slice(self, x: str, first: int, end: int, axis: int, *, step: int = 1) -> str:
        """x[first:end:step] of an axis."""
        bounds = (self.g.constant(np.array([v], np.int64)) for v in (first, end, axis, step))
        return self.g.node("Slice", x, *bounds)
