"""Llama and what follows it (SmolLM2, Mistral, TinyLlama): separate q, k, v, gate and up."""

from __future__ import annotations

from edge.graph import Graph, Rope
from edge.models.common import Config, attention, gated_mlp, rope_of

OPTIONAL: frozenset[str] = frozenset()


def rope(g: Graph, c: Config) -> Rope:
    """Pairs side by side; Llama 3.1 ships divisors of the frequencies as a tensor."""
    factors = "rope_freqs" if g.has("rope_freqs") else None
    return rope_of(c, interleaved=True, factors=factors)


def layer(g: Graph, x: str, i: int, c: Config, rope: Rope) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    h = g.rms_norm(x, f"blk.{i}.attn_norm", c.norm_eps)
    x = g.add(attention(g, h, i, c, rope, qkv=("attn_q", "attn_k", "attn_v")), x)
    h = g.rms_norm(x, f"blk.{i}.ffn_norm", c.norm_eps)
    return g.add(gated_mlp(g, h, i, c, gate_up=("ffn_gate", "ffn_up"), activation="silu"), x)
