"""Qwen1.5-MoE, Qwen2-MoE: Qwen2 with experts, and one that all tokens use, by a weight."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Rope, Scores
from edge.models import experts
from edge.models.common import Attend, Config, Ends, attention, rms, window_of
from edge.models.ropes import rope_of

KEYS = (*experts.KEYS, experts.SHARED)


def rope(c: Config) -> Rope:
    """The rotary embedding: element i of a head and i + n_rot / 2 are a pair."""
    return rope_of(c, interleaved=False, factors=None)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(rope(c), Scores(window_of(c, i), c.attention_scale))
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    h = rms(g, x, f"blk.{i}.ffn_norm", c)
    width = experts.width(c, i, max(1, c.ffn[i] // experts.used(c, i)))
    routed = experts.routed(g, h, i, c, experts.Mixture(width, is_normed=False))
    shared = experts.shared(g, h, i, c, experts.shared_width(c, c.ffn[i]))
    return g.add(g.add(routed, shared), x)


def ends(c: Config) -> Ends:
    """The output head is a matrix of its own."""
    return Ends(head="own")
