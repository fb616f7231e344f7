"""BitNet b1.58: weights of -1, 0 and 1, norms before the last projection of each block.

Files do not name the activation. The first models (1bitLLM, each head with keys of its own) have
silu, the 2B of 2025 (heads share keys) has relu squared, as `transformers`; llama.cpp has silu for
all.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, gated_mlp, rms, window_of
from edge.models.ropes import rope_of


def ends(c: Config) -> Ends:
    """The head is the embedding."""
    return Ends(head="tied")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    shares_keys = c.heads[i].n_kv_heads < c.heads[i].n_heads
    a = Attend(
        rope_of(c, interleaved=False, factors=None), Scores(window_of(c, i), c.attention_scale)
    )
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    h = rms(g, x, f"blk.{i}.ffn_norm", c)
    return g.add(gated_mlp(g, h, i, c, "relu2" if shares_keys else "silu"), x)
