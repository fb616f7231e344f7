"""Llama, SmolLM2, Mistral, TinyLlama, DeepSeek's distilled Llamas."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models import experts
from edge.models.common import Attend, Config, attention, pre_norm, rms, window_of
from edge.models.ropes import divisors, rope_of

KEYS = experts.KEYS


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=True, factors=divisors(g))
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale))
    if c.keys.get("expert_count", 0) == 0:
        return pre_norm(g, x, i, c, a)
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    h = rms(g, x, f"blk.{i}.ffn_norm", c)
    return g.add(experts.routed(g, h, i, c, experts.Mixture(experts.width(c, i, c.ffn[i]))), x)
