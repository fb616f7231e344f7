"""InternLM 2 and 3: Llama with an output head of its own. Converters split its fused matrix."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, pre_norm, window_of
from edge.models.ropes import rope_of


def ends(c: Config) -> Ends:
    """An output head of its own."""
    return Ends(head="own")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=True, factors=None)
    return pre_norm(g, x, i, c, Attend(rope, Scores(window_of(c, i), c.attention_scale)))
