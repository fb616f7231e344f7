"""The numpy referee for weight formats and activation quantisation.

Written from the formats' definitions, plainly, one function each; no speed wanted. A block holds 32
to 256 weights of one row. All arithmetic is float32, each operation rounded on its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from gguf import quants

GROUP = 32

#: IQ4_NL's 16 values, finer around zero.
IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)
#: Twice the 4-bit floats of MXFP4 and NVFP4.
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)

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
    groups = x.astype(np.float32).reshape(m, k // GROUP, GROUP)
    amax = np.abs(groups).max(axis=2, keepdims=True)
    live = amax >= TINY_AMAX
    safe = np.where(live, amax, np.float32(1))
    codes = np.where(live, np.rint(groups * (np.float32(127) / safe)), np.float32(0))
    scales = np.where(live, amax / np.float32(127), np.float32(0))
    return codes.astype(np.int8).reshape(m, k), scales.reshape(m, k // GROUP)


# ---- blocks with float scales --------------------------------------------------------------------


def _q4_0(raw: np.ndarray) -> np.ndarray:
    """f16 scale | 16 bytes of codes. weight = scale * (code - 8)."""
    d, q = _parts(raw, 2, 16)
    return _f16(d) * (_nibbles(q) - np.float32(8))


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """f16 scale | f16 minimum | 16 bytes of codes. weight = scale * code + minimum."""
    d, m, q = _parts(raw, 2, 2, 16)
    return _f16(d) * _nibbles(q) + _f16(m)


def _q5_0(raw: np.ndarray) -> np.ndarray:
    """f16 scale | fifth bits of the codes | 16 bytes of codes. weight = scale * (code - 16)."""
    d, high, q = _parts(raw, 2, 4, 16)
    return _f16(d) * (_nibbles(q) + np.float32(16) * _bits(high) - np.float32(16))


def _q5_1(raw: np.ndarray) -> np.ndarray:
    """f16 scale | f16 minimum | fifth bits | 16 bytes of codes. weight = scale * code + minimum."""
    d, m, high, q = _parts(raw, 2, 2, 4, 16)
    return _f16(d) * (_nibbles(q) + np.float32(16) * _bits(high)) + _f16(m)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """f16 scale | 32 signed bytes. weight = scale * code."""
    d, q = _parts(raw, 2, 32)
    return _f16(d) * q.view(np.int8).astype(np.float32)


def _iq4_nl(raw: np.ndarray) -> np.ndarray:
    """f16 scale | 16 bytes of codes. weight = scale * table[code]."""
    d, q = _parts(raw, 2, 16)
    return _f16(d) * IQ4_NL_VALUES[_planes(q, 4).reshape(-1, 32)].astype(np.float32)


def _mxfp4(raw: np.ndarray) -> np.ndarray:
    """u8 exponent | 16 bytes of codes. weight = 2 ** (exponent - 128) * table[code]."""
    e, q = _parts(raw, 1, 16)
    scale = np.ldexp(np.float32(1), e.astype(np.int32) - 128)
    return scale * MXFP4_VALUES[_planes(q, 4).reshape(-1, 32)].astype(np.float32)


def _nvfp4(raw: np.ndarray) -> np.ndarray:
    """4 scales | 32 bytes of codes, 8 for each 16 weights. weight = scale / 2 * table[code].

    A scale: 4 bits of exponent, 7 of it are 2 ** 0, 3 bits of mantissa; 127 is no number."""
    s, q = _parts(raw, 4, 32)
    exponent, mantissa = (s >> 3 & 15).astype(int), (s & 7).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 7)
    scale = np.where(exponent == 0, mantissa * np.float32(2.0**-9), normal)
    scale = np.where(s == 127, np.float32(0), scale) * np.float32(0.5)
    codes = _planes(q.reshape(-1, 4, 8), 4).reshape(-1, 4, 16)
    return (scale[..., None] * MXFP4_VALUES[codes].astype(np.float32)).reshape(-1, 64)


def _q1_0(raw: np.ndarray) -> np.ndarray:
    """f16 scale | 128 bits. weight = scale or -scale."""
    d, q = _parts(raw, 2, 16)
    return _f16(d) * (2 * _bits(q).astype(np.float32) - 1)


def _q2_0(raw: np.ndarray, block: int = 64) -> np.ndarray:
    """f16 scale | 2-bit codes. weight = scale * (code - 1)."""
    d, q = _parts(raw, 2, block // 4)
    return _f16(d) * (_fields(q, 2).astype(np.float32) - np.float32(1))


# ---- super-blocks of 256: K ----------------------------------------------------------------------


def _q2_k(raw: np.ndarray) -> np.ndarray:
    """16 x scale and minimum, 4 bits | 2-bit codes | f16 d | f16 dmin."""
    s, q, d, dmin = _parts(raw, 16, 64, 2, 2)
    codes = _planes(q.reshape(-1, 2, 32), 2)
    return _scaled(d, s & 15, codes, _f16(dmin) * (s >> 4).astype(np.float32))


def _q3_k(raw: np.ndarray) -> np.ndarray:
    """Third bits of the codes | their lower two | 16 scales of 6 bits | f16 d. Codes less 4."""
    high, q, s, d = _parts(raw, 32, 64, 12, 2)
    low, upper = _planes(s[:, :8], 4).reshape(-1, 16), _planes(s[:, 8:], 2).reshape(-1, 16)
    codes = _planes(q.reshape(-1, 2, 32), 2).reshape(-1, 256)
    codes = codes + 4 * _planes(high, 1).reshape(-1, 256)
    return _scaled(d, (low | upper << 4).astype(int) - 32, codes.astype(int) - 4)


def _q4_k(raw: np.ndarray) -> np.ndarray:
    """f16 d | f16 dmin | 8 x scale and minimum, 6 bits | 4-bit codes."""
    d, dmin, s, q = _parts(raw, 2, 2, 12, 128)
    scales, minima = _six_bits(s)
    return _scaled(d, scales, _planes(q.reshape(-1, 4, 32), 4), _f16(dmin) * minima)


def _q5_k(raw: np.ndarray) -> np.ndarray:
    """f16 d | f16 dmin | 8 x scale and minimum, 6 bits | fifth bits of codes | their lower four."""
    d, dmin, s, high, q = _parts(raw, 2, 2, 12, 32, 128)
    scales, minima = _six_bits(s)
    codes = _planes(q.reshape(-1, 4, 32), 4).reshape(-1, 256)
    codes = codes + 16 * _planes(high, 1).reshape(-1, 256)
    return _scaled(d, scales, codes, _f16(dmin) * minima)


def _six_bits(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, 12) bytes -> scales, minima (blocks, 8): four of each in the lower 6 bits of bytes
    0..7, then four of each in nibbles, scales low, under the upper 2 bits of bytes 0..7."""
    s, low = s[:, :8].reshape(-1, 2, 4), _planes(s[:, 8:], 4)
    both = np.concatenate([s & 63, low | s >> 6 << 4], axis=2)
    return both[:, 0], both[:, 1]


