"""Encoders: the bits of libgguf, whatever the weights are; and errors instead of damaged blocks."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import refmath
from make_encoded import CASES, KEPT, KINDS, importance, kept, reference, weights
from native_plan import TYPES, shared_threads
from test_refmath import SIZES, random_blocks

from edge.errors import InputError, UnsupportedError
from edge.quantizer.encode import ENCODED_TYPES, IMPORTANCE_TYPES, Encoder, decode

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

encoder = functools.cache(Encoder)
all_types = pytest.mark.parametrize("type_name", ENCODED_TYPES)
#: Types that take any finite float32.
UNBOUNDED = ("F32", "MXFP4")


def expected(type_name: str, kind: str, case: str) -> np.ndarray:
    """The blocks of libgguf, (3, bytes of a row); of Q2_0, which it lacks, by the rule of ggml."""
    if type_name in KEPT:
        return kept()[f"{type_name} {kind} {case}"]
    x = weights(case, type_name)
    if not type_name.startswith("Q2_0"):
        return reference(type_name, x, importance(kind, x.shape[1]))
    rows = x.reshape(-1, SIZES[type_name].block)
    scale = np.abs(rows).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        shares = np.where(scale < 2.0**-128, 0, rows * (np.float32(1) / scale))
    codes = (np.trunc(shares + np.copysign(np.float32(0.49999997), shares)) + 1).astype(np.uint8)
    packed = (codes.reshape(len(rows), -1, 4) << np.uint8([0, 2, 4, 6])).sum(axis=2, dtype=np.uint8)
    halves = scale.astype(np.float16).view(np.uint8)
    return np.concatenate([halves, packed], axis=1).reshape(len(x), -1)


@all_types
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_libgguf(type_name: str, kind: str) -> None:
    if kind == "none" and type_name in IMPORTANCE_TYPES:
        pytest.skip("needs an importance")
    for case in CASES:
        if (type_name, case) == ("MXFP4", "denormal"):
            continue  # see below
        x = weights(case, type_name)
        got = encoder(type_name).encode(x, importance(kind, x.shape[1]), shared_threads())
        np.testing.assert_array_equal(got, expected(type_name, kind, case), err_msg=case)


def test_magnitudes_near_powers_of_two_as_mxfp4() -> None:
    """The logarithm that the scale comes from is rounded to the next power near it."""
    powers = np.float32(2) ** np.arange(-120, 128, dtype=np.float32)
    near = powers.view(np.int32)[:, None] - np.arange(-1, 100, dtype=np.int32)
    x = np.repeat(near.view(np.float32).reshape(-1, 1), 32, axis=1)
    got = encoder("MXFP4").encode(x, None, shared_threads())
    np.testing.assert_array_equal(got, reference("MXFP4", x, None))


def test_denormals_as_mxfp4_take_the_smallest_scale() -> None:
    """libgguf converts a negative float to an unsigned byte there, which C leaves open."""
    x = weights("denormal", "MXFP4")
    blocks = encoder("MXFP4").encode(x, None, shared_threads())
    assert (blocks[:, ::17] == 0).all()
    np.testing.assert_allclose(decode("MXFP4", blocks, 64, shared_threads()), x, atol=2.0**-129)


@all_types
def test_any_finite_weights(type_name: str) -> None:
    """Random bits: blocks that can be read, or an error; the sanitizers see all of it."""
    block = SIZES[type_name].block
    rng = np.random.default_rng(7)
    x = rng.integers(0, 1 << 32, (max(40, 4096 // block), block), np.uint32).view(np.float32)
    x[~np.isfinite(x)] = 3e38
    x[::2] *= np.float32(2.0**-100)
    counts = rng.integers(0, 0x57800000, block, np.uint32).view(np.float32)
    for count in (counts, np.ones(block, np.float32)):
        with contextlib.suppress(InputError):
            encoder(type_name).encode(x, count, shared_threads())


@all_types
def test_any_number_of_threads_writes_the_same(type_name: str) -> None:
    x = np.random.default_rng(3).normal(size=(13, 256)).astype(np.float32)
    counts = importance("positive", 256)
    first, *others = (encoder(type_name).encode(x, counts, shared_threads(n)) for n in (1, 2, 3))
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_decode_is_the_reference(type_name: str, threads: int) -> None:
    k = 3 * SIZES[type_name].block
    raw = random_blocks(type_name, 17 * 3).reshape(17, -1)
    got = decode(type_name, raw, k, shared_threads(threads))
    want = refmath.dequantise(type_name, raw, (17, k))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@all_types
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_no_number(type_name: str, value: float) -> None:
    x, counts = np.ones((9, 512), np.float32), np.ones(512, np.float32)
    x[7, 300] = x[8, 2] = value
    with pytest.raises(InputError, match=f"row 7, column 300 is {value}"):
        encoder(type_name).encode(x, counts, shared_threads(2))


@pytest.mark.parametrize("type_name", [t for t in ENCODED_TYPES if t not in UNBOUNDED])
@pytest.mark.parametrize("value", [3e38, 4e8])
def test_weight_beyond_the_range(type_name: str, value: float) -> None:
    x, counts = np.ones((2, 512), np.float32), np.ones(512, np.float32)
    x[1, 300] = value if type_name != "BF16" else np.finfo(np.float32).max
    words = rf"{type_name} cannot hold the weights in row 1 from column \d+ on: they go up to "
    with pytest.raises(InputError, match=words):
        encoder(type_name).encode(x, counts, shared_threads())


@pytest.mark.parametrize(
    "counts, words",
    [
        (np.zeros(64), "importance of all 64 columns is 0: it would erase"),
        (np.full(64, -1.0), "importance of column 0 is -1: it must be at least 0"),
        (np.full(64, 3e38), r"importance of column 0 is 3e\+38"),
        (np.where(np.arange(64) == 5, np.nan, 1), "importance of column 5 is nan"),
        (np.ones(32), r"importance of shape \(32,\) for rows of 64"),
    ],
)
def test_importance_that_is_none(counts: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encoder("Q4_0").encode(np.ones((1, 64), np.float32), counts, shared_threads())


@pytest.mark.parametrize("type_name", sorted(IMPORTANCE_TYPES))
def test_missing_importance(type_name: str) -> None:
    x = np.ones((1, 256), np.float32)
    with pytest.raises(InputError, match=f"{type_name} needs an importance of its 256 columns"):
        encoder(type_name).encode(x, None, shared_threads())


@pytest.mark.parametrize("shape", [(2, 33), (64,), (0, 32), (2, 0)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"a row of|holds no rows"):
        encoder("Q4_0").encode(np.ones(shape, np.float32), None, shared_threads())


def test_types_that_are_not_encoded() -> None:
    for type_name in ("Q8_1", "I32", "Q9_9"):
        with pytest.raises(UnsupportedError, match=f"'{type_name}' cannot be encoded"):
            Encoder(type_name)
        with pytest.raises(UnsupportedError, match=f"'{type_name}' cannot be decoded"):
            decode(type_name, np.zeros((1, 36), np.uint8), 32, shared_threads())


def test_blocks_that_cannot_be_decoded() -> None:
    with pytest.raises(InputError, match="rows of 36 bytes are no rows of 32 weights of Q4_0"):
        decode("Q4_0", np.zeros((1, 36), np.uint8), 32, shared_threads())
    damaged = np.full((2, 36), 0x7F, np.uint8)
    damaged[0] = 0
    with pytest.raises(InputError, match="Q4_0 weight in row 1, column 0 is NaN or infinite"):
        decode("Q4_0", damaged, 64, shared_threads())
