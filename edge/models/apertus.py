"""Apertus: norms of the heads of q and k, and the activation xIELU, with numbers of each layer."""

from __future__ import annotations

from decimal import Context, Decimal

from edge.graph.graph import Graph
from edge.graph.ops import Scores
from edge.models.common import Attend, Config, Ends, attention, linear, rms, window_of
from edge.models.keys import Keys
from edge.models.ropes import divisors, rope_of

KEYS = frozenset({"xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"})


def ends(c: Config) -> Ends:
    """The head is never the embedding."""
    return Ends(head="own")


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    rope = rope_of(c, interleaved=False, factors=divisors(g))
    a = Attend(rope, Scores(window_of(c, i), c.attention_scale), norm="head")
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    h = linear(g, rms(g, x, f"blk.{i}.ffn_norm", c), [f"blk.{i}.ffn_up"], [c.ffn[i]])
    h = g.xielu(h, *_xielu(c, i))
    return g.add(linear(g, h, [f"blk.{i}.ffn_down"], [c.dim]), x)


def _xielu(c: Config, i: int) -> tuple[float, float, float, float]:
    """alpha_p, alpha_n, beta and eps of layer i. The file has the alphas as they were trained; the
    softplus makes them positive.
    """
    keys = Keys(c.keys.metadata, "xielu", c.path)
    alpha_p, alpha_n, beta = (
        keys.numbers(key, c.n_layers, least=-1000, most=1000)[i]
        for key in ("alpha_p", "alpha_n", "beta")
    )
    eps = keys.numbers("eps", c.n_layers, least=-0.5, most=0.5)[i]
    return _softplus(alpha_p), beta + _softplus(alpha_n), beta, eps


def _softplus(x: float) -> float:
    """log(1 + exp(x)), in decimal arithmetic: its bits are the same on every machine, those of libm
    are not.
    """
    exact = Context(prec=30)
    return float(exact.ln(exact.add(1, exact.exp(Decimal(x)))))
