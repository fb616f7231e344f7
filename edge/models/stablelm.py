"""StableLM: layer norms, and in the 12B norms of each head, a row of weights for each.

Attention and feed-forward network stand side by side where the file has no second norm, unless it
says that they do not. That it says they do means nothing: converters write so for either form.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, gated_mlp, layer_norm, window_of
from edge.models.ropes import rope_of

KEYS = frozenset({"use_parallel_residual"})


def ends(c: Config) -> Ends:
    """The last norm is a layer norm; the head is never the embedding."""
    return Ends(norm=layer_norm, head="own")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(
        rope_of(c, interleaved=False, factors=None),
        Scores(window_of(c, i), c.attention_scale),
        norm="head" if g.has(f"blk.{i}.attn_q_norm.weight") else "none",
        is_centred=True,
    )
    h = layer_norm(g, x, f"blk.{i}.attn_norm", c)
    x = g.add(attention(g, h, i, c, a), x)
    if g.has(f"blk.{i}.ffn_norm.weight") or c.keys.get("use_parallel_residual") is False:
        h = layer_norm(g, x, f"blk.{i}.ffn_norm", c)
    return g.add(gated_mlp(g, h, i, c), x)
