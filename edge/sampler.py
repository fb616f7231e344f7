"""From one token's logits to the next token: a fixed order of small functions.

repetition, presence and frequency penalties, logit bias  on all logits, float32 (n_vocab,)
greedy at temperature 0                                   the largest logit, lowest id first
top-k, temperature, softmax                               on the k largest logits
min-p, top-p, draw                                        on their probabilities

Top-k comes before the temperature because dividing does not change the order: the heavy work is
then on k values. Min-p and top-p each keep the head of the sorted candidates, by the same
probabilities, so that their order makes no difference but in speed.

The same logits, options, seed and number of draws give the same token on every
machine: nothing but comparisons, IEEE + - * / and sums in a fixed order here, the exponential is
`edge.native.softmax`'s. To add a sampler: one function, in its place in `ADJUST` or `CUTS`, and
one field.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge import native
from edge.errors import InputError

__all__ = ["Option", "Sampler", "SamplingOptions", "largest", "philox4x32", "sampling_fields"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_FLOAT_MAX = float(np.finfo(np.float32).max)
_LEAST_EXPONENT = -200.0  # exp of it is 0 in float32


def _option(default: float, text: str, low: float, high: float, *, above: bool = False) -> Any:
    """A number from low to high. above: low itself is not allowed."""
    metadata = {"help": text, "min": low, "max": high, "min_open": above}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. Raises InputError for a value out of its range.

    Each field's metadata has its `help` text, `min`, `max` and `min_open` (the least value itself
    is not allowed); see `sampling_fields`.
    """

    temperature: float = _option(
        0.7, "Divides the logits: higher is more varied, 0 always takes the best token.", 0.0, 100.0
    )
    top_k: int = _option(40, "Draw from the K best tokens; 0: from all.", 0, 2**31 - 1)
    top_p: float = _option(
        0.95, "Draw from the fewest best tokens that reach this probability.", 0.0, 1.0, above=True
    )
    min_p: float = _option(
        0.05, "Leave out tokens less probable than this share of the best token's.", 0.0, 1.0
    )
    repetition_penalty: float = _option(
        1.0, "Divides the logits of tokens seen before; 1: off.", 0.0, 100.0, above=True
    )
    presence_penalty: float = _option(
        0.0, "Subtracted from the logits of tokens seen before.", -100.0, 100.0
    )
    frequency_penalty: float = _option(
        0.0, "Subtracted from a token's logit for each time it was seen.", -100.0, 100.0
    )
    penalty_window: int = _option(
        64, "Tokens that the penalties look back on, prompt included; -1: all.", -1, 2**31 - 1
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        metadata={"help": "Added to a token's logit; -inf forbids the token."},
    )
    seed: int = _option(0, "The same seed gives the same answer, on every device.", 0, 2**64 - 1)

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "logit_bias":
                _check_number(f.name, getattr(self, f.name), isinstance(f.default, int), f.metadata)
        if not isinstance(self.logit_bias, Mapping):
            raise InputError("logit_bias must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise InputError(f"logit_bias has {token!r}, a token id is a number from 0")
            if isinstance(bias, bool) or not isinstance(bias, (int, float)):
                raise InputError(f"logit_bias of token {token} is {bias!r}, not a number")
            if not (abs(bias) <= 1e6 or bias == -math.inf):
                raise InputError(
                    f"logit_bias of token {token} is {bias}: from -1e6 to 1e6, or -inf"
                )


def _check_number(name: str, value: Any, whole: bool, metadata: Mapping[str, Any]) -> None:
    """Raise InputError unless value is an int (or a float, where not whole) in its range."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"{name} is {value!r}, it must be a {'whole ' if whole else ''}number")
    low, high = metadata["min"], metadata["max"]
    if not low <= value <= high or (metadata["min_open"] and value == low):  # NaN fails too
        least = f"above {low}" if metadata["min_open"] else f"from {low}"
        raise InputError(f"{name} is {value}, it must be {least} to {high}")


class Option(NamedTuple):
    """A field of SamplingOptions, for command lines, servers and docs."""

    name: str
    kind: type  # int, float or dict
    default: Any
    help: str
    min: float | None
    max: float | None
    min_open: bool


def sampling_fields() -> list[Option]:
    """The fields of SamplingOptions in their order."""
    defaults = SamplingOptions()
    return [
        Option(
            f.name,
            type(getattr(defaults, f.name)),
            getattr(defaults, f.name),
            f.metadata["help"],
            f.metadata.get("min"),
            f.metadata.get("max"),
            f.metadata.get("min_open", False),
        )
        for f in fields(SamplingOptions)
    ]


class Sampler:
    """Draws tokens. `draws`, how many so far, is the whole state: save it, set it, and go on."""

    def __init__(self, options: SamplingOptions | None = None) -> None:
        self.options = options or SamplingOptions()
        self.draws = 0

    def sample(self, logits: Floats, history: Sequence[int]) -> int:
        """The next token's id.

        logits: finite, float32, (n_vocab,); not changed. history: the tokens before, oldest first.
        Raises InputError when logit_bias names a token that the vocabulary does not have.
        """
        o = self.options
        draw = self.draws
        self.draws += 1
        values = logits.copy()
        seen = _seen(history, o)
        for adjust in ADJUST:
            adjust(values, seen, o)
        if o.temperature == 0:
            return int(values.argmax())
        candidates = _candidates(values, o)
        for cut in CUTS:
            candidates = cut(candidates, o)
        return _draw(candidates, uniform(o.seed, draw))


# ---- on all logits, in place ----


class Seen(NamedTuple):
    """Tokens in the penalties' window. ids: (n,), each once; counts: (n,), how often."""

    ids: Ids
    counts: npt.NDArray[np.float64]


def _seen(history: Sequence[int], o: SamplingOptions) -> Seen:
    counts: Counter[int] = Counter()
    if o.repetition_penalty != 1 or o.presence_penalty or o.frequency_penalty:
        window = len(history) if o.penalty_window < 0 else min(o.penalty_window, len(history))
        counts.update(history[len(history) - window :])
    return Seen(np.array(list(counts), np.intp), np.array(list(counts.values()), np.float64))


def _put(logits: Floats, ids: Ids, values: npt.NDArray[np.float64]) -> None:
    logits[ids] = np.clip(values, -_FLOAT_MAX, _FLOAT_MAX)


def _repetition(logits: Floats, seen: Seen, o: SamplingOptions) -> None:
    """Divide positive logits, multiply negative ones. Source: CTRL (Keskar et al. 2019)."""
    if o.repetition_penalty != 1:
        x = logits[seen.ids].astype(np.float64)
        _put(logits, seen.ids, np.where(x > 0, x / o.repetition_penalty, x * o.repetition_penalty))


def _presence_and_frequency(logits: Floats, seen: Seen, o: SamplingOptions) -> None:
    """Subtract presence + frequency * count."""
    if o.presence_penalty or o.frequency_penalty:
        x = logits[seen.ids].astype(np.float64)
        _put(logits, seen.ids, x - o.presence_penalty - o.frequency_penalty * seen.counts)


def _logit_bias(logits: Floats, seen: Seen, o: SamplingOptions) -> None:
    """Add the bias; the least float stands for -inf."""
    if o.logit_bias:
        unknown = max(o.logit_bias)
        if unknown >= len(logits):
            raise InputError(f"logit_bias names token {unknown}, the vocabulary has {len(logits)}")
        ids = np.array(list(o.logit_bias), np.intp)
        biases = np.array(list(o.logit_bias.values()), np.float64)
        _put(logits, ids, logits[ids].astype(np.float64) + biases)


# ---- on candidates ----


class Candidates(NamedTuple):
    """Tokens that may be drawn. ids: (n,); p: float32 (n,), summing to 1 before the cuts."""

    ids: Ids
    p: Floats


def largest(values: Floats, k: int) -> Ids:
    """Indices of the k largest of values (n,), largest first, of equal values the lowest first."""
    n = len(values)
    if k >= n:
        return np.argsort(-values, kind="stable")
    # the k-th largest value is the same however it was found
    ids = np.flatnonzero(values >= np.partition(values, n - k)[n - k])
    return ids[np.argsort(-values[ids], kind="stable")[:k]]


def _candidates(logits: Floats, o: SamplingOptions) -> Candidates:
    """Top-k, temperature, softmax. With top-k the candidates are sorted, else in id order."""
    if 0 < o.top_k < len(logits):
        ids = largest(logits, o.top_k)
        logits = logits[ids]
    else:
        ids = np.arange(len(logits))
    x = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        x = np.maximum((x - x.max()) / o.temperature, _LEAST_EXPONENT)
    return Candidates(ids, native.softmax(x.astype(np.float32)))


def _min_p(c: Candidates, o: SamplingOptions) -> Candidates:
    """Tokens at least min_p times as probable as the best (Nguyen et al. 2024)."""
    if o.min_p == 0:
        return c
    keep = c.p.astype(np.float64) >= o.min_p * float(c.p.max())
    return Candidates(c.ids[keep], c.p[keep])


def _top_p(c: Candidates, o: SamplingOptions) -> Candidates:
    """The fewest best tokens whose probabilities reach top_p (Holtzman et al. 2019)."""
    if o.top_p == 1:
        return c
    for k in (256, 8192, len(c.p)):  # seldom more than 256: do not sort a whole vocabulary
        order = largest(c.p, k)
        mass = _running_sum(c.p[order])
        if mass[-1] >= o.top_p:
            break
    order = order[: int(np.searchsorted(mass, o.top_p)) + 1]
    return Candidates(c.ids[order], c.p[order])


def _draw(c: Candidates, u: float) -> int:
    """The token at u, in [0, 1), of the probabilities laid end to end."""
    mass = _running_sum(c.p)
    i = int(np.searchsorted(mass, u * float(mass[-1]), side="right"))
    return int(c.ids[min(i, len(mass) - 1)])


def _running_sum(p: Floats) -> npt.NDArray[np.float64]:
    """Sums of the first 1, 2, ... n values, one after another in float64."""
    return np.cumsum(p, dtype=np.float64)


ADJUST: tuple[Callable[[Floats, Seen, SamplingOptions], None], ...] = (
    _repetition,
    _presence_and_frequency,
    _logit_bias,
)
CUTS: tuple[Callable[[Candidates, SamplingOptions], Candidates], ...] = (_min_p, _top_p)


# ---- random numbers ----


def philox4x32(counter: int, key: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words for a 128-bit counter and a 64-bit key.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    x0, x1, x2, x3 = ((counter >> shift) & 0xFFFFFFFF for shift in (0, 32, 64, 96))
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1 = (b >> 32) ^ x1 ^ k0, b & 0xFFFFFFFF
        x2, x3 = (a >> 32) ^ x3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x0, x1, x2, x3


def uniform(seed: int, draw: int) -> float:
    """A number in [0, 1), a multiple of 2 ** -53, for this seed and number of the draw."""
    high, low, _, _ = philox4x32(draw, seed)
    return float(((high << 21) | (low >> 11)) * 2.0**-53)
