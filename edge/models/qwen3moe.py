"""Qwen3-MoE: Qwen3, whose feed-forward networks are experts."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models import experts
from edge.models.common import Attend, Config, attention, rms, window_of
from edge.models.ropes import rope_of

KEYS = experts.KEYS


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=False, factors=None)
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale), norm="head")
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    h = rms(g, x, f"blk.{i}.ffn_norm", c)
    width = experts.width(c, i, max(1, c.ffn[i] // experts.used(c, i)))
    return g.add(experts.routed(g, h, i, c, experts.Mixture(width)), x)
