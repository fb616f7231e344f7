"""Types under a size: the best choice, the allowance, and what cannot be reached."""

from __future__ import annotations

import numpy as np
import pytest

from edge.errors import InputError
from edge.quantizer.allocate import Allowance, TypeOption, allocate

TYPES = ("IQ2_S", "IQ3_S", "Q4_0", "Q8_0")
BITS = (2.5, 3.4, 4.5, 8.5)


def made_up(n: int, seed: int) -> dict[str, list[TypeOption]]:
    """n tensors whose damage falls to about a quarter with each bit more."""
    random = np.random.default_rng(seed)
    options = {}
    for i in range(n):
        size, harm = random.integers(1, 9), random.lognormal()
        options[f"blk.{i}.ffn_up.weight"] = [
            TypeOption(kind, int(bits * size * 1000), harm * 4.0**-bits, seconds=bits * size / slow)
            for kind, bits, slow in zip(
                TYPES, (2.5, 3.4, 4.5, 8.5), (1.0, 1.2, 2.0, 2.0), strict=True
            )
        ]
    return options


def total(chosen: dict[str, TypeOption], what: str) -> float:
    return sum(getattr(option, what) for option in chosen.values())


def bound(options: dict[str, list[TypeOption]], n_bytes: int) -> float:
    """No choice within n_bytes does less damage: the largest value of Lagrange's dual."""
    return max(
        sum(min(o.damage + price * o.n_bytes for o in of) for of in options.values())
        - price * n_bytes
        for price in np.geomspace(1e-12, 1e-2, 2000)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_close_to_what_is_possible(seed, share):
    options = made_up(60, seed)
    smallest, largest = (
        sum(pick(o.n_bytes for o in of) for of in options.values()) for pick in (min, max)
    )
    n_bytes = int(smallest + share * (largest - smallest))
    chosen = allocate(options, Allowance(n_bytes))
    assert total(chosen, "n_bytes") <= n_bytes
    assert total(chosen, "damage") <= 1.1 * bound(options, n_bytes)


def test_many_tensors_fill_the_size():
    options = made_up(200, 7)
    allowance = Allowance(3_500_000)
    chosen = allocate(options, allowance)
    assert 0.995 * allowance.n_bytes < total(chosen, "n_bytes") <= allowance.n_bytes


def test_time_is_a_limit_too():
    options = made_up(50, 3)
    free = allocate(options, Allowance(900_000))
    allowance = Allowance(900_000, seconds=0.97 * total(free, "seconds"))
    chosen = allocate(options, allowance)
    assert total(chosen, "seconds") <= allowance.seconds
    assert total(chosen, "n_bytes") <= allowance.n_bytes
    assert total(chosen, "damage") >= total(free, "damage")


def test_more_room_than_needed_takes_the_best_types():
    chosen = allocate(made_up(5, 1), Allowance(10**9))
    assert {option.type for option in chosen.values()} == {"Q8_0"}


def test_a_type_that_is_larger_and_worse_is_never_taken():
    options = {
        "a": [
            TypeOption("Q4_0", 100, 2.0),
            TypeOption("Q4_1", 110, 3.0),
            TypeOption("Q8_0", 190, 1.0),
        ]
    }
    for n_bytes in range(100, 200, 10):
        assert allocate(options, Allowance(n_bytes))["a"].type != "Q4_1"


def test_limits_that_cannot_be_reached():
    options = {"a": [TypeOption("Q4_0", 5 << 20, 2.0, seconds=0.01)]}
    with pytest.raises(InputError, match=r"the tensors take 5.0 MiB"):
        allocate(options, Allowance(4 << 20))
    with pytest.raises(InputError, match="with the fastest types it is 100"):
        allocate(options, Allowance(6 << 20, seconds=0.001))
