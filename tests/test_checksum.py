"""edge_checksum: the same for any number of threads, another for whatever happens to a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge.native import ffi, lib

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

CHUNK = 1 << 20
SIZES = [0, 1, 7, 63, 64, 65, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77]


@pytest.fixture(scope="module")
def threads() -> list[Any]:
    """One, two and five threads."""
    made = []
    for n in (1, 2, 5):
        out = ffi.new("edge_threads **")
        assert lib.edge_threads_new(n, ffi.NULL, 0, out, ffi.NULL) == lib.EDGE_OK
        made.append(ffi.gc(out[0], lib.edge_threads_free))
    return made


def checksum(threads: Any, data: np.ndarray) -> tuple[int, int]:
    """Both numbers."""
    pair = ffi.new("uint64_t[2]")
    source = ffi.from_buffer("uint8_t[]", data)
    assert lib.edge_checksum(threads, source, data.nbytes, pair) == lib.EDGE_OK
    return pair[0], pair[1]


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def mix(h: int, value: int) -> int:
    h = (h ^ value) * 0x9E3779B97F4A7C15 % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ h >> 33) * factor % 2**64
    return h ^ h >> 33


def referee(data: np.ndarray) -> tuple[int, int]:
    """The same, in a few lines: words of 32 bits in 8 lanes, two of each lane at a time."""
    h0, h1 = mix(3, data.size), mix(4, data.size)
    for start in range(0, data.size, CHUNK):
        chunk = data[start : start + CHUNK]
        words = np.pad(chunk, (0, -chunk.size % 64)).view("<u4").astype(np.uint64)
        lanes = words.reshape(-1, 8, 2).transpose(1, 0, 2).reshape(8, -1)
        a = np.cumsum(lanes, axis=1)
        s0, s1 = 1, 2
        for x, y in zip(a[:, -1].tolist(), a.sum(axis=1).tolist(), strict=True):
            s0, s1 = mix(mix(s0, x), y), mix(mix(s1, y), x)
        h0, h1 = mix(h0, s0), mix(h1, s1)
    return h0, h1


@pytest.mark.parametrize("n", SIZES)
def test_is_what_it_says_for_any_number_of_threads(threads: list[Any], n: int) -> None:
    data = noise(n)
    assert {checksum(each, data) for each in threads} == {referee(data)}


def test_largest_sums_do_not_wrap(threads: list[Any]) -> None:
    data = np.full(CHUNK, 255, np.uint8)
    assert checksum(threads[0], data) == referee(data)
    lane = 2**15 * (2**15 + 1) // 2 * (2**32 - 1)
    assert lane < 2**63


def test_data_anywhere_in_memory(threads: list[Any]) -> None:
    data = noise(CHUNK + 200)
    for shift in (1, 3, 8, 63):
        assert checksum(threads[1], data[shift : shift + CHUNK]) == checksum(
            threads[1], data[shift : shift + CHUNK].copy()
        )


def flip(data: np.ndarray, rng: np.random.Generator) -> None:
    data[rng.integers(data.size)] ^= 1 << rng.integers(8)


def swap(width: int) -> Callable[[np.ndarray, np.random.Generator], None]:
    def damage(data: np.ndarray, rng: np.random.Generator) -> None:
        items = data[: data.size // width * width].reshape(-1, width)
        i, j = rng.choice(len(items), 2, replace=False)
        items[[i, j]] = items[[j, i]]

    return damage


def zero(data: np.ndarray, rng: np.random.Generator) -> None:
    start = rng.integers(data.size)
    data[start : start + 4096] = 0


DAMAGE = {"flip": flip, "zero": zero, **{f"swap {w}": swap(w) for w in (4, 8, 64, 4096, CHUNK)}}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_changes_both_numbers(threads: list[Any], damage: Any) -> None:
    data, rng = noise(2 * CHUNK + 1000), np.random.default_rng(1)
    right = checksum(threads[1], data)
    for _ in range(30):
        copy = data.copy()
        damage(copy, rng)
        if not np.array_equal(copy, data):
            assert all(a != b for a, b in zip(checksum(threads[1], copy), right, strict=True))


def test_top_bits_that_trade_places(threads: list[Any]) -> None:
    """Sums that wrap would not see two words swapped that differ in their top bit alone."""
    data = np.zeros(CHUNK, np.uint8)
    data[3] = 0x80
    seen = set()
    for i in range(0, CHUNK, 64 * 512):
        seen.add(checksum(threads[0], np.roll(data, i)))
    assert len(seen) == CHUNK // (64 * 512)


@pytest.mark.parametrize("n", [CHUNK, CHUNK + 64, 100])
def test_length_counts(threads: list[Any], n: int) -> None:
    zeros = np.zeros(2 * CHUNK + 200, np.uint8)
    seen = {checksum(threads[1], zeros[:m]) for m in (n - 64, n - 1, n, n + 1, n + 64)}
    assert len(seen) == 5 - (n < 100)


def test_bad_arguments(threads: list[Any]) -> None:
    pair, data = ffi.new("uint64_t[2]"), ffi.new("uint8_t[8]")
    for arguments in (
        (ffi.NULL, data, 8, pair),
        (threads[0], ffi.NULL, 8, pair),
        (threads[0], data, -1, pair),
        (threads[0], data, 2**62, pair),
        (threads[0], data, 8, ffi.NULL),
    ):
        assert lib.edge_checksum(*arguments) == lib.EDGE_BAD_ARGUMENT
    assert lib.edge_checksum(threads[0], ffi.NULL, 0, pair) == lib.EDGE_OK