def _q6_k(raw: np.ndarray) -> np.ndarray:
    """Lower 4 bits of the codes | their upper 2 | 16 signed scales | f16 d. Codes less 32."""
    q, high, s, d = _parts(raw, 128, 64, 16, 2)
    codes = _planes(q.reshape(-1, 2, 64), 4).reshape(-1, 256)
    codes = codes + 16 * _planes(high.reshape(-1, 2, 32), 2).reshape(-1, 256)
    return _scaled(d, s.view(np.int8), codes.astype(int) - 32)


# ---- super-blocks of 256: ternary ----------------------------------------------------------------


def _tq1_0(raw: np.ndarray) -> np.ndarray:
    """48 bytes of 5 codes | 4 bytes of 4 codes | f16 d. A byte is a fraction of 256 whose digits to
    the base 3 are the codes; they go through 32, 16, then 4 bytes."""
    long, short, last, d = _parts(raw, 32, 16, 4, 2)
    digits = [
        (((part.astype(int) * 3**n) % 256) * 3) >> 8
        for part, count in ((long, 5), (short, 5), (last, 4))
        for n in range(count)
    ]
    return _f16(d) * (np.concatenate(digits, axis=1) - 1).astype(np.float32)


def _tq2_0(raw: np.ndarray) -> np.ndarray:
    """2-bit codes | f16 d. weight = d * (code - 1)."""
    q, d = _parts(raw, 64, 2)
    codes = _planes(q.reshape(-1, 2, 32), 2).reshape(-1, 256)
    return _f16(d) * (codes.astype(np.float32) - np.float32(1))


