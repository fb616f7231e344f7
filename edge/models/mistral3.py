"""Ministral 3: Llama with YaRN; queries grow with the logarithm of far positions."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, pre_norm, window_of
from edge.models.ropes import divisors, original_context, rope_of

KEYS = ("attention.temperature_scale",)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=True, factors=divisors(g))
    scores = Scores(window_of(c, i), c.attention_scale)
    beta = c.keys.number("attention.temperature_scale", 0, least=0, most=100)
    temperature = (beta, original_context(c)) if beta else None
    return pre_norm(g, x, i, c, Attend(rope, scores, temperature=temperature))
