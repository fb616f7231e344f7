"""ERNIE 4.5 with experts: the first layers are dense, then every so many have experts."""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models import experts
from edge.models.common import Attend, Config, attention, gated_mlp, rms, window_of
from edge.models.ropes import rope_of

_DENSE, _STEP = "leading_dense_block_count", "interleave_moe_layer_step"
KEYS = (*experts.KEYS, experts.SHARED, _DENSE, _STEP)


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(
        rope_of(c, interleaved=True, factors=None), Scores(window_of(c, i), c.attention_scale)
    )
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    h = rms(g, x, f"blk.{i}.ffn_norm", c)
    if i < c.keys.whole(_DENSE, 0, least=0) or (i + 1) % c.keys.whole(_STEP, 1):
        return g.add(gated_mlp(g, h, i, c), x)
    y = experts.routed(g, h, i, c, experts.Mixture(experts.width(c, i)))
    width = experts.shared_width(c)
    if width:
        y = g.add(y, experts.shared(g, h, i, c, width))
    return g.add(y, x)
