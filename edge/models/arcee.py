"""Arcee AFM: Llama with a feed-forward part of squared ReLU, without a gate; YaRN."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, attention, mlp, rms, window_of
from edge.models.ropes import divisors, rope_of


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=True, factors=divisors(g))
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale))
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    return g.add(mlp(g, rms(g, x, f"blk.{i}.ffn_norm", c), i, c, "relu2"), x)
