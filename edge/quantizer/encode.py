"""Rows of weights as blocks of a GGUF type, and back.

encoder = Encoder("Q4_0")
blocks = encoder.encode(x, importance, threads)
decode("Q4_0", blocks, x.shape[1], threads)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge import native
from edge.errors import InputError, UnsupportedError
from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from edge.native import CData, ffi, lib
from edge.weights.weights import supported_types

__all__ = ["ENCODED_TYPES", "IMPORTANCE_TYPES", "Encoder", "decode", "row_bytes"]

#: The types that can be encoded, in GGUF's spelling.
ENCODED_TYPES = tuple(t.name for number, t in TENSOR_TYPES.items() if lib.edge_can_encode(number))

#: Those of them that are encoded with an importance alone.
IMPORTANCE_TYPES = frozenset(t for t in ENCODED_TYPES if lib.edge_needs_importance(TYPE_NUMBERS[t]))


def row_bytes(type_name: str, k: int) -> int:
    """Bytes of a row of k weights in blocks of this type, which ggml stores.

    Raises InputError for a row that is no whole number of blocks.
    """
    kind = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
    if k < 1 or k % kind.block != 0:
        raise InputError(f"a row of {k} weights: {type_name} has blocks of {kind.block}")
    return k // kind.block * kind.block_bytes


class Encoder:
    """Rounds rows of weights to blocks of one type, to the bits of ggml's quantisers.

    Some types need a second and some megabytes for tables: an encoder serves any number of tensors,
    also at the same time when each call has threads of its own.
    Raises UnsupportedError for a type that cannot be encoded, MemoryBudgetError.
    """

    def __init__(self, type_name: str) -> None:
        if type_name not in ENCODED_TYPES:
            raise UnsupportedError(
                f"the tensor type {type_name!r} cannot be encoded",
                what=type_name,
                supported=ENCODED_TYPES,
            )
        self.type_name = type_name
        error, encoder = ffi.new("edge_error *"), ffi.new("edge_encoder **")
        native.check(lib.edge_encoder_new(TYPE_NUMBERS[type_name], encoder, error), error)
        #: For calls of the native library.
        self.handle = ffi.gc(encoder[0], lib.edge_encoder_free)

    def encode(
        self, x: NDArray[np.float32], importance: NDArray[np.float32] | None, threads: CData
    ) -> NDArray[np.uint8]:
        """The blocks of x, (n, k): (n, bytes of a row).

        importance, (k,): what the square of an error counts in each column; None: not known.
        threads: of `edge.native.new_threads`.
        Raises InputError for another shape, a weight that is NaN, infinite or beyond the range of
        the type, an importance that is missing, NaN, negative, 2^48 or more, or 0 everywhere.
        """
        x = np.ascontiguousarray(x, np.float32)
        n, k = _shape(x)
        blocks = np.empty((n, row_bytes(self.type_name, k)), np.uint8)
        counts = self._checked(importance, k)
        error = ffi.new("edge_error *")
        status = lib.edge_encode(
            threads,
            self.handle,
            ffi.from_buffer("float[]", x),
            n,
            k,
            ffi.NULL if counts is None else ffi.from_buffer("float[]", counts),
            ffi.from_buffer("uint8_t[]", blocks),
            blocks.nbytes,
            error,
        )
        if status == lib.EDGE_BAD_DATA:
            raise InputError(self._reason(x, int(error.row), int(error.column)))
        native.check(status, error)
        return blocks

    def _checked(
        self, importance: NDArray[np.float32] | None, k: int
    ) -> NDArray[np.float32] | None:
        if importance is None:
            if self.type_name in IMPORTANCE_TYPES:
                raise InputError(f"{self.type_name} needs an importance of its {k} columns")
            return None
        counts = np.ascontiguousarray(importance, np.float32)
        if counts.shape != (k,):
            raise InputError(f"an importance of shape {counts.shape} for rows of {k} weights")
        bad = np.flatnonzero(~((counts >= 0) & (counts < 2.0**48)))
        if bad.size:
            raise InputError(
                f"the importance of column {bad[0]} is {counts[bad[0]]:.3g}: "
                "it must be at least 0 and below 2^48"
            )
        if not counts.any():
            raise InputError(f"the importance of all {k} columns is 0: it would erase all weights")
        return counts

    def _reason(self, x: NDArray[np.float32], row: int, column: int) -> str:
        """Why the weight at this place, or the block that begins there, cannot be encoded."""
        if not np.isfinite(x[row, column]):
            return f"the weight in row {row}, column {column} is {x[row, column]}"
        block = TENSOR_TYPES[TYPE_NUMBERS[self.type_name]].block
        largest = np.abs(x[row, column : column + block]).max()
        return (
            f"{self.type_name} cannot hold the weights in row {row} from column {column} on: "
            f"they go up to {largest:.3g}"
        )


def decode(
    type_name: str, blocks: NDArray[np.uint8], k: int, threads: CData
) -> NDArray[np.float32]:
    """The weights of blocks, (n, bytes of a row of k weights): (n, k), as the engine reads them.

    threads: of `edge.native.new_threads`.
    Raises UnsupportedError for a type that edge does not read, InputError for another shape and for
    blocks that hold NaN or infinity.
    """
    if type_name not in supported_types():
        raise UnsupportedError(
            f"the tensor type {type_name!r} cannot be decoded",
            what=type_name,
            supported=supported_types(),
        )
    blocks = np.ascontiguousarray(blocks, np.uint8)
    n, n_bytes = _shape(blocks)
    if n_bytes != row_bytes(type_name, k):
        raise InputError(f"rows of {n_bytes} bytes are no rows of {k} weights of {type_name}")
    x = np.empty((n, k), np.float32)
    error = ffi.new("edge_error *")
    status = lib.edge_decode(
        threads,
        TYPE_NUMBERS[type_name],
        ffi.from_buffer("uint8_t[]", blocks),
        blocks.nbytes,
        n,
        k,
        ffi.from_buffer("float[]", x),
        error,
    )
    if status == lib.EDGE_BAD_DATA:
        raise InputError(
            f"the {type_name} weight in row {error.row}, column {error.column} is NaN or infinite"
        )
    native.check(status, error)
    return x


def _shape(rows: NDArray[Any]) -> tuple[int, int]:
    if rows.ndim != 2 or len(rows) == 0:
        raise InputError(f"an array of shape {rows.shape} holds no rows")
    return rows.shape[0], rows.shape[1]
