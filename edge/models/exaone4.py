"""EXAONE 4: norms only behind attention and feed-forward network, and of the heads of q and k.

The 32B has a window in three of four layers, and the other layers are not rotated. llama.cpp takes
this form for 64 layers alone; `transformers`, as edge, for each model with a window.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, attention, gated_mlp, rms, window_of
from edge.models.ropes import divisors, rope_of

_N_LAYERS_32B, _WINDOW, _PERIOD = 64, 4096, 4


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    default = _WINDOW if c.n_layers == _N_LAYERS_32B else 0
    has_windows = c.keys.whole("attention.sliding_window", default, least=0) > 0
    window = window_of(c, i, period=_PERIOD, default=default)
    rope = rope_of(c, interleaved=False, factors=divisors(g))
    is_rotated = window or not has_windows
    a = Attend(rope if is_rotated else None, Scores(window, c.attention_scale), norm="head")
    x = g.add(rms(g, attention(g, x, i, c, a), f"blk.{i}.post_attention_norm", c), x)
    return g.add(rms(g, gated_mlp(g, x, i, c), f"blk.{i}.post_ffw_norm", c), x)
