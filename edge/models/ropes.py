"""Rotary embeddings, as metadata ask for them."""

from __future__ import annotations

import decimal
import math
from dataclasses import replace
from decimal import Decimal

from edge.errors import UnsupportedError, brief
from edge.graph.graph import Graph
from edge.graph.ops import Rope
from edge.models.common import Config
from edge.models.keys import Keys


def rope_of(
    c: Config,
    *,
    interleaved: bool,
    factors: str | None,
    magnitude: float = 1.0,
    scalings: tuple[str, ...] = ("none", "linear", "yarn"),
    layer: int = 0,
) -> Rope:
    """The rotary embedding that the metadata asks for, of the heads of a layer.

    magnitude: the default where the file has none. scalings: the types of scaling that the file may
    name, "linear" is the default. With each but "none", positions are divided by the file's factor;
    with "yarn", only those of slow frequencies.
    """
    keys = c.keys
    head_dim = c.heads[layer].head_dim
    n_rot = keys.whole("rope.dimension_count", head_dim)
    if n_rot % 2 or n_rot > head_dim:
        raise keys.error(
            "rope.dimension_count", f"{n_rot} rotated dimensions of a head of {head_dim}"
        )
    base = keys.number("rope.freq_base", 10000.0, least=1.001, most=1e11)
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in scalings:
        raise UnsupportedError(
            f"{c.path}: position scaling of type {brief(kind)}",
            what=f"rope.scaling.type = {brief(kind)}",
            supported=scalings,
        )
    factor_key = "rope.scaling.factor"
    if keys.get(factor_key) is None:
        factor_key = "rope.scale_linear"  # its old name
    factor = keys.optional(factor_key, least=1e-3, most=1e4) or 1
    scale = 1 if kind == "none" else 1 / factor
    magnitude = keys.number("rope.scaling.attn_factor", magnitude, least=0.01, most=50)
    ramp = None
    if kind == "yarn":
        ramp = _yarn_ramp(c, n_rot, base)
        magnitude *= _yarn_magnitude(keys, factor)
    return Rope(n_rot, base, interleaved, factors, scale, magnitude, ramp)


def divisors(g: Graph) -> str | None:
    """Llama 3.1's divisors of frequencies, where the file has them."""
    name = "rope_freqs.weight"
    return name if g.has(name) else None


def local_rope(c: Config, rope: Rope, base: float) -> Rope:
    """The rotary embedding of layers with a window, where only the others' positions are scaled.

    base: where the file has none for these layers.
    """
    base = c.keys.number("rope.freq_base_swa", base, least=1.001, most=1e11)
    return replace(rope, base=base, factors=None, scale=1.0, magnitude=1.0, ramp=None)


#: Logarithms that decide bits are decimal: they are the same on every machine, libm's are not.
_EXACT = decimal.Context(prec=30)
_TWO_PI = Decimal("6.283185307179586476925286766559")


def _yarn_ends(c: Config, n_rot: int, base: float) -> tuple[Decimal, Decimal]:
    """The pairs between which the frequencies change from unscaled to scaled: those that turn
    beta_fast and beta_slow times within the original context; 0 and n_rot - 1 are the limits.
    """
    original, ends = original_context(c), list[Decimal]()
    for key, default in (("fast", 32.0), ("slow", 1.0)):
        turns = c.keys.number(f"rope.scaling.yarn_beta_{key}", default, least=1e-3, most=1e6)
        length = _EXACT.divide(Decimal(original), _EXACT.multiply(Decimal(turns), _TWO_PI))
        share = _EXACT.divide(_EXACT.ln(length), _EXACT.ln(Decimal(base)))
        pair = _EXACT.multiply(share, n_rot // 2)
        ends.append(max(Decimal(0), min(pair, Decimal(n_rot - 1))))
    return ends[0], ends[1]


def _yarn_ramp(c: Config, n_rot: int, base: float) -> tuple[float, float]:
    """A ramp that begins and ends at whole pairs."""
    low, high = _yarn_ends(c, n_rot, base)
    return math.floor(low), math.ceil(high)


def unrounded(c: Config, rope: Rope) -> Rope:
    """The same rotary embedding with YaRN's ramp from end to end, if it has one (gpt-oss)."""
    if rope.ramp is None:
        return rope
    low, high = _yarn_ends(c, rope.n_rot, rope.base)
    return replace(rope, ramp=(float(low), float(high)))


def _yarn_magnitude(keys: Keys, factor: float) -> float:
    """1 + log(factor) / 10, divided by the same with a multiple of the logarithm where the file has
    one; or the file's own number, as transformers has it (llama.cpp does not read that).
    """
    log = _EXACT.divide(_EXACT.ln(Decimal(max(1.0, factor))), 10)
    share = Decimal(keys.number("rope.scaling.yarn_log_multiplier", 0, least=0, most=100))
    magnitude = _EXACT.divide(_EXACT.add(1, log), _EXACT.fma(share, log, 1))
    own = "rope.scaling.yarn_attn_factor"
    return keys.number(own, float(magnitude), least=0.01, most=50)


#: LongRoPE's two sets of factors.
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def longrope_of(g: Graph, c: Config, *, interleaved: bool) -> Rope:
    """`rope_of` for files that may have LongRoPE's factors. The context that sessions may use
    decides between short and long ones.

    Keys in the cache are rotated already, so the factors cannot change within a session. A context
    up to the original length takes the short factors for all positions, a larger one the long.
    """
    if not _has_longrope(g):
        return rope_of(c, interleaved=interleaved, factors=None)
    original = original_context(c)
    return rope_of(
        c,
        interleaved=interleaved,
        factors=LONG if c.n_context > original else SHORT,
        magnitude=_longrope_magnitude(c.n_context_train, original),
        scalings=("none", "linear", "longrope"),
    )


def longrope_positions(g: Graph, c: Config) -> int:
    """Positions that `longrope_of` serves: the original length with the short factors, all
    positions with the long ones.
    """
    original = original_context(c)
    short = _has_longrope(g) and c.n_context <= original
    return min(original, c.n_context_train) if short else c.n_context_train


def _has_longrope(g: Graph) -> bool:
    return g.has(LONG) or g.has(SHORT)


def original_context(c: Config) -> int:
    """Positions that the model was trained for before its context was extended."""
    return c.keys.whole("rope.scaling.original_context_length", c.n_context_train, least=2)


def _longrope_magnitude(trained: int, original: int) -> float:
    """sqrt(1 + log(trained / original) / log(original)), LongRoPE's attention factor."""
    stretch = max(Decimal(1), _EXACT.divide(Decimal(trained), Decimal(original)))
    share = _EXACT.divide(_EXACT.ln(stretch), _EXACT.ln(Decimal(original)))
    return float(_EXACT.sqrt(_EXACT.add(1, share)))
