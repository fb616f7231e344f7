"""The weights of a file as float32, a few rows at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.errors import InputError, ModelFileError
from edge.files.gguf import GGUF, Tensor
from edge.files.gguf_reader import shown
from edge.native import CData
from edge.quantizer.encode import decode
from edge.quantizer.types import FLOATS, n_bytes

__all__ = [
    "Floats",
    "RowSlice",
    "identity",
    "in_slice",
    "read_floats",
    "read_raw",
    "read_whole",
    "slices",
]

_SLICE = 1 << 20  # weights

Floats = NDArray[np.float32]


class RowSlice(NamedTuple):
    """Rows of one matrix of a tensor. matrix: its number in a stack, else 0; first: its first row
    of them; n: how many.
    """

    matrix: int
    first: int
    n: int


def slices(tensor: Tensor) -> Iterator[RowSlice]:
    """All rows of a tensor, in order."""
    *stack, n, k = (1, *tensor.shape) if len(tensor.shape) < 2 else tensor.shape
    step = max(1, _SLICE // k)
    for matrix in range(math.prod(stack)):
        for first in range(0, n, step):
            yield RowSlice(matrix, first, min(step, n - first))


def read_raw(tensor: Tensor, rows: RowSlice) -> memoryview:
    """The bytes of rows as the file has them.

    Raises ModelFileError for a float that is NaN or infinite.
    """
    data = _bytes(tensor, rows)
    if tensor.type in FLOATS:
        _require_finite(_from_floats(tensor.type, data), tensor, rows)
    return data


def read_floats(tensor: Tensor, rows: RowSlice, threads: CData) -> Floats:
    """Rows as float32, (n, k), a copy. Raises ModelFileError for a weight that is NaN or infinite,
    which says where it is.
    """
    data, k = _bytes(tensor, rows), tensor.shape[-1]
    blocks = np.frombuffer(data, np.uint8).reshape(rows.n, -1)
    try:
        return decode(tensor.type, blocks, k, threads)
    except InputError as e:
        if tensor.type in FLOATS:
            _require_finite(_from_floats(tensor.type, data).reshape(rows.n, k), tensor, rows)
        raise _error(tensor, f"{_place(tensor, rows)}, of the rows from here on: {e}") from None


def read_whole(tensor: Tensor, threads: CData) -> Floats:
    """All rows of a tensor, (n, k), those of a stack one after the other. Raises ModelFileError, as
    `read_floats`.
    """
    k = tensor.shape[-1]
    out = np.empty((math.prod(tensor.shape[:-1]), k), np.float32)
    at = 0
    for rows in slices(tensor):
        out[at : at + rows.n] = read_floats(tensor, rows, threads)
        at += rows.n
    return out


@contextlib.contextmanager
def in_slice(tensor: Tensor, rows: RowSlice) -> Iterator[None]:
    """Raise the InputError of a slice as a ModelFileError that says where it is."""
    try:
        yield
    except InputError as e:
        raise _error(tensor, f"{_place(tensor, rows)}, of the rows from here on: {e}") from None


def identity(gguf: GGUF) -> str:
    """What tells a source from another, or from an earlier one of the same path."""
    files = [(os.stat(path), bytes(h)) for path, h in zip(gguf.paths, gguf.headers(), strict=True)]
    facts = [(s.st_size, s.st_mtime_ns, hashlib.sha256(h).hexdigest()) for s, h in files]
    return json.dumps(facts)


def _bytes(tensor: Tensor, rows: RowSlice) -> memoryview:
    n = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    row = n_bytes(tensor.type, tensor.shape[-1:])
    start = (rows.matrix * n + rows.first) * row
    return tensor.data[start : start + rows.n * row]


def _from_floats(type_name: str, data: memoryview) -> Floats:
    if type_name == "BF16":
        wide: Floats = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return wide
    return np.frombuffer(data, "<f4" if type_name == "F32" else "<f2").astype(np.float32)


def _require_finite(x: Floats, tensor: Tensor, rows: RowSlice) -> None:
    finite = np.isfinite(x)
    if finite.all():
        return
    row, column = divmod(int(finite.ravel().argmin()), tensor.shape[-1])
    place = _place(tensor, rows._replace(first=rows.first + row))
    raise _error(tensor, f"{place}, column {column}: the weight is NaN or infinite")


def _place(tensor: Tensor, rows: RowSlice) -> str:
    return (f"matrix {rows.matrix}, " if len(tensor.shape) > 2 else "") + f"row {rows.first}"


def _error(tensor: Tensor, message: str) -> ModelFileError:
    return ModelFileError(message, path=tensor.path, field=f"tensor {shown(tensor.name)}")
