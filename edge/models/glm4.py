"""GLM-4-0414 and the text part of GLM-4.1V: norms before and behind attention and feed-forward
network, half of a head rotated.

Neighbouring elements are pairs. The converter moves them to the halves of a head where the model
also reads pictures, and then writes the sections of their positions; a text has one position for
all sections.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, sandwich, window_of
from edge.models.ropes import rope_of

KEYS = frozenset({"rope.dimension_sections"})


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    has_sections = any(c.keys.wholes("rope.dimension_sections", 4, 0, least=0))
    rope = rope_of(c, interleaved=not has_sections, factors=None)
    return sandwich(g, x, i, c, Attend(rope, Scores(window_of(c, i), c.attention_scale)))
