"""The numpy referee: runs a Graph as the papers write it, on plain float weights.

Slow to decode, exact to read: no cache, no packing, no fusion; every position from 0 in one pass.
Exact in float32 to about 1e-5 of a logit, in float64 to all digits that matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import refmath

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
    Rotate,
    Route,
    Scale,
    Slice,
    Softcap,
    Sparsify,
    Temperature,
    Xielu,
    assert_never,
)

Array = np.ndarray[Any, np.dtype[Any]]
Rounding = Callable[[Array], Array]


@dataclass(frozen=True)
class Run:
    """What every op may look at."""

    tokens: Array  # (t,)
    weights: Mapping[str, Array]
    quantised: Mapping[str, Rounding]  # tensor -> what becomes of its matmul's input
    cache: type[np.floating[Any]]  # what keys and values are rounded to
    dims: Mapping[str, int] = field(default_factory=dict)  # of the graph's values
    # layer -> its keys and values, (n_kv_heads, t, d) each
    kept: dict[int, tuple[Array, Array]] = field(default_factory=dict)


def run(
    graph: Graph,
    weights: Mapping[str, Array],
    tokens: Sequence[int],
    *,
    dtype: type[np.floating[Any]] = np.float32,
    quantised: Collection[str] | Mapping[str, Rounding] = (),
    cache: type[np.floating[Any]] | None = None,
) -> Array:
    """Logits (tokens, vocab) of all positions, the first at position 0.

    weights: tensor name -> float array. dtype: of every value on the way.
    quantised: the tensors whose matmul's input goes through int8 with a scale per 32, as in the
    kernels, or tensor -> what becomes of it. cache: keys and values are rounded to this type, None:
    dtype.
    """
    held = {
        name: np.asarray(weights[name], dtype).reshape(shape)
        for name, shape in graph.weights.items()
    }
    if not isinstance(quantised, Mapping):
        quantised = dict.fromkeys(quantised, q8)
    state = Run(np.asarray(tokens), held, quantised, cache or dtype, graph.dims)
    last = {name: i for i, op in enumerate(graph.ops) for name in op.inputs}
    values: dict[str, Array] = {}
    for i, op in enumerate(graph.ops):
        values[op.output] = evaluate(state, op, [values[name] for name in op.inputs])
        for name in op.inputs:
            if last[name] == i:
                values.pop(name, None)
    return values[graph.output]


def evaluate(r: Run, op: Op, inputs: Sequence[Array]) -> Array:
    """The value of an op."""
    match op:
        case Embed():
            return embed(r, op)
        case RmsNorm():
            return rms_norm(r, op, *inputs)
        case LayerNorm():
            return layer_norm(r, op, *inputs)
        case HeadNorm():
            return head_norm(r, op, *inputs)
        case Matmul():
            return matmul(r, op, *inputs)
        case Adapt():
            return adapt(r, op, *inputs)
        case Bias():
            return bias(r, op, *inputs)
        case Gain():
            return gain(r, op, *inputs)
        case Rotate():
            return rope(r, op, *inputs)
        case Temperature():
            return temperature(op, *inputs)
        case Attention():
            return attention(r, op, *inputs)
        case Gated():
            return gated(op, *inputs)
        case Activate():
            return ACTIVATIONS[op.activation](*inputs)
        case Xielu():
            return xielu(op, *inputs)
        case Sparsify():
            return sparsify(op, *inputs)
        case Rescale():
            return rescale(op, *inputs)
        case Scale():
            return inputs[0] * inputs[0].dtype.type(op.factor)
        case Softcap():
            cap = inputs[0].dtype.type(op.cap)
            return cap * np.tanh(inputs[0] / cap)
        case Add():
            return add(*inputs)
        case Multiply():
            return inputs[0] * inputs[1]
        case Slice():
            return inputs[0][:, op.first : op.first + r.dims[op.output]]
        case Route():
            return route(r, op, *inputs)
        case Experts():
            return experts(r, op, *inputs)
        case _:
            assert_never(op)


def load_weights(gguf: Any) -> dict[str, Array]:
    """Every tensor of an open `edge.files.gguf.GGUF` as float32, by its name in the file."""
    return {t.name: refmath.dequantise(t.type, t.data, t.shape) for t in gguf.tensors.values()}


def q8(x: Array) -> Array:
    """x through the kernels' int8 activations, a scale per 32 along the last axis."""
    codes, scales = refmath.quantise_activations(x)
    groups = codes.reshape(*scales.shape, -1) * scales[..., None]
    return groups.reshape(x.shape).astype(x.dtype)


def any_rounding(rng: np.random.Generator, group: int) -> Rounding:
    """What int8 with a scale per `group` may make of x: each number is off by up to half a step,
    evenly spread. It stands for every kernel that quantises so, whatever it then rounds to where.
    """

    def rounded(x: Array) -> Array:
        groups = x.reshape(*x.shape[:-1], -1, group)
        step = np.abs(groups).max(-1, keepdims=True) / 127
        off = rng.uniform(-0.5, 0.5, groups.shape) * step
        return (groups + off).reshape(x.shape).astype(x.dtype)

    return rounded


