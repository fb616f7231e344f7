"""Hunyuan-A13B: experts, and one that all tokens use; queries and keys are normed after the
rotation.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models import experts
from edge.models.common import Attend, Config, attention, rms, window_of
from edge.models.ropes import rope_of

KEYS = (*experts.KEYS, experts.SHARED)
#: Files state another width than their tensors have, which is `feed_forward_length`.
IGNORED = ("expert_feed_forward_length",)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=False, factors=None)
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale), norm="head", norm_last=True)
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    h = rms(g, x, f"blk.{i}.ffn_norm", c)
    routed = experts.routed(g, h, i, c, experts.Mixture(c.ffn[i]))
    shared = experts.shared(g, h, i, c, experts.shared_width(c, c.ffn[i]))
    return g.add(g.add(routed, shared), x)
