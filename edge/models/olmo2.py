"""OLMo 2 and 3: norms behind both parts only, queries and keys normed as a whole.

OLMo 3 has windows in three layers of four, and YaRN in the others.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, gated_mlp, rms, window_of
from edge.models.ropes import local_rope, rope_of

KEYS = ("rope.freq_base_swa",)


def ends(c: Config) -> Ends:
    """An output head of its own."""
    return Ends(head="own")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    window = window_of(c, i, period=4)
    rope = rope_of(c, interleaved=False, factors=None)
    if window:
        rope = local_rope(c, rope, rope.base)
    a = Attend(rope, Scores(window, c.attention_scale), norm="whole")
    h = attention(g, x, i, c, a)
    x = g.add(rms(g, h, f"blk.{i}.post_attention_norm", c), x)
    h = gated_mlp(g, x, i, c)
    return g.add(rms(g, h, f"blk.{i}.post_ffw_norm", c), x)
