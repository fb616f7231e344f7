"""Llama, SmolLM2, Mistral, TinyLlama: separate q, k, v, gate and up."""

from __future__ import annotations

from edge.graph import Graph, Rope
from edge.models.common import Config, Positions, attention, gated_mlp, rope_of, window_of

OPTIONAL: frozenset[str] = frozenset()


def rope(g: Graph, c: Config) -> Rope:
    """The rotary embedding: neighbouring elements are pairs. Llama 3.1's files have a tensor of
    divisors of the frequencies.
    """
    factors = "rope_freqs.weight"
    return rope_of(c, interleaved=True, factors=factors if g.has(factors) else None)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    positions = Positions(rope(g, c), window_of(c, i))
    h = g.rms_norm(x, f"blk.{i}.attn_norm.weight", c.norm_eps)
    qkv = [f"blk.{i}.attn_{part}.weight" for part in "qkv"]
    x = g.add(attention(g, h, i, c, positions, qkv=qkv), x)
    h = g.rms_norm(x, f"blk.{i}.ffn_norm.weight", c.norm_eps)
    gate_up = [f"blk.{i}.ffn_{part}.weight" for part in ("gate", "up")]
    return g.add(gated_mlp(g, h, i, c, gate_up=gate_up, activation="silu"), x)
