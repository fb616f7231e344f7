"""The numpy referee for weight formats and activation quantisation.

Written from the formats' definitions, plainly, one function each; no speed wanted. A block holds
32 weights of one row. All arithmetic is float32, each operation rounded on its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 32

#: IQ4_NL's 16 values, finer around zero.
IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)

#: Groups whose largest magnitude is below this count as zero: 127 / amax stays finite.
TINY_AMAX = np.float32(2.0**-100)


def dequantise(type_name: str, data: bytes | memoryview | np.ndarray, shape: tuple) -> np.ndarray:
    """The bytes of a tensor -> float32 of its shape, (n, k) or (n,)."""
    raw = np.frombuffer(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data, "u1")
    return _DEQUANTISE[type_name](raw).reshape(shape)


def quantise_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x: (m, k) float32, finite, k a multiple of 32 -> codes (m, k) int8, scales (m, k / 32).

    x is about code * scale. Per group of 32: scale = amax / 127 and code = x * (127 / amax),
    rounded to the nearest integer, ties to even; a group with amax < 2 ** -100 is zero.
    """
    m, k = x.shape
    groups = x.astype(np.float32).reshape(m, k // BLOCK, BLOCK)
    amax = np.abs(groups).max(axis=2, keepdims=True)
    live = amax >= TINY_AMAX
    safe = np.where(live, amax, np.float32(1))
    codes = np.where(live, np.rint(groups * (np.float32(127) / safe)), np.float32(0))
    scales = np.where(live, amax / np.float32(127), np.float32(0))
    return codes.astype(np.int8).reshape(m, k), scales.reshape(m, k // BLOCK)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    """f16 scale | 16 bytes of codes. weight = scale * (code - 8)."""
    blocks = raw.reshape(-1, 18)
    return _f16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8))


def _iq4_nl(raw: np.ndarray) -> np.ndarray:
    """f16 scale | 16 bytes of codes. weight = scale * table[code]."""
    blocks = raw.reshape(-1, 18)
    return _f16(blocks[:, :2]) * IQ4_NL_VALUES[_nibbles(blocks[:, 2:])].astype(np.float32)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """f16 scale | f16 minimum | 16 bytes of codes. weight = scale * code + minimum."""
    blocks = raw.reshape(-1, 20)
    codes = _nibbles(blocks[:, 4:]).astype(np.float32)
    return _f16(blocks[:, :2]) * codes + _f16(blocks[:, 2:4])


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """f16 scale | 32 signed bytes. weight = scale * code."""
    blocks = raw.reshape(-1, 34)
    return _f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _bf16(raw: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """(blocks, 16) bytes -> (blocks, 32) codes: the low halves first, then the high ones."""
    return np.concatenate([codes & 15, codes >> 4], axis=1)


def _f16(two_bytes: np.ndarray) -> np.ndarray:
    """(blocks, 2) bytes -> (blocks, 1) float32."""
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)


_DEQUANTISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0,
    "IQ4_NL": _iq4_nl,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": _bf16,
    "F32": lambda raw: raw.view("<f4").copy(),
}

TYPES = tuple(_DEQUANTISE)
