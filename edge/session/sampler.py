"""From one token's logits to the next token: a fixed order of small functions.

logit bias                                   on all logits, float32 (n_vocab,)
repetition, presence and frequency penalties on the logits of tokens seen before
greedy at temperature 0                      the largest logit, lowest id first
top-k                                        the k largest logits
top-p, then min-p                            on the probabilities of those, before the temperature
temperature, softmax, draw                   on the logits of what is left

That is llama.cpp's default order, and each step does what its sampler of that name does, so that
equal options mean equal distributions. What llama.cpp has besides (DRY, top-n-sigma, typical, XTC,
a dynamic temperature) is off by default there and not built here; its default temperature is 0.8.
The random numbers are our own: equal seeds draw other tokens than llama.cpp's.

Top-p and min-p see the probabilities that the model itself gives the k best tokens, so a higher
temperature makes the tokens that they keep more alike, but keeps no more of them.

The same logits, options, seed and number of draws give the same token on every
machine: nothing but comparisons, IEEE + - * / and sums in a fixed order here, the exponential is
`edge.native.softmax`'s. To add a sampler: one function, in its place in `ADJUST` or `CUTS`, and
one field.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge import check, native
from edge.errors import InputError, brief

__all__ = [
    "Sampler",
    "SamplingField",
    "SamplingOptions",
    "largest",
    "philox4x32",
    "sampling_fields",
]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_FLOAT_MAX = float(np.finfo(np.float32).max)
_LEAST_EXPONENT = -200.0  # exp of it is 0 in float32


def _option(
    default: float, text: str, low: float, high: float, *, above: bool = False, fixed: bool = True
) -> Any:
    """A number from low to high. above: low itself is not allowed. fixed: whether no model may
    recommend another default; else the field is None where it is not set.
    """
    metadata = {"help": text, "min": low, "max": high, "min_open": above, "default": default}
    return field(default=default if fixed else None, metadata=metadata)


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. Raises InputError for a value out of its range.

    A number that a model may recommend is None where it is left out. It is settled when a call
    begins: it is what the model's files recommend, or else the field's default. Each field's
    metadata has its `help` text, `default`, `min`, `max` and `min_open` (the least value itself is
    not allowed); see `sampling_fields`. Of `seed`, None means another one for each answer.
    """

    temperature: float = _option(
        0.7,
        "Divides the logits: higher is more varied, 0 always takes the best token.",
        0.0,
        100.0,
        fixed=False,
    )
    top_k: int = _option(40, "Draw from the K best tokens; 0: from all.", 0, 2**31 - 1, fixed=False)
    top_p: float = _option(
        0.95,
        "Draw from the fewest best tokens that reach this probability.",
        0.0,
        1.0,
        above=True,
        fixed=False,
    )
    min_p: float = _option(
        0.05,
        "Leave out tokens less probable than this share of the best token's.",
        0.0,
        1.0,
        fixed=False,
    )
    repetition_penalty: float = _option(
        1.0,
        "Divides the logits of tokens seen before; 1: off.",
        0.0,
        100.0,
        above=True,
        fixed=False,
    )
    presence_penalty: float = _option(
        0.0, "Subtracted from the logits of tokens seen before.", -100.0, 100.0
    )
    frequency_penalty: float = _option(
        0.0, "Subtracted from a token's logit for each time it was seen.", -100.0, 100.0
    )
    penalty_window: int = _option(
        64,
        "Tokens that the penalties look back on, prompt included; -1: all.",
        -1,
        2**31 - 1,
        fixed=False,
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict,
        metadata={"help": "Added to a token's logit; -inf forbids the token."},
    )
    seed: int | None = _option(
        0,
        "The same seed gives the same answer, on every device; -1: another one for each answer.",
        -1,
        2**64 - 1,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "logit_bias":
                object.__setattr__(self, f.name, self._checked(f.name, f.metadata))
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(
                f"logit_bias is {brief(self.logit_bias)}, it must map token ids to numbers"
            )
        object.__setattr__(
            self, "logit_bias", dict(_bias(*item) for item in self.logit_bias.items())
        )

    def _checked(self, name: str, limits: Mapping[str, Any]) -> Any:
        """A field's value as a plain number in its range, or None."""
        value, low, high = getattr(self, name), limits["min"], limits["max"]
        if value is None and (name == "seed" or name in _NOT_FIXED):
            return None
        if name == "seed" and check.whole(name, value, low, high) == -1:
            return None
        if isinstance(limits["default"], int):
            return check.whole(name, value, low, high)
        return check.number(name, value, low, high, above=limits["min_open"])

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise InputError when logit_bias names a token that a vocabulary of n_vocab does not
        have, or forbids all that it has.
        """
        bias = self.logit_bias
        if bias and max(bias) >= n_vocab:
            raise InputError(f"logit_bias names token {max(bias)}, the vocabulary has {n_vocab}")
        if len(bias) >= n_vocab and all(value == -math.inf for value in bias.values()):
            raise InputError(f"logit_bias forbids all {n_vocab} tokens: nothing can be drawn")

    def settled(self, recommended: SamplingOptions | None = None) -> SamplingOptions:
        """A copy with a number in each field: where this one has none, that of `recommended`, or
        else the default; a random seed is drawn.
        """
        changes: dict[str, Any] = {}
        for option in sampling_fields():
            if option.can_be_unset and getattr(self, option.name) is None:
                value = getattr(recommended, option.name, None)
                changes[option.name] = option.default if value is None else value
        if self.seed is None:
            changes["seed"] = secrets.randbits(32)
        return replace(self, **changes) if changes else self


def _bias(token: Any, value: Any) -> tuple[int, float]:
    """An entry of logit_bias."""
    token = check.whole("a token id in logit_bias", token)
    if isinstance(value, float) and value == -math.inf:
        return token, -math.inf
    return token, check.number(f"logit_bias of token {token}, if it is not -inf,", value, -1e6, 1e6)


#: The fields of SamplingOptions that a model may recommend.
_NOT_FIXED = frozenset(f.name for f in fields(SamplingOptions) if f.default is None)


class SamplingField(NamedTuple):
    """A field of SamplingOptions, for command lines, servers and docs. can_be_unset: whether a
    model may recommend another default.
    """

    name: str
    kind: type  # int, float or dict
    default: Any
    help: str
    min: float | None
    max: float | None
    min_open: bool
    can_be_unset: bool


def sampling_fields() -> list[SamplingField]:
    """The fields of SamplingOptions in their order."""
    defaults = {f.name: f.metadata.get("default", {}) for f in fields(SamplingOptions)}
    return [
        SamplingField(
            f.name,
            type(defaults[f.name]),
            defaults[f.name],
            f.metadata["help"],
            f.metadata.get("min"),
            f.metadata.get("max"),
            f.metadata.get("min_open", False),
            f.name in _NOT_FIXED,
        )
        for f in fields(SamplingOptions)
    ]


class Sampler:
    """Draws tokens. `draws`, how many so far, is the whole state: save it, set it, and go on."""

    def __init__(self, options: SamplingOptions | None = None) -> None:
        self.options = (options or SamplingOptions()).settled()
        self.draws = 0

    def sample(self, logits: Floats, history: Sequence[int]) -> int:
        """The next token's id.

        logits: finite, float32, (n_vocab,); not changed. history: the tokens before, oldest first.
        Raises InputError for a logit_bias that is not for this vocabulary.
        """
        o = self.options
        assert o.seed is not None  # settled
        o.check_vocabulary(len(logits))
        draw = self.draws
        self.draws += 1
        values = logits.copy()
        seen = _seen(history, o)
        for adjust in ADJUST:
            adjust(values, seen, o)
        if o.temperature == 0:
            return int(values.argmax())
        ids = _cut(values, o)
        return int(ids[_draw(_softmax(values[ids], o.temperature), uniform(o.seed, draw))])


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
    """Set logits; what is not forbidden (-inf) stays a number."""
    finite = np.clip(values, -_FLOAT_MAX, _FLOAT_MAX)
    logits[ids] = np.where(np.isneginf(values), values, finite)


def _logit_bias(logits: Floats, seen: Seen, o: SamplingOptions) -> None:
    """Add the bias; -inf forbids."""
    if o.logit_bias:
        ids = np.array(list(o.logit_bias), np.intp)
        biases = np.array(list(o.logit_bias.values()), np.float64)
        _put(logits, ids, logits[ids].astype(np.float64) + biases)


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


# ---- on candidates ----


def largest(values: Floats, k: int) -> Ids:
    """Indices of the k largest of values (n,), largest first, of equal values the lowest first."""
    n = len(values)
    if k >= n:
        return np.argsort(-values, kind="stable")
    # the k-th largest value is the same however it was found
    ids = np.flatnonzero(values >= np.partition(values, n - k)[n - k])
    return ids[np.argsort(-values[ids], kind="stable")[:k]]


def _top_k(logits: Floats, o: SamplingOptions) -> Ids:
    """The k best tokens, best first; without top-k all in id order. None that is forbidden."""
    ids = largest(logits, o.top_k) if 0 < o.top_k < len(logits) else np.arange(len(logits))
    return ids[logits[ids] > -np.inf] if o.logit_bias else ids


def _cut(logits: Floats, o: SamplingOptions) -> Ids:
    """The candidates: what top-k, top-p and min-p leave."""
    ids = _top_k(logits, o)
    if o.top_p < 1 or o.min_p > 0:
        p = _softmax(logits[ids])
        for cut in CUTS:
            kept = cut(p, o)
            ids, p = ids[kept], p[kept]
    return ids


def _softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Probabilities of candidates, (n,)."""
    x = logits.astype(np.float64)
    x -= x.max()
    with np.errstate(over="ignore"):
        x /= temperature
    np.maximum(x, _LEAST_EXPONENT, out=x)
    return native.softmax(x.astype(np.float32))


def _top_p(p: Floats, o: SamplingOptions) -> Ids:
    """The fewest best tokens whose probabilities reach top_p (Holtzman et al. 2019)."""
    if o.top_p == 1:
        return np.arange(len(p))
    for k in (256, 8192, len(p)):  # seldom more than 256: do not sort a whole vocabulary
        order = largest(p, k)
        mass = _running_sum(p[order])
        if mass[-1] >= o.top_p:
            break
    return order[: int(np.searchsorted(mass, o.top_p)) + 1]


def _min_p(p: Floats, o: SamplingOptions) -> Ids:
    """Tokens at least min_p times as probable as the best (Nguyen et al. 2024)."""
    return np.flatnonzero(p >= np.float32(o.min_p * float(p.max())))


def _draw(p: Floats, u: float) -> int:
    """The index at u, in [0, 1), of probabilities laid end to end."""
    mass = _running_sum(p)
    i = int(np.searchsorted(mass, u * float(mass[-1]), side="right"))
    return min(i, len(mass) - 1)


def _running_sum(p: Floats) -> npt.NDArray[np.float64]:
    """Sums of the first 1, 2, ... n values, one after another in float64."""
    return np.cumsum(p, dtype=np.float64)


ADJUST: tuple[Callable[[Floats, Seen, SamplingOptions], None], ...] = (
    _logit_bias,
    _repetition,
    _presence_and_frequency,
)
#: From probabilities (n,) to the indices of those that stay.
CUTS: tuple[Callable[[Floats, SamplingOptions], Ids], ...] = (_top_p, _min_p)


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
