"""Hunyuan, dense: each head of queries and keys is normed after it is rotated.

Its scaling of positions by "alpha" is a larger base, which the file states.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, pre_norm, window_of
from edge.models.ropes import rope_of


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=False, factors=None)
    scores = Scores(window_of(c, i), c.attention_scale)
    return pre_norm(g, x, i, c, Attend(rope, scores, norm="head", norm_last=True))
