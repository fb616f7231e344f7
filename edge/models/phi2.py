"""Phi-1, Phi-1.5 and Phi-2: one layer norm for attention and feed-forward network, side by side."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, layer_norm, mlp, window_of
from edge.models.ropes import rope_of


def ends(c: Config) -> Ends:
    """The head has a bias."""
    return Ends(norm=layer_norm, head="own")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(
        rope_of(c, interleaved=False, factors=None), Scores(window_of(c, i), c.attention_scale)
    )
    h = layer_norm(g, x, f"blk.{i}.attn_norm", c)
    x = g.add(attention(g, h, i, c, a), x)
    return g.add(mlp(g, h, i, c, "gelu_tanh"), x)
