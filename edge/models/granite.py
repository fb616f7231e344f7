"""Granite 3 and 4, dense: Llama with multipliers of embedding, scores, branches and logits.

The logits are divided by `logit_scale`.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Rope, Scores
from edge.models.common import Attend, Config, Ends, scaled_branches, window_of
from edge.models.ropes import divisors, rope_of

SCALES = ("embedding_scale", "logit_scale", "residual_scale")
KEYS = (*SCALES, "rope.scaling.finetuned")


def ends(c: Config) -> Ends:
    """A scaled embedding, and divided logits."""
    scale = c.keys.number("embedding_scale", 0, least=0, most=1e4) or 1.0
    divisor = c.keys.number("logit_scale", least=1e-3, most=1e6)
    return Ends(embedding_scale=scale, logit_scale=1 / divisor)


def rope(g: Graph, c: Config) -> Rope | None:
    """The rotary embedding; the file may say that there is none."""
    is_rotated = c.keys.get("rope.scaling.finetuned", True)
    if not isinstance(is_rotated, bool):
        raise c.keys.error("rope.scaling.finetuned", "must be true or false")
    found = rope_of(c, interleaved=True, factors=divisors(g))
    return found if is_rotated else None


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(rope(g, c), Scores(window_of(c, i), c.attention_scale))
    return scaled_branches(g, x, i, c, a, branch_scale(c))


def branch_scale(c: Config) -> float:
    """What the result of each part of a layer is multiplied by."""
    return c.keys.number("residual_scale", 0, least=0, most=1e4) or 1.0
