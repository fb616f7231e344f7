"""Gemma 1: scaled embedding, GELU. The file's norms have their 1 added already.

The embedding is multiplied by sqrt(dim) as a float, as llama.cpp does; transformers rounds the root
to the type of the weights, which is the same in float32.
"""

from __future__ import annotations

import math

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, pre_norm, window_of
from edge.models.ropes import rope_of


def ends(c: Config) -> Ends:
    """A scaled embedding, which is the output head, too."""
    return Ends(embedding_scale=math.sqrt(c.dim), head="tied")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=False, factors=None)
    return pre_norm(
        g, x, i, c, Attend(rope, Scores(window_of(c, i), c.attention_scale)), "gelu_tanh"
    )
