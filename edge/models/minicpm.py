"""MiniCPM 1, 2 and 4: Granite's multipliers with defaults of their own, LongRoPE.

Old files have no `logit_scale`; then the logits are divided by dim / 256, as the model's own code
does. llama.cpp multiplies them by that.
"""

from __future__ import annotations

import math

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, scaled_branches, window_of
from edge.models.ropes import LONG, SHORT, longrope_of, longrope_positions

KEYS = ("embedding_scale", "logit_scale", "residual_scale")
OPTIONAL = frozenset({LONG, SHORT})
n_positions = longrope_positions


def ends(c: Config) -> Ends:
    """A scaled embedding, and divided logits."""
    scale = c.keys.number("embedding_scale", 12.0, least=0, most=1e4) or 1.0
    divisor = c.keys.number("logit_scale", c.dim / 256, least=1e-3, most=1e6)
    return Ends(embedding_scale=scale, logit_scale=1 / divisor)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = longrope_of(g, c, interleaved=True)
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale))
    usual = 1.4 / math.sqrt(c.n_layers)
    branch = c.keys.number("residual_scale", usual, least=0, most=1e4) or 1.0
    return scaled_branches(g, x, i, c, a, branch)
