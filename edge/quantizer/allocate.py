"""Which type each tensor gets, when all together may take so many bytes.

Every tensor has some options: types, with the bytes that they take, the damage that they do, and
the time that a token's product takes. Wanted is the least damage in all under a number of bytes,
and maybe under a time. This is a knapsack with several choices for each item. Its relaxation by
Lagrange's multiplier is solved exactly: on the lower convex hull of each tensor's options, the
steps with the most gain per cost are taken first, whatever the tensor (Sinha & Zoltners 1979). A
step that does not fit is passed over; at the end, whatever still fits and helps most fills the
rest.

With a time, too, bytes and time are weighed into one cost, and the best of some weights is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edge.errors import InputError
from edge.sizes import show

__all__ = ["Allowance", "TypeOption", "allocate"]

#: How many ways of weighing bytes against time are tried.
_WEIGHTS = 33


@dataclass(frozen=True)
class TypeOption:
    """A type that a tensor may have. n_bytes: of the tensor then; damage: what the type does to the
    model's output, in any unit that adds up; seconds: of the tensor's part in a decoded token.
    """

    type: str
    n_bytes: int
    damage: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Allowance:
    """What all tensors together may take. seconds: of a decoded token; None: any time."""

    n_bytes: int
    seconds: float | None = None


def allocate(
    options: Mapping[str, Sequence[TypeOption]], allowance: Allowance
) -> dict[str, TypeOption]:
    """Tensor name -> the option that it gets.

    options: at least one of each tensor. Raises InputError where even the smallest options take
    more bytes, or the fastest more time; the message says how much they take.
    """
    _check_reachable(options, allowance)
    weights = [1.0]
    if allowance.seconds is not None:
        weights = [i / (_WEIGHTS - 1) for i in range(_WEIGHTS)]
    found = [_solve(options, allowance, weight) for weight in weights]
    best = min(
        (chosen for chosen in found if chosen is not None),
        key=lambda chosen: sum(option.damage for option in chosen.values()),
        default=None,
    )
    if best is None:
        raise InputError(
            f"no choice of types takes {show(allowance.n_bytes)} at most and decodes a token in "
            f"{1e3 * (allowance.seconds or 0):.3g} ms: allow a larger size or a lower speed"
        )
    return best


def _check_reachable(options: Mapping[str, Sequence[TypeOption]], allowance: Allowance) -> None:
    least = sum(min(option.n_bytes for option in of) for of in options.values())
    if least > allowance.n_bytes:
        raise InputError(
            f"{show(allowance.n_bytes)} cannot be reached: with the smallest types the tensors "
            f"take {show(least)}"
        )
    fastest = sum(min(option.seconds for option in of) for of in options.values())
    if allowance.seconds is not None and fastest > allowance.seconds:
        raise InputError(
            f"{1 / allowance.seconds:.3g} tokens/s cannot be reached: with the fastest types it "
            f"is {1 / fastest:.3g}"
        )


@dataclass(frozen=True)
class _Step:
    """From one option of a tensor to another. rate: how much less damage it does, by what it costs
    or, at the end, in all.
    """

    rate: float
    name: str
    before: TypeOption
    after: TypeOption


def _solve(
    options: Mapping[str, Sequence[TypeOption]], allowance: Allowance, weight: float
) -> dict[str, TypeOption] | None:
    """The best choice where a cost is a share `weight` of the bytes and the rest of the time; None:
    it is above the allowance.
    """
    time = allowance.seconds or 1.0

    def cost(option: TypeOption) -> float:
        return weight * option.n_bytes / allowance.n_bytes + (1 - weight) * option.seconds / time

    chosen, steps = dict[str, TypeOption](), list[_Step]()
    for name, of in options.items():
        hull = _hull([(cost(option), option) for option in of])
        chosen[name] = hull[0][1]
        for (low, before), (high, after) in pairwise(hull):
            rate = (before.damage - after.damage) / (high - low)
            steps.append(_Step(rate, name, before, after))
    room = _Room.beside(chosen, allowance)
    for step in sorted(steps, key=lambda step: -step.rate):
        # A tensor whose step was passed over stays: the next one starts where that would end.
        if chosen[step.name] is step.before and room.holds(step.before, step.after):
            room.swap(step.before, step.after)
            chosen[step.name] = step.after
    while (last := _best_step(options, chosen, room)) is not None:
        room.swap(last.before, last.after)
        chosen[last.name] = last.after
    return chosen if room.n_bytes >= 0 and room.seconds >= 0 else None


@dataclass
class _Room:
    """What is left of the allowance."""

    n_bytes: int
    seconds: float

    @classmethod
    def beside(cls, chosen: Mapping[str, TypeOption], allowance: Allowance) -> _Room:
        """The room beside these options; less than nothing where they take more."""
        seconds = math.inf if allowance.seconds is None else allowance.seconds
        return cls(
            allowance.n_bytes - sum(option.n_bytes for option in chosen.values()),
            seconds - sum(option.seconds for option in chosen.values()),
        )

    def holds(self, before: TypeOption, after: TypeOption) -> bool:
        """Whether one option may take the place of another."""
        more, slower = after.n_bytes - before.n_bytes, after.seconds - before.seconds
        return more <= max(0, self.n_bytes) and slower <= max(0.0, self.seconds)

    def swap(self, before: TypeOption, after: TypeOption) -> None:
        """Let one option take the place of another."""
        self.n_bytes -= after.n_bytes - before.n_bytes
        self.seconds -= after.seconds - before.seconds


def _best_step(
    options: Mapping[str, Sequence[TypeOption]], chosen: Mapping[str, TypeOption], room: _Room
) -> _Step | None:
    """The step that gains most of those for which there is room; None: none gains."""
    fitting = (
        _Step(chosen[name].damage - option.damage, name, chosen[name], option)
        for name, of in options.items()
        for option in of
        if option.damage < chosen[name].damage and room.holds(chosen[name], option)
    )
    return max(fitting, key=lambda step: step.rate, default=None)


def _hull(costs: Sequence[tuple[float, TypeOption]]) -> list[tuple[float, TypeOption]]:
    """The lower convex hull of damage over cost, from the cheapest on; damage falls along it."""
    hull = list[tuple[float, TypeOption]]()
    for cost, option in sorted(costs, key=lambda pair: (pair[0], pair[1].damage)):
        if hull and option.damage >= hull[-1][1].damage:
            continue
        while len(hull) > 1:
            (low, first), (middle, second) = hull[-2:]
            if (first.damage - second.damage) * (cost - middle) > (
                second.damage - option.damage
            ) * (middle - low):
                break
            hull.pop()
        if hull and cost == hull[-1][0]:
            hull.pop()
        hull.append((cost, option))
    return hull
