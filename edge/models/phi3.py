"""Phi-3 and Phi-4-mini: fused qkv and gate_up, partial rotary, LongRoPE."""

from __future__ import annotations

from decimal import Context, Decimal

from edge.graph import Graph, Rope, Scores
from edge.models.common import Attend, Config, attention, gated_mlp, rms, rope_of, window_of

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
OPTIONAL = frozenset({_LONG, _SHORT})


def rope(g: Graph, c: Config) -> Rope:
    """The rotary embedding: element i of a head and i + n_rot / 2 are a pair. The context that
    sessions may use decides between LongRoPE's short and long factors.

    Keys in the cache are rotated already, so the factors cannot change within a session. A context
    up to the original length takes the short factors for all positions, a larger one the long.
    """
    if not _has_factors(g):
        return rope_of(c, interleaved=False, factors=None)
    original = _original(c)
    return rope_of(
        c,
        interleaved=False,
        factors=_LONG if c.n_context > original else _SHORT,
        magnitude=_magnitude(c.n_context_train, original),
        scalings=("none", "linear", "longrope"),
    )


def n_positions(g: Graph, c: Config) -> int:
    """Positions that the rotary embedding serves: the original length with the short factors, all
    positions with the long ones.
    """
    original = _original(c)
    short = _has_factors(g) and c.n_context <= original
    return min(original, c.n_context_train) if short else c.n_context_train


def _has_factors(g: Graph) -> bool:
    return g.has(_LONG) or g.has(_SHORT)


def _original(c: Config) -> int:
    """Positions that the model was trained for before its context was extended."""
    return c.keys.whole("rope.scaling.original_context_length", c.n_context_train, least=2)


def _magnitude(trained: int, original: int) -> float:
    """sqrt(1 + log(trained / original) / log(original)), LongRoPE's attention factor.

    It is computed in decimal arithmetic: its logarithm has the same bits on every machine, that of
    libm does not.
    """
    exact = Context(prec=30)
    stretch = max(Decimal(1), exact.divide(Decimal(trained), Decimal(original)))
    share = exact.divide(exact.ln(stretch), exact.ln(Decimal(original)))
    return float(exact.sqrt(exact.add(1, share)))


def layer(g: Graph, x: str, i: int, c: Config) -> str:
    """x: (tokens, dim) -> (tokens, dim)."""
    a = Attend(rope(g, c), Scores(window_of(c, i), c.attention_scale))
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    return g.add(gated_mlp(g, rms(g, x, f"blk.{i}.ffn_norm", c), i, c), x)
