"""Command R and Aya 23: one layer norm for attention and feed-forward network, side by side.

Command R+ has norms of each head, a row of weights for each.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, gated_mlp, layer_norm, window_of
from edge.models.ropes import rope_of

KEYS = frozenset({"logit_scale"})


def ends(c: Config) -> Ends:
    """The head is the embedding; logits are multiplied by a number, 0: they are not."""
    scale = c.keys.number("logit_scale", 0, least=0, most=1e4)
    return Ends(norm=layer_norm, head="tied", logit_scale=scale or 1)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(
        rope_of(c, interleaved=True, factors=None),
        Scores(window_of(c, i), c.attention_scale),
        norm="head" if g.has(f"blk.{i}.attn_q_norm.weight") else "none",
        is_centred=True,
    )
    h = layer_norm(g, x, f"blk.{i}.attn_norm", c)
    x = g.add(attention(g, h, i, c, a), x)
    return g.add(gated_mlp(g, h, i, c), x)
