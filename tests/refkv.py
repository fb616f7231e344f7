"""The numpy referee for pages of the KV cache, written from the drawing in native/kv.h."""

from __future__ import annotations

import numpy as np
import refmath

POSITIONS, PANEL, GROUP = 64, 16, 32


def keys_and_values(page: np.ndarray, kv: str, head_dim: int) -> np.ndarray:
    """One layer and head of a page, its bytes -> (3, 64, head_dim): of keys what codes hold and
    what the base adds, and values; turned back, where they are turned."""
    keys, rest = _KEYS[kv](page, head_dim)
    values, rest = _VALUES[kv](rest, head_dim)
    if kv != "q4":
        return np.array([keys, 0 * keys, values])
    missed, rest = _halves(rest, POSITIONS)
    scales, rest = _halves(rest, 2 * head_dim // GROUP)
    codes = rest[: 2 * head_dim].view(np.int8).reshape(2, head_dim)
    mean, direction = codes * np.repeat(scales.reshape(2, -1), GROUP, axis=1)
    return np.array([turn(keys), turn(mean + missed[:, None] * direction), turn(values)])


def turn(x: np.ndarray) -> np.ndarray:
    """Rows times the orthonormal Hadamard matrix of the largest power of two that divides."""
    n = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, n) @ (matrix / np.sqrt(n))).reshape(x.shape)


def _halves(data: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n float16 numbers as float64, and the bytes behind them."""
    return data[: 2 * n].view(np.float16).astype(np.float64), data[2 * n :]


def _f16_keys(data: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    numbers, rest = _halves(data, POSITIONS * head_dim)
    return numbers.reshape(-1, head_dim, PANEL).transpose(0, 2, 1).reshape(-1, head_dim), rest


def _f16_values(data: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    numbers, rest = _halves(data, POSITIONS * head_dim)
    return numbers.reshape(POSITIONS, head_dim), rest


def _code_keys(data: np.ndarray, head_dim: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Panels of pairs of groups: scales [2][16], then a group's codes in steps of 4 k."""
    pairs, code_bytes = -(-head_dim // (2 * GROUP)), 64 * bits
    size = 2 * (2 * PANEL + code_bytes)
    blocks = data[: POSITIONS // PANEL * pairs * size].reshape(-1, pairs, size)
    scales = np.ascontiguousarray(blocks[..., : 4 * PANEL]).view(np.float16).astype(np.float64)
    scales = scales.reshape(-1, pairs, 2, PANEL)
    codes = blocks[..., 4 * PANEL :].reshape(-1, pairs, 2, code_bytes // 64, 64)
    if bits == 8:
        values = codes.view(np.int8).astype(np.float64)
    else:  # two steps in a byte, through a table
        steps = np.stack([codes & 15, codes >> 4], axis=4)
        values = refmath.IQ4_NL_VALUES[steps.reshape(*codes.shape[:3], 8, 64)].astype(np.float64)
    # (panel, pair, group, half, step of the half, row, t) -> k = 16 half + 4 t + step
    values = values.reshape(-1, pairs, 2, 2, 4, PANEL, 4) * scales[:, :, :, None, None, :, None]
    rows = values.transpose(0, 5, 1, 2, 3, 6, 4).reshape(POSITIONS, -1)[:, :head_dim]
    return rows, data[blocks.size :]


def _code_values(
    data: np.ndarray, head_dim: int, bits: int, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per group: scales [64], then 32 elements of all positions after the other."""
    out = []
    for _ in range(head_dim // group):
        scales, data = _halves(data, POSITIONS)
        codes = data[: POSITIONS * group * bits // 8].reshape(-1, POSITIONS, GROUP * bits // 8)
        data = data[codes.size :]
        if bits == 8:
            values = codes.view(np.int8).astype(np.float64)
        else:
            values = np.concatenate([codes & 15, codes >> 4], axis=2) - 8.0
        out.append(values.transpose(1, 0, 2).reshape(POSITIONS, group) * scales[:, None])
    return np.concatenate(out, axis=1), data


_KEYS = {
    "f16": _f16_keys,
    "q8": lambda data, head_dim: _code_keys(data, head_dim, 8),
    "q4": lambda data, head_dim: _code_keys(data, head_dim, 4),
}
_VALUES = {
    "f16": _f16_values,
    "q8": lambda data, head_dim: _code_values(data, head_dim, 8, GROUP),
    "q4": lambda data, head_dim: _code_values(data, head_dim, 4, head_dim & -head_dim),
}
