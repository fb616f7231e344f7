"""StarCoder2: layer norms, biases everywhere, a feed-forward network without a gate.

Its models were trained with a window of 4096 positions, which `transformers` applies. Files do not
name it and llama.cpp has none; edge applies it.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, layer_norm, mlp, window_of
from edge.models.ropes import rope_of

_WINDOW = 4096


def ends(c: Config) -> Ends:
    """The last norm is a layer norm."""
    return Ends(norm=layer_norm)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    scores = Scores(window_of(c, i, default=_WINDOW), c.attention_scale)
    a = Attend(rope_of(c, interleaved=False, factors=None), scores)
    x = g.add(attention(g, layer_norm(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    return g.add(mlp(g, layer_norm(g, x, f"blk.{i}.ffn_norm", c), i, c, "gelu_tanh"), x)
