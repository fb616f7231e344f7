"""Gemma 2: norms before and behind both parts, softcaps, a window in every other layer.

The scale of scores follows from the number of layers, as in llama.cpp: files do not state it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from edge.graph.graph import Graph
from edge.graph.ops import Rope, Scores
from edge.models.common import Attend, Config, Ends, sandwich, window_of
from edge.models.ropes import rope_of

KEYS = ("attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa")
_27B = 46  # layers


def ends(c: Config) -> Ends:
    """A scaled embedding, which is the output head, too; capped logits."""
    cap = c.keys.softcap("final_logit_softcapping", 30.0)
    return Ends(embedding_scale=math.sqrt(c.dim), head="tied", softcap=cap)


def rope(c: Config, window: int) -> Rope:
    """The rotary embedding, with another base for layers with a window where the file has one."""
    full = rope_of(c, interleaved=False, factors=None)
    base = c.keys.number("rope.freq_base_swa", full.base, least=1.001, most=1e11)
    return replace(full, base=base) if window else full


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    scale = c.attention_scale
    if c.n_layers == _27B:
        scale = scale or 1 / math.sqrt(c.dim / c.heads[i].n_heads)
    window = window_of(c, i, period=2, default=4096)
    cap = c.keys.softcap("attn_logit_softcapping", 50.0)
    return sandwich(g, x, i, c, Attend(rope(c, window), Scores(window, scale, cap)), "gelu_tanh")
