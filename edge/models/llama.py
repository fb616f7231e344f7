"""Llama, SmolLM2, Mistral, TinyLlama, DeepSeek's distilled Llamas."""

from __future__ import annotations

from edge.graph import Graph, Scores
from edge.models.common import Attend, Config, divisors, pre_norm, rope_of, window_of


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=True, factors=divisors(g))
    return pre_norm(g, x, i, c, Attend(rope, Scores(window_of(c, i), c.attention_scale)))
