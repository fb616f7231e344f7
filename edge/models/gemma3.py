"""Gemma 3, its text part: five layers of six have a window and a rotary embedding of their own.

The scale of scores follows from the number of layers, as in llama.cpp: files do not state it.
"""

from __future__ import annotations

import math

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, sandwich, window_of
from edge.models.ropes import local_rope, rope_of

KEYS = ("final_logit_softcapping", "rope.freq_base_swa")
_27B = 62  # layers


def ends(c: Config) -> Ends:
    """A scaled embedding."""
    cap = c.keys.softcap("final_logit_softcapping")
    return Ends(embedding_scale=math.sqrt(c.dim), softcap=cap)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    scale = c.attention_scale
    if c.n_layers == _27B:
        scale = scale or 1 / math.sqrt(c.dim / c.heads[i].n_heads)
    window = window_of(c, i, period=6)
    rope = rope_of(c, interleaved=False, factors=None)
    if window:
        rope = local_rope(c, rope, 10000.0)
    return sandwich(g, x, i, c, Attend(rope, Scores(window, scale), norm="head"), "gelu_tanh")
