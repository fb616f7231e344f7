"""Nemotron-3 and Minitron: layer norms, relu squared, half of a head rotated. The converter has
added 1 to the weights of the norms.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, layer_norm, mlp, window_of
from edge.models.ropes import rope_of


def ends(c: Config) -> Ends:
    """The last norm is a layer norm; the head is never the embedding."""
    return Ends(norm=layer_norm, head="own")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(
        rope_of(c, interleaved=False, factors=None), Scores(window_of(c, i), c.attention_scale)
    )
    x = g.add(attention(g, layer_norm(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    return g.add(mlp(g, layer_norm(g, x, f"blk.{i}.ffn_norm", c), i, c, "relu2"), x)
