"""The weight formats' referee against the `gguf` package, and activations against the contract."""

from __future__ import annotations

import gguf
import libgguf
import numpy as np
import pytest
import refmath
from make_blocks import DATA, numbers
from refmath import dequantise, quantise_activations

from edge.files.gguf import TENSOR_TYPES
from edge.files.tensor_types import TYPE_NUMBERS

SIZES = {kind.name: kind for kind in TENSOR_TYPES.values()}
BLOCKS = dict(np.load(DATA))
#: f16 scales worth a look: zeros, smallest and largest denormal, smallest normal, one, largest.
F16_SCALES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF]
#: Where in a block the f16 numbers are, if not at its start alone. IQ1_M has one in four nibbles.
F16_AT = {
    **dict.fromkeys(("F32", "BF16", "MXFP4", "NVFP4"), ()),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def n_halves(type_name: str) -> int:
    """How many f16 numbers a block has."""
    return len(F16_AT.get(type_name, (0,)))


def set_half(type_name: str, blocks: np.ndarray, i: int, values: np.ndarray) -> None:
    """Write the i-th f16 number of blocks (..., block_bytes); values: its bits, of shape (...)."""
    if type_name == "IQ1_M":
        for nibble in range(4):
            byte = blocks[..., 49 + 2 * nibble]
            byte[...] = byte & 15 | (values >> (4 * nibble) & 15) << 4
    else:
        at = F16_AT.get(type_name, (0,))[i]
        blocks[..., at], blocks[..., at + 1] = values & 255, values >> 8


def random_blocks(type_name: str, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes (n_blocks, block_bytes) of which no float is NaN or infinite."""
    rng, kind = np.random.default_rng(seed), SIZES[type_name]
    raw = rng.integers(0, 256, (n_blocks, kind.block_bytes), dtype=np.uint8)
    if type_name in ("F32", "BF16"):
        raw[:, -1] &= 0xBF  # exponents below 128
    elif type_name == "MXFP4":
        raw[:, 0] = np.minimum(raw[:, 0], 252)  # 12 * 2 ** (253 - 128) is too large for a float32
    for i in range(n_halves(type_name)):
        halves = rng.choice(F16_SCALES, n_blocks)
        any_finite = rng.integers(0, 0x7C00, n_blocks) | rng.integers(0, 2, n_blocks) << 15
        halves[n_blocks // 2 :] = any_finite[n_blocks // 2 :]
        set_half(type_name, raw, i, halves)
    return raw


def by_packages(type_name: str, raw: np.ndarray) -> np.ndarray:
    """Rows of blocks (n, bytes) as float32 (n, k), by the packages `gguf` or `libgguf`; Q2_0, which
    neither knows, bit by bit."""
    if type_name == "Q1_0":
        return libgguf.dequantize_rows(raw, TYPE_NUMBERS[type_name])
    if type_name.startswith("Q2_0"):
        blocks = raw.reshape(-1, SIZES[type_name].block_bytes)
        bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
        codes = bits[:, ::2] + 2 * bits[:, 1::2]
        d = blocks[:, :2].copy().view("<f2").astype(np.float32)
        return ((codes - 1) * d).reshape(len(raw), -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])


@pytest.mark.parametrize("type_name", refmath.TYPES)
def test_dequantise_equals_the_packages_bit_for_bit(type_name: str) -> None:
    kind, n, blocks_per_row = SIZES[type_name], 64, 16
    raw = random_blocks(type_name, n * blocks_per_row).reshape(n, -1)
    shape = (n, blocks_per_row * kind.block)
    ours = dequantise(type_name, raw.tobytes(), shape)
    theirs = by_packages(type_name, raw)
    assert ours.dtype == np.float32 and ours.shape == shape
    assert not np.isnan(ours).any()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.reshape(shape).view(np.uint32))


@pytest.mark.parametrize("type_name", refmath.TYPES)
def test_dequantise_takes_arrays_and_views(type_name: str) -> None:
    raw, shape = random_blocks(type_name, 6), (3, 2 * SIZES[type_name].block)
    want = dequantise(type_name, raw.tobytes(), shape)
    np.testing.assert_array_equal(dequantise(type_name, raw, shape), want)
    np.testing.assert_array_equal(dequantise(type_name, memoryview(raw.tobytes()), shape), want)


@pytest.mark.parametrize("type_name", sorted(BLOCKS))
def test_dequantise_of_blocks_that_a_quantiser_wrote(type_name: str) -> None:
    x, raw = numbers(), BLOCKS[type_name]
    ours = dequantise(type_name, raw.tobytes(), x.shape)
    theirs = by_packages(type_name, raw)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert np.corrcoef(ours.ravel(), x.ravel())[0, 1] > 0.6  # a mistake in both would show


@pytest.mark.parametrize("type_name", refmath.TYPES)
def test_random_blocks_are_finite_and_have_every_scale(type_name: str) -> None:
    raw = random_blocks(type_name, 200)
    values = dequantise(type_name, raw, (200, SIZES[type_name].block))
    assert np.isfinite(values).all()
    if n_halves(type_name) and type_name != "F16":
        zero = np.zeros(200, int)
        for i in range(n_halves(type_name)):
            set_half(type_name, raw, i, zero)
        assert not dequantise(type_name, raw, values.shape).any()


def test_activations_are_within_half_a_step() -> None:
    x = np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32)
    codes, scales = quantise_activations(x)
    assert codes.dtype == np.int8 and codes.shape == (7, 256)
    assert scales.dtype == np.float32 and scales.shape == (7, 8)
    error = np.abs(codes.reshape(7, 8, 32) * scales[..., None] - x.reshape(7, 8, 32))
    assert (error <= scales[..., None] * 0.5001).all()
    assert (np.abs(codes.reshape(7, 8, 32).astype(int)).max(axis=2) == 127).all()


def test_activation_ties_go_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    codes, scales = quantise_activations(x)
    assert codes[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -2]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize(
    "amax", [0.0, 1e-45, 2.0**-126, np.nextafter(np.float32(2.0**-100), np.float32(0))]
)
def test_tiny_groups_are_zero(amax: float) -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, :32], x[0, 40] = amax, -1
    codes, scales = quantise_activations(x)
    assert not codes[0, :32].any() and scales[0, 0] == 0
    assert codes[0, 40] == -127 and scales[0, 1] == np.float32(1) / np.float32(127)


@pytest.mark.parametrize("amax", [2.0**-100, 1.0, 3.4e38])
def test_activations_of_any_size_stay_finite(amax: float) -> None:
    x = np.linspace(-amax, amax, 32, dtype=np.float32)[None]
    codes, scales = quantise_activations(x)
    assert codes[0, 0] == -127 and codes[0, -1] == 127
    assert np.isfinite(scales).all() and (scales > 0).all()
