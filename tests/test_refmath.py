"""The weight formats' referee against the `gguf` package, and activations against the contract."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import refmath
from refmath import dequantise, quantise_activations

from edge.gguf import TENSOR_TYPES

SIZES = {kind.name: kind for kind in TENSOR_TYPES.values()}
#: f16 scales worth a look: zeros, smallest and largest denormal, smallest normal, one, largest.
F16_SCALES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF]


def random_blocks(type_name: str, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes (n_blocks, block_bytes) of which no float is NaN or infinite."""
    rng, kind = np.random.default_rng(seed), SIZES[type_name]
    raw = rng.integers(0, 256, (n_blocks, kind.block_bytes), dtype=np.uint8)
    if type_name in ("F32", "BF16"):
        raw[:, -1] &= 0xBF  # exponents below 128
    else:
        n_floats = {"Q4_1": 2}.get(type_name, 1)
        halves = rng.choice(F16_SCALES, (n_blocks, n_floats)).astype("<u2")
        any_finite = rng.integers(0, 0x7C00, halves.shape) | rng.integers(0, 2, halves.shape) << 15
        halves[n_blocks // 2 :] = any_finite[n_blocks // 2 :]
        raw[:, : 2 * n_floats] = halves.view(np.uint8)
    return raw


@pytest.mark.parametrize("type_name", refmath.TYPES)
def test_dequantise_equals_gguf_package_bit_for_bit(type_name: str) -> None:
    kind, n, blocks_per_row = SIZES[type_name], 64, 96
    raw = random_blocks(type_name, n * blocks_per_row).reshape(n, -1)
    shape = (n, blocks_per_row * kind.block)
    ours = dequantise(type_name, raw.tobytes(), shape)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    assert ours.dtype == np.float32 and ours.shape == shape
    assert not np.isnan(ours).any()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.reshape(shape).view(np.uint32))


@pytest.mark.parametrize("type_name", refmath.TYPES)
def test_dequantise_takes_arrays_and_views(type_name: str) -> None:
    raw, shape = random_blocks(type_name, 6), (3, 2 * SIZES[type_name].block)
    want = dequantise(type_name, raw.tobytes(), shape)
    np.testing.assert_array_equal(dequantise(type_name, raw, shape), want)
    np.testing.assert_array_equal(dequantise(type_name, memoryview(raw.tobytes()), shape), want)


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


@pytest.mark.parametrize("amax", [0.0, 1e-45, 2.0**-126, np.nextafter(np.float32(2.0**-100), 0)])
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
