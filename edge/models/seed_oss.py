"""Seed-OSS: Llama with biases; the norm before the feed-forward part has another name."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, attention, gated_mlp, rms, window_of
from edge.models.ropes import rope_of


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=False, factors=None)
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale))
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    return g.add(gated_mlp(g, rms(g, x, f"blk.{i}.post_attention_norm", c), i, c), x)
