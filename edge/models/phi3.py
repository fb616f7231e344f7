"""Phi-3 and Phi-4-mini: fused qkv and gate_up, partial rotary, LongRoPE."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, pre_norm, window_of
from edge.models.ropes import LONG, SHORT, longrope_of, longrope_positions

OPTIONAL = frozenset({LONG, SHORT})
n_positions = longrope_positions


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = longrope_of(g, c, interleaved=False)
    return pre_norm(g, x, i, c, Attend(rope, Scores(window_of(c, i), c.attention_scale)))