def embed(r: Run, op: Embed) -> Array:
    """(t, dim): a row of the table per token."""
    return r.weights[op.weights[0]][r.tokens]


def rms_norm(r: Run, op: RmsNorm, x: Array) -> Array:
    """x / rms(x) * w."""
    mean = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean + x.dtype.type(op.eps)) * r.weights[op.weights[0]]


def layer_norm(r: Run, op: LayerNorm, x: Array) -> Array:
    """(x - mean) / std * w (+ b)."""
    out = centred(x, op.eps) * r.weights[op.weights[0]]
    return out + r.weights[op.weights[1]] if len(op.weights) > 1 else out


def centred(x: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(eps))


def head_norm(r: Run, op: HeadNorm, x: Array) -> Array:
    """The norm of each head in a range of elements."""
    out = x.copy()
    n = op.n_heads * op.head_dim
    heads = x[:, op.first : op.first + n].reshape(len(x), op.n_heads, op.head_dim)
    if op.is_centred:
        normed = centred(heads, op.eps)
    else:
        mean = (heads * heads).mean(-1, keepdims=True)
        normed = heads / np.sqrt(mean + x.dtype.type(op.eps))
    for weight in op.weights:
        normed = normed * r.weights[weight]
    out[:, op.first : op.first + n] = normed.reshape(len(x), n)
    return out


def bias(r: Run, op: Bias, x: Array) -> Array:
    """x plus the weights, side by side from an element on."""
    out = x.copy()
    added = np.concatenate([r.weights[name] for name in op.weights])
    out[:, op.first : op.first + len(added)] += added
    return out


def adapt(r: Run, op: Adapt, x: Array, a: Array) -> Array:
    """x plus a product of a, from an element on."""
    out, added = x.copy(), matmul(r, op, a)
    out[:, op.first : op.first + added.shape[1]] += added
    return out


def gain(r: Run, op: Gain, x: Array) -> Array:
    """Some elements of x, times the weight."""
    out = x.copy()
    out[:, op.first : op.first + op.n] *= r.weights[op.weights[0]]
    return out