# ---- super-blocks of 256: IQ ---------------------------------------------------------------------


def _iq4_xs(raw: np.ndarray) -> np.ndarray:
    """f16 d | 8 x upper 2 bits of a scale | 8 x its lower 4 | 4-bit codes of a table."""
    d, upper, low, q = _parts(raw, 2, 2, 4, 128)
    scales = (_fields(low, 4) | _fields(upper, 2) << 4).astype(int) - 32
    return _scaled(d, scales, IQ4_NL_VALUES[_planes(q.reshape(-1, 8, 16), 4)])


def _iq1_s(raw: np.ndarray) -> np.ndarray:
    """f16 d | 32 x lower 8 bits of an index | 8 x u16: 4 x its upper 3, scale, sign of delta."""
    d, q, h = _parts(raw, 2, 32, 16)
    h = _u16(h)
    upper = np.stack([h >> (3 * i) & 7 for i in range(4)], axis=2).reshape(-1, 32)
    return _iq1(d, 2 * (h >> 12 & 7) + 1, q + 256 * upper, np.repeat(h >> 15, 4, axis=1))


def _iq1_m(raw: np.ndarray) -> np.ndarray:
    """32 x lower 8 bits of an index | 32 x its upper 3, sign of delta | 4 x u16: 4 x scale, 3 bits,
    a nibble of f16 d."""
    q, h, s = _parts(raw, 32, 16, 8)
    h, s = _fields(h, 4).astype(int), _u16(s)
    d = sum((s[:, i : i + 1] >> 12) << (4 * i) for i in range(4))
    scales = np.stack([s >> (3 * i) & 7 for i in range(4)], axis=2).reshape(-1, 16)
    return _iq1(d.astype("<u2").view(np.uint8), 2 * scales + 1, q + 256 * (h & 7), h >> 3)


