"""Gemma 4, the part that reads text: heads of two sizes, layers that read the keys and values of
others, inputs of each layer by token, experts beside the feed-forward network.

Layers that see all positions rotate only some pairs: the divisors of the others' frequencies are
near infinity. They may have one matrix for keys and values.
`transformers` is followed where llama.cpp differs: a file without a cap of the logits has none; a
layer reads the keys and values of the last layer of its kind.
"""

from __future__ import annotations

import math

from edge.graph.graph import Graph
from edge.graph.ops import Rope, Scores
from edge.models import experts
from edge.models.common import (
    Attend,
    Config,
    Ends,
    attention,
    gated_mlp,
    rms,
    window_of,
)
from edge.models.gemma3n import OPTIONAL as OPTIONAL
from edge.models.gemma3n import from_input, layer_inputs, owner_of
from edge.models.ropes import rope_of

KEYS = frozenset(
    {
        *experts.KEYS,
        "attention.key_length_swa",
        "attention.shared_kv_layers",
        "attention.value_length_swa",
        "embedding_length_per_layer_input",
        "final_logit_softcapping",
        "rope.dimension_count_swa",
        "rope.freq_base_swa",
    }
)


def ends(c: Config) -> Ends:
    """The embedding is scaled; logits may be capped."""
    cap = c.keys.softcap("final_logit_softcapping")
    return Ends(embedding_scale=math.sqrt(c.dim), softcap=cap)


def layers(g: Graph, x: str, c: Config) -> str:
    """x: the embedding, (tokens, dim) -> (tokens, dim)."""
    c.keys.whole("attention.sliding_window")  # it must be there
    key = "attention.sliding_window_pattern"
    if not isinstance(c.keys.get(key), list):
        raise c.keys.error(key, "must be a list")
    has_inputs = c.keys.whole("embedding_length_per_layer_input", 0, least=0) > 0
    inputs = layer_inputs(g, x, c) if has_inputs else None
    for i in range(c.n_layers):
        x = layer(g, x, i, c, inputs)
    return x


def layer(g: Graph, x: str, i: int, c: Config, inputs: str | None) -> str:
    """x: (tokens, dim) -> (tokens, dim). inputs: of all layers, if there are any."""
    blk = f"blk.{i}."
    h = attention(g, rms(g, x, f"{blk}attn_norm", c), i, c, _attend(g, c, i))
    x = g.add(rms(g, h, f"{blk}post_attention_norm", c), x)
    h = gated_mlp(g, rms(g, x, f"{blk}ffn_norm", c), i, c, "gelu_tanh")
    if c.keys.get("expert_count", 0) != 0:
        h = g.add(rms(g, h, f"{blk}post_ffw_norm_1", c), _experts(g, x, i, c))
    x = g.add(rms(g, h, f"{blk}post_ffw_norm", c), x)
    if inputs is not None:
        x = g.add(x, from_input(g, x, i, c, inputs))
    scale = f"{blk}layer_output_scale.weight"
    return g.gain(x, scale) if g.has(scale) else x


def _experts(g: Graph, x: str, i: int, c: Config) -> str:
    """norm(experts(norm(x))): (tokens, dim) -> (tokens, dim). The router has a norm of its own."""
    blk = f"blk.{i}."
    seen = g.rms_norm(x, f"{blk}ffn_gate_inp.scale", c.rms_eps)
    seen = g.scale(seen, 1 / math.sqrt(c.dim))
    logits = g.matmul(seen, f"{blk}ffn_gate_inp.weight", rows=[experts.count(c)])
    mixture = experts.Mixture(experts.width(c, i), activation="gelu_tanh")
    h = experts.routed(g, rms(g, x, f"{blk}pre_ffw_norm_2", c), i, c, mixture, logits)
    return rms(g, h, f"{blk}post_ffw_norm_2", c)


def _attend(g: Graph, c: Config, i: int) -> Attend:
    window = window_of(c, i)
    has_values = window or g.has(f"blk.{i}.attn_v.weight")
    return Attend(
        _rope(c, i, window),
        Scores(window, 1.0),
        norm="head",
        values="normed" if has_values else "keys",
        owner=owner_of(c, i, 0, 0),
    )


def _rope(c: Config, i: int, window: int) -> Rope:
    if not window:
        return rope_of(c, interleaved=False, factors="rope_freqs.weight", layer=i)
    n_rot = c.keys.whole("rope.dimension_count_swa", c.heads[i].head_dim, least=2)
    if n_rot % 2 or n_rot > c.heads[i].head_dim:
        raise c.keys.error("rope.dimension_count_swa", f"{n_rot} rotated dimensions of a head")
    base = c.keys.number("rope.freq_base_swa", 10000.0, least=1.001, most=1e11)
    return Rope(n_rot, base, interleaved=False)
