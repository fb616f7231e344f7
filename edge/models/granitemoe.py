"""Granite 3 with experts, and maybe one that all tokens use: the multipliers are Granite's."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models import experts, granite
from edge.models.common import Attend, Config, attention, rms, window_of
from edge.models.ropes import divisors, rope_of

KEYS = (*experts.KEYS, experts.SHARED, *granite.SCALES)
ends = granite.ends


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=True, factors=divisors(g))
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale))
    branch = granite.branch_scale(c)
    h = attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a)
    x = g.add(g.scale(h, branch), x)
    h = rms(g, x, f"blk.{i}.ffn_norm", c)
    y = experts.routed(g, h, i, c, experts.Mixture(experts.width(c, i, c.ffn[i])))
    width = experts.shared_width(c)
    if width:
        y = g.add(y, experts.shared(g, h, i, c, width))
    return g.add(g.scale(y, branch), x)
