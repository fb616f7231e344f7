"""gpt-oss: experts with biases and a clipped gate, sinks in the attention, a window in every other
layer.
"""

from __future__ import annotations

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models import experts
from edge.models.common import Attend, Config, Ends, attention, rms, window_of
from edge.models.ropes import rope_of, unrounded

KEYS = experts.KEYS


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim). The norm before the experts is named
    `post_attention_norm`. YaRN's ramp begins and ends between pairs, as in OpenAI's own code and in
    transformers; llama.cpp rounds both ends.
    """
    blk = f"blk.{i}."
    c.keys.whole("attention.sliding_window", least=0)  # no default would be right
    rope = unrounded(c, rope_of(c, interleaved=False, factors=None))
    window = window_of(c, i, period=2)
    a = Attend(rope, Scores(window, c.attention_scale, sinks=f"{blk}attn_sinks.weight"))
    x = g.add(attention(g, rms(g, x, f"{blk}attn_norm", c), i, c, a), x)
    h = rms(g, x, f"{blk}post_attention_norm", c)
    mixture = experts.Mixture(experts.width(c, i), False, "softmax_of_chosen", "swiglu_oai")
    return g.add(experts.routed(g, h, i, c, mixture), x)


def ends(c: Config) -> Ends:
    """The output head is a matrix of its own."""
    return Ends(head="own")