def _iq1(d: np.ndarray, scales: np.ndarray, index: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """weight = d * scale * (grid + delta), delta 1/8 with a sign per 8 weights."""
    delta = np.where(negative, np.float32(-0.125), np.float32(0.125))
    return _scaled(d, scales, _grid("IQ1_S")[index] + delta[..., None])


def _iq2_xxs(raw: np.ndarray) -> np.ndarray:
    """f16 d | 8 x (4 indices | u32: 4 x 7 sign bits, scale)."""
    d, groups = _parts(raw, 2, 64)
    groups = groups.reshape(-1, 8, 8)
    signs, scales = _signs_and_scales(groups[..., 4:])
    values = _grid("IQ2_XXS")[groups[..., :4]].reshape(-1, 256)
    return _scaled(d, (scales + 0.5) * 0.25, values * signs)


def _iq2_xs(raw: np.ndarray) -> np.ndarray:
    """f16 d | 32 x u16: index of 9 bits, 7 sign bits | 16 scales of 4 bits."""
    d, x, s = _parts(raw, 2, 64, 8)
    x = _u16(x)
    values = _grid("IQ2_XS")[x & 511].reshape(-1, 256) * _even_signs(x >> 9)
    return _scaled(d, (_fields(s, 4) + 0.5) * 0.25, values)


def _iq2_s(raw: np.ndarray) -> np.ndarray:
    """f16 d | 32 x lower 8 bits of an index | signs | 32 x its upper 2 | 16 scales of 4 bits."""
    d, q, signs, h, s = _parts(raw, 2, 32, 32, 8, 8)
    values = _grid("IQ2_S")[q + 256 * _fields(h, 2).astype(int)].reshape(-1, 256)
    return _scaled(d, (_fields(s, 4) + 0.5) * 0.25, values * _plus_minus(_bits(signs)))


def _iq3_xxs(raw: np.ndarray) -> np.ndarray:
    """f16 d | 64 indices | 8 x u32: 4 x 7 sign bits, scale."""
    d, q, x = _parts(raw, 2, 64, 32)
    signs, scales = _signs_and_scales(x.reshape(-1, 8, 4))
    return _scaled(d, (scales + 0.5) * 0.5, _grid("IQ3_XXS")[q].reshape(-1, 256) * signs)


def _iq3_s(raw: np.ndarray) -> np.ndarray:
    """f16 d | 64 x lower 8 bits of an index | 64 x the ninth | signs | 8 scales of 4 bits."""
    d, q, h, signs, s = _parts(raw, 2, 64, 8, 32, 4)
    values = _grid("IQ3_S")[q + 256 * _bits(h).astype(int)].reshape(-1, 256)
    return _scaled(d, 2 * _fields(s, 4) + 1, values * _plus_minus(_bits(signs)))


@functools.cache
def _grid(type_name: str) -> np.ndarray:
    """(indices, 4 or 8) float32: weights without scale and sign."""
    kind = getattr(quants, type_name)
    kind.init_grid()
    return np.asarray(kind.grid, np.float32).reshape(kind.grid_shape)


def _signs_and_scales(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, 8, 4) bytes of u32 -> signs (blocks, 256), 1 or -1; scales (blocks, 8)."""
    x = np.ascontiguousarray(x).view("<u4")[..., 0]
    sevens = np.stack([x >> (7 * i) & 127 for i in range(4)], axis=2)
    return _even_signs(sevens.reshape(-1, 32)), x >> 28


def _even_signs(sevens: np.ndarray) -> np.ndarray:
    """(blocks, 32) sign codes of 7 bits -> (blocks, 256), 1 or -1: of 8, an even number is -1."""
    bits = sevens[..., None] >> np.arange(7) & 1
    bits = np.concatenate([bits, bits.sum(axis=2, keepdims=True) % 2], axis=2)
    return _plus_minus(bits.reshape(-1, 256))


def _plus_minus(bits: np.ndarray) -> np.ndarray:
    """0 -> 1, 1 -> -1."""
    return np.where(bits, np.float32(-1), np.float32(1))


# ---- parts ---------------------------------------------------------------------------------------


def _scaled(
    d: np.ndarray, scales: np.ndarray, values: np.ndarray, minima: np.ndarray | None = None
) -> np.ndarray:
    """weight = d * scale * value (- minimum).

    d: bytes of an f16 per block; scales, minima: (blocks, groups); values: 256 a block.
    """
    n, groups = scales.shape
    scale = _f16(d) * scales.astype(np.float32)
    out = scale[..., None] * values.reshape(n, groups, -1).astype(np.float32)
    return (out if minima is None else out - minima[..., None]).reshape(n, 256)


def _parts(raw: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Bytes -> per part of a block (blocks, size)."""
    blocks = raw.reshape(-1, sum(sizes))
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=1)


def _planes(data: np.ndarray, bits: int) -> np.ndarray:
    """(..., n) bytes -> (..., 8 / bits, n): the lowest bits of all bytes, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return data[..., None, :] >> shifts & np.uint8((1 << bits) - 1)


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """(blocks, n) bytes -> (blocks, 8 n / bits): the bits of the first byte, lowest first, then of
    the next."""
    return np.swapaxes(_planes(data, bits), 1, 2).reshape(len(data), -1)


def _bits(data: np.ndarray) -> np.ndarray:
    """(blocks, n) bytes -> (blocks, 8 n) bits."""
    return _fields(data, 1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """(blocks, 16) bytes -> (blocks, 32) float32: the low halves first, then the high ones."""
    return _planes(codes, 4).reshape(-1, 32).astype(np.float32)


def _u16(data: np.ndarray) -> np.ndarray:
    """(blocks, 2 n) bytes -> (blocks, n) integers."""
    return np.ascontiguousarray(data).view("<u2").astype(int)


def _f16(two_bytes: np.ndarray) -> np.ndarray:
    """(blocks, 2) bytes -> (blocks, 1) float32."""
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)


def _bf16(raw: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


_DEQUANTISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda raw: raw.view("<f4").copy(),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "Q2_0_128": functools.partial(_q2_0, block=128),
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_XS": _iq4_xs,
}

TYPES = tuple(_DEQUANTISE)