def temperature(op: Temperature, x: Array) -> Array:
    """The first elements, scaled by the position."""
    out = x.copy()
    factor = 1 + op.beta * np.log1p(np.arange(len(x)) // op.length)
    out[:, : op.n] *= factor[:, None].astype(x.dtype)
    return out


def xielu(op: Xielu, x: Array) -> Array:
    """The two branches of xIELU."""
    above = op.alpha_p * x * x + op.beta * x
    below = op.alpha_n * (np.expm1(np.minimum(x, op.eps)) - x) + op.beta * x
    return np.where(x > 0, above, below).astype(x.dtype)


def sparsify(op: Sparsify, x: Array) -> Array:
    """What the first elements are above their mean by more than some standard deviations."""
    out = x.copy()
    part = out[:, : op.n]  # a view
    mean = part.mean(-1, keepdims=True)
    std = np.sqrt(((part - mean) ** 2).mean(-1, keepdims=True))
    part[:] = np.maximum(part - (mean + x.dtype.type(op.factor) * std), 0)
    return out


def rescale(op: Rescale, x: Array, y: Array) -> Array:
    """x, as large as y."""
    target = np.sqrt((y * y).mean(-1, keepdims=True))
    return x * target / np.sqrt(np.maximum((x * x).mean(-1, keepdims=True), x.dtype.type(op.floor)))


def matmul(r: Run, op: Matmul | Adapt, x: Array) -> Array:
    """[x W0^T | x W1^T | ...]."""
    parts = []
    for name in op.weights:
        seen = x
        if name in r.quantised:
            seen = r.quantised[name](x)
        weight = r.weights[name]  # or a stack of some
        parts.append(seen @ weight.reshape(-1, weight.shape[-1]).T)
    return np.concatenate(parts, -1)


def rope(r: Run, op: Rotate, x: Array) -> Array:
    """Pairs (a, b) of the first n_heads heads, turned by position * frequency."""
    p = op.rope
    heads = x.reshape(len(x), -1, op.head_dim).copy()
    turned = heads[:, : op.n_heads, : p.n_rot]  # a view
    pair = np.arange(p.n_rot // 2)
    a, b = (2 * pair, 2 * pair + 1) if p.interleaved else (pair, pair + p.n_rot // 2)
    scale = np.full(p.n_rot // 2, p.scale)
    if p.ramp is not None:
        low, high = p.ramp
        share = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
        scale = share + (1 - share) * p.scale
    frequency = scale * p.base ** (-2.0 * pair / p.n_rot)
    if p.factors is not None:
        frequency = frequency / r.weights[p.factors]
    angle = np.arange(len(x))[:, None, None] * frequency  # float64: exact enough for any position
    cos = (np.cos(angle) * p.magnitude).astype(x.dtype)
    sin = (np.sin(angle) * p.magnitude).astype(x.dtype)
    xa, xb = turned[..., a], turned[..., b]
    turned[..., a], turned[..., b] = xa * cos - xb * sin, xa * sin + xb * cos
    return heads.reshape(x.shape)


def attention(r: Run, op: Attention, x: Array) -> Array:
    """softmax(scale q k^T + mask) v, each key head shared by n_heads / n_kv_heads queries."""
    n_heads, n_kv, d = op.heads.n_heads, op.heads.n_kv_heads, op.heads.head_dim
    heads = x.reshape(len(x), -1, d).swapaxes(0, 1)  # (head, t, d)
    scale = x.dtype.type(op.scale) or 1 / np.sqrt(x.dtype.type(d))
    q, k, v = np.split(heads, (n_heads, n_heads + n_kv))
    if not op.reads_only:
        r.kept[op.layer] = (k.astype(r.cache).astype(x.dtype), v.astype(r.cache).astype(x.dtype))
    k, v = r.kept[op.layer]
    age = np.arange(len(x))[:, None] - np.arange(len(x))
    hidden = (age < 0) | ((age >= op.window) if op.window else False)
    out = np.empty_like(q)
    for i in range(n_heads):
        j = i * n_kv // n_heads
        score = q[i] @ k[j].T * scale
        if op.softcap:
            cap = x.dtype.type(op.softcap)
            score = cap * np.tanh(score / cap)
        score[hidden] = -np.inf
        if op.weights:
            sink = np.full((len(x), 1), r.weights[op.weights[0]][i])
            out[i] = softmax(np.hstack([score, sink]))[:, :-1] @ v[j]
        else:
            out[i] = softmax(score) @ v[j]
    return out.swapaxes(0, 1).reshape(len(x), -1)


def gated(op: Gated | Experts, x: Array) -> Array:
    """activation(gate) * up of x = [gate | up]."""
    gate, up = np.split(x, 2, -1)
    if op.activation == "swiglu_oai":
        gate = np.minimum(gate, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1)
    return ACTIVATIONS[op.activation](gate) * up


def route(r: Run, op: Route, x: Array) -> Array:
    """[indices | weights] of the experts with the highest scores."""
    scores = softmax(x) if op.score == "softmax" else x
    ranks = scores + r.weights[op.weights[0]] if op.weights else scores
    chosen = np.argsort(-ranks, -1, kind="stable")[:, : op.n_used]
    weights = np.take_along_axis(scores, chosen, -1)
    if op.score == "softmax_of_chosen":
        weights = softmax(weights)
    if op.is_normed:
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
    return np.hstack([chosen.astype(x.dtype), weights * x.dtype.type(op.scale)])


def experts(r: Run, op: Experts, x: Array, routes: Array) -> Array:
    """Each token through its experts, one after the other."""
    out, t = np.zeros_like(x), op.tensors
    held = r.weights
    scales = dict(zip(t.gate_up, t.gate_up_scales, strict=True)) if t.gate_up_scales else {}
    scales |= {} if t.down_scale is None else {t.down: t.down_scale}

    def multiplied(name: str, x: Array, e: int) -> Array:
        seen = r.quantised[name](x[None])[0] if name in r.quantised else x
        y = held[name][e] @ seen
        return y * held[scales[name]][e] if name in scales else y

    for i, row in enumerate(routes):
        for j in range(op.n_used):
            e = int(row[j])
            h = np.concatenate([multiplied(name, x[i], e) for name in t.gate_up])
            if t.gate_up_biases:
                h = h + np.concatenate([held[name][e] for name in t.gate_up_biases])
            y = multiplied(t.down, gated(op, h), e)
            if t.down_bias:
                y = y + held[t.down_bias][e]
            out[i] += row[op.n_used + j] * y
    return out


def add(x: Array, y: Array) -> Array:
    """x + y."""
    return x + y


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def silu(x: Array) -> Array:
    """x sigmoid(x), by tanh so that no exp overflows."""
    half = x.dtype.type(0.5)
    return x * half * (1 + np.tanh(half * x))


def gelu_tanh(x: Array) -> Array:
    """The approximation by tanh (Hendrycks & Gimpel 2016)."""
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return (x / 2 * (1 + np.tanh(inner))).astype(x.dtype)


def gelu_erf(x: Array) -> Array:
    """x times the normal distribution's cumulative function."""
    return (x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(x.dtype)


def relu2(x: Array) -> Array:
    """The square of the positive part."""
    return np.maximum(x, 0) ** 2


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), by tanh so that no exp overflows."""
    half = x.dtype.type(0.5)
    return half * (1 + np.tanh(half * x))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": silu,
    "gelu_tanh": gelu_tanh,
    "gelu_erf": gelu_erf,
    "relu2": relu2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
}
