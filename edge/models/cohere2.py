"""Command R7B and Aya Vision: three of four layers have a window, and only these are rotated."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, gated_mlp, layer_norm, window_of
from edge.models.ropes import rope_of

KEYS = frozenset({"logit_scale"})
_PERIOD = 4  # each 4th layer sees all positions, and has no rotary embedding


def ends(c: Config) -> Ends:
    """The head is the embedding; logits are multiplied by a number."""
    scale = c.keys.number("logit_scale", least=1e-4, most=1e4)
    return Ends(norm=layer_norm, head="tied", logit_scale=scale)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    c.keys.whole("attention.sliding_window")  # it must be there
    window = window_of(c, i, period=_PERIOD)
    rope = rope_of(c, interleaved=True, factors=None) if window else None
    h = layer_norm(g, x, f"blk.{i}.attn_norm", c)
    x = g.add(attention(g, h, i, c, Attend(rope, Scores(window, c.attention_scale))), x)
    return g.add(gated_mlp(g, h, i, c), x)
