"""Llama, SmolLM2, Mistral, TinyLlama, DeepSeek's distilled Llamas."""

from __future__ import annotations

from edge.graph import Graph, Rope, Scores
from edge.models.common import Attend, Config, attention, gated_mlp, rms, rope_of, window_of


def rope(g: Graph, c: Config) -> Rope:
    """The rotary embedding: neighbouring elements are pairs. Llama 3.1's files have a tensor of
    divisors of the frequencies.
    """
    factors = "rope_freqs.weight"
    return rope_of(c, interleaved=True, factors=factors if g.has(factors) else None)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(rope(g, c), Scores(window_of(c, i), c.attention_scale))
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    return g.add(gated_mlp(g, rms(g, x, f"blk.{i}.ffn_norm", c), i, c), x)
