"""Mixtures of experts: the block that the architectures with experts share."""

from __future__ import annotations

from dataclasses import dataclass

from edge.graph.graph import Graph
from edge.graph.ops import (
    MAX_DIM,
    MAX_EXPERTS,
    MAX_EXPERTS_USED,
    ExpertWeights,
    GateActivation,
    Routing,
    Score,
)
from edge.models.common import Config, linear

#: The keys that these functions read.
KEYS = (
    "expert_count",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
)
#: The key that `shared_width` reads.
SHARED = "expert_shared_feed_forward_length"

#: `expert_gating_func`: how a router's numbers become scores.
_SCORES: dict[int, Score] = {1: "softmax", 2: "given", 3: "softmax_of_chosen"}


def count(c: Config) -> int:
    """How many experts a layer has."""
    return c.keys.whole("expert_count", most=MAX_EXPERTS)


def used(c: Config, i: int) -> int:
    """How many experts a token uses in layer i."""
    return c.keys.wholes("expert_used_count", c.n_layers, most=MAX_EXPERTS_USED)[i]


def width(c: Config, i: int, default: int | None = None) -> int:
    """The width of an expert of layer i. default: where the metadata does not say, or says 0; None:
    it must say.
    """
    least = 1 if default is None else 0
    key = "expert_feed_forward_length"
    return c.keys.wholes(key, c.n_layers, default, least=least, most=MAX_DIM)[i] or default or 0


@dataclass(frozen=True)
class Mixture:
    """What is special about the experts of a layer. width: of each; score, is_normed: see
    `edge.graph.ops.Route`, where the metadata does not say.
    """

    width: int
    is_normed: bool = True
    score: Score = "softmax"
    activation: GateActivation = "silu"


def routed(g: Graph, x: str, i: int, c: Config, m: Mixture, logits: str | None = None) -> str:
    """The weighted sum of a token's experts: (tokens, dim) -> (tokens, dim). Scales (a number for
    each expert) and biases, of the router, too, take part where the file has them.

    logits: of the router, (tokens, experts), where it does not read x.
    """
    blk, n_experts = f"blk.{i}.ffn_", count(c)
    code = c.keys.whole("expert_gating_func", 0, least=0)
    if code not in (0, *_SCORES):
        raise c.keys.not_built("expert_gating_func", f"{code}: {', '.join(map(str, _SCORES))} run")
    is_normed = c.keys.get("expert_weights_norm", m.is_normed)
    if not isinstance(is_normed, bool):
        raise c.keys.error("expert_weights_norm", "must be true or false")
    scale = c.keys.optional("expert_weights_scale", 1, least=1e-3, most=1000) or 1
    if logits is None:
        logits = linear(g, x, [f"{blk}gate_inp"], [n_experts])
    if code == 2:
        logits = g.activate(logits, "sigmoid")
    bias = f"blk.{i}.exp_probs_b.bias"
    routing = Routing(
        used(c, i), _SCORES.get(code, m.score), is_normed, scale, bias if g.has(bias) else None
    )
    routes = g.route(logits, routing)
    fused = g.has(f"{blk}gate_up_exps.weight")
    gate_up = [f"{blk}gate_up_exps"] if fused else [f"{blk}gate_exps", f"{blk}up_exps"]
    biases = [] if fused else [f"{name}.bias" for name in gate_up]
    scales = [f"{name}.scale" for name in gate_up]
    down_bias, down_scale = f"{blk}down_exps.bias", f"{blk}down_exps.scale"
    tensors = ExpertWeights(
        tuple(f"{name}.weight" for name in gate_up),
        f"{blk}down_exps.weight",
        tuple(biases) if any(map(g.has, biases)) else (),
        down_bias if g.has(down_bias) else None,
        tuple(scales) if any(map(g.has, scales)) else (),
        down_scale if g.has(down_scale) else None,
    )
    return g.experts(x, routes, tensors, (n_experts, m.width), m.activation)


def shared(g: Graph, x: str, i: int, c: Config, n: int) -> str:
    """The expert of width n that all tokens use: (tokens, dim) -> (tokens, dim). The file has gate
    and up, or both in one matrix named up; and maybe a vector whose product with x, through a
    sigmoid, is the expert's weight.
    """
    blk = f"blk.{i}.ffn_"
    names = ["gate", "up"]
    if g.shapes.get(f"{blk}up_shexp.weight") == (2 * n, c.dim):
        names = ["up"]
    h = linear(g, x, [f"{blk}{name}_shexp" for name in names], [n, n])
    y = linear(g, g.gated(h, "silu"), [f"{blk}down_shexp"], [c.dim])
    weight = f"{blk}gate_inp_shexp.weight"
    if not g.has(weight):
        return y
    return g.multiply(y, g.activate(g.matmul_row(x, weight), "sigmoid"))


def shared_width(c: Config, default: int = 0) -> int:
    """The width of the shared expert; 0: there is none. default: where the metadata does not say,
    or says 0.
    """
    return c.keys.whole(SHARED, 0, least=0, most=MAX_DIM) or default
