"""SmolLM3: Llama, in which every fourth layer rotates nothing.

Files do not say which layers; transformers has a list of them, with the same default.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, pre_norm, window_of
from edge.models.ropes import rope_of


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=True, factors=None) if (i + 1) % 4 else None
    return pre_norm(g, x, i, c, Attend(rope, Scores(window_of(c, i), c.attention_scale)))
