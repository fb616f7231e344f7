"""Weights of a GGUF file in the form of onnxruntime's MatMulNBits and GatherBlockQuantized.

A row is cut into blocks of 16 to 128 weights, and each block has a scale. A weight is an unsigned
integer q of 4 or 8 bits, and its value is

    scale * (q - 2^(bits - 1))                  or
    scale * (q - 2^(bits - 1)) + offset         if the type has minima, or evenly spaced values that
                                                fit 4 bits, but not around zero.

The values that a type's codes can have decide between the two. Weights keep the values that they
have in the file: they are not quantised again. Rows are read in slices, so that no matrix is ever
whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge import native
from edge.errors import UnsupportedError
from edge.files.gguf import TENSOR_TYPES, Tensor
from edge.native import ALIGNMENT, PANEL_ROWS, CData, ffi, lib
from edge.weights.packed import describe_weight, supported_types
from edge.weights.weights import pack_rows

__all__ = ["Blocks", "Form", "blocks", "floats", "form_of", "slices"]

#: Weights of a slice. A slice needs some 20 MiB of arrays.
_SLICE = 1 << 21
_BLOCK = {t.name: t.block for t in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class Form:
    """The form of a type's weights: bits of a weight, weights of a block, and whether blocks have
    an offset.
    """

    bits: int
    block: int
    has_offset: bool


class Blocks(NamedTuple):
    """Rows of a matrix.

    codes: uint8 (n, k / block, block * bits / 8); with 4 bits, byte i has weight 2 i in its low
    and weight 2 i + 1 in its high half. scales, offsets: float32 (n, k / block).
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None


class _Mapping(NamedTuple):
    """Stores a value v of the type as q = (v - low) / step + shift."""

    form: Form
    low: int
    step: int
    shift: int

    @property
    def bias(self) -> int:
        """v - step * (q - zero point), the same for every v."""
        return self.low + self.step * ((1 << self.form.bits - 1) - self.shift)


def form_of(type_name: str) -> Form | None:
    """The form of a tensor type; None for F32, F16, BF16. Raises UnsupportedError."""
    mapping = _mapping(type_name)
    return mapping.form if mapping else None


def slices(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each slice of a matrix."""
    n, k = tensor.shape
    n_rows = max(1, _SLICE // k // PANEL_ROWS) * PANEL_ROWS
    for first in range(0, n, n_rows):
        yield first, min(n_rows, n - first)


def blocks(tensor: Tensor, first: int, n: int) -> Blocks:
    """Rows first..first + n - 1 of a matrix of a type that has a form.

    Pages of the file stay in memory until `GGUF.forget`: call it after each slice.
    Raises ModelFileError for NaN or infinity in the rows, UnsupportedError.
    """
    mapping = _mapping(tensor.type)
    assert mapping is not None
    form, k = mapping.form, tensor.shape[-1]
    values = np.empty((n, k), np.int8)
    scales, mins = (np.empty((n, k // form.block), np.float32) for _ in range(2))
    part, _memory = _packed(tensor, first, n)
    codes = ffi.from_buffer("int8_t[]", values)
    native.check(lib.edge_weight_codes(part, 0, n, codes, _floats(scales), _floats(mins)))
    q = values.view(np.uint8)
    q -= np.uint8(mapping.low & 255)  # modulo 256
    q //= np.uint8(mapping.step)
    q += np.uint8(mapping.shift)
    offsets = None
    if form.has_offset:
        offsets = mins + scales * np.float32(mapping.bias)
        scales *= np.float32(mapping.step)
    if form.bits == 4:
        pairs = q.view("<u2")
        q = (pairs | pairs >> 4).astype(np.uint8)  # the low byte
    return Blocks(q.reshape(n, k // form.block, -1), scales, offsets)


def floats(tensor: Tensor, first: int = 0, n: int = 1) -> NDArray[np.float32]:
    """Rows first..first + n - 1 of a tensor, (n, k) float32, of any type that edge can run.

    Pages of the file stay in memory, see `blocks`. Raises ModelFileError for NaN or infinity in
    the rows, UnsupportedError.
    """
    out = np.empty((n, tensor.shape[-1]), np.float32)
    part, _memory = _packed(tensor, first, n)
    native.check(lib.edge_weight_unpack(part, 0, n, _floats(out)))
    return out


@cache
def _mapping(type_name: str) -> _Mapping | None:
    part = _described(type_name, 1, _BLOCK.get(type_name, 1))
    values, has_min = ffi.new("int8_t[256]"), ffi.new("int32_t *")
    n = lib.edge_weight_values(part, values, has_min)
    if n == 0:
        return None
    distinct = sorted({values[i] for i in range(n)})
    return _least(distinct, lib.edge_layout_group(part.layout), bool(has_min[0]))


def _least(values: Sequence[int], block: int, has_min: bool) -> _Mapping:
    """The mapping with the fewest bits, and if possible without an offset.

    values: the type's int8 values, sorted.
    """
    low, high = values[0], values[-1]
    step = math.gcd(*(v - low for v in values))
    levels = (high - low) // step + 1
    for bits in (4, 8):
        zero = 1 << bits - 1
        if not has_min and -zero <= low and high < zero:
            return _Mapping(Form(bits, block, has_offset=False), -zero, 1, 0)
        if levels <= 2 * zero:
            # around the zero point: the error of quantised activations grows with q - zero
            return _Mapping(Form(bits, block, has_offset=True), low, step, zero - levels // 2)
    raise AssertionError("int8 values fit 8 bits")


def _described(type_name: str, n: int, k: int) -> CData:
    """An edge_weight of n rows and k columns, without data."""
    if type_name not in supported_types():
        raise UnsupportedError(
            f"weights of type {type_name} cannot be read",
            what=type_name,
            supported=supported_types(),
        )
    part = ffi.new("edge_weight *")
    describe_weight(type_name, (n, k), "fast", part)
    return part


def _packed(tensor: Tensor, first: int, n: int) -> tuple[CData, NDArray[np.uint8]]:
    """An edge_weight with rows of a tensor, and its memory, which must outlive it."""
    part = _described(tensor.type, n, tensor.shape[-1])
    memory = np.empty(part.n_bytes + ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % ALIGNMENT :]
    part.data = ffi.from_buffer("uint8_t[]", memory)
    pack_rows(tensor, part, first, _threads())
    return part, memory


def _floats(array: NDArray[np.float32]) -> CData:
    return ffi.from_buffer("float[]", array)


@cache
def _threads() -> CData:
    return native.new_threads(1)
