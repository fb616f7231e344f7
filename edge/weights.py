"""Weights in memory: every tensor of a graph packed into panels, in one aligned block."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge import native
from edge.errors import MemoryBudgetError, ModelFileError, UnsupportedError
from edge.gguf import GGUF, TENSOR_TYPES, Tensor
from edge.memory import available, show
from edge.native import ffi, lib

__all__ = ["Weights"]

_ALIGN = 64
_NUMBERS = {t.name: number for number, t in TENSOR_TYPES.items()}


class Weights:
    """The packed weights of a model. names: without `.weight`; vectors stay float32.

    Layouts and n_bytes are known at once, from the header alone; `pack` takes the memory.
    Raises UnsupportedError for a tensor type without a layout.
    """

    def __init__(self, gguf: GGUF, names: Iterable[str]) -> None:
        self._gguf = gguf
        self.names = list(names)
        self.index = {name: i for i, name in enumerate(self.names)}
        #: The edge_weight of each name, for the plan.
        self.entries = ffi.new("edge_weight[]", max(1, len(self.names)))
        self._offsets: list[int] = []
        self._block: mmap.mmap | None = None
        self.n_bytes = 0
        for name, entry in zip(self.names, self.entries, strict=True):
            self._describe(self._tensor(name), entry)
            self._offsets.append(self.n_bytes)
            self.n_bytes += -(-entry.n_bytes // _ALIGN) * _ALIGN

    def layout(self, name: str) -> str:
        """The name of a weight's layout, "vector" for a vector."""
        layout = self.entries[self.index[name]].layout
        if layout == lib.EDGE_LAYOUT_VECTOR:
            return "vector"
        return native.text(lib.edge_layout_name(layout))

    def takes_q8(self, name: str) -> bool:
        """Whether a matrix multiplies quantised activations, or float32 ones."""
        return bool(lib.edge_layout_takes_q8(self.entries[self.index[name]].layout))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A copy of a packed vector, (k,)."""
        entry = self.entries[self.index[name]]
        return np.frombuffer(ffi.buffer(entry.data, entry.n_bytes), np.float32).copy()

    def pack(self, pool: Any, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every tensor and pack it. progress(bytes done, bytes in all), after each tensor.

        Raises ModelFileError for NaN or infinity in a tensor, MemoryBudgetError.
        """
        try:
            self._block = _anonymous(max(1, self.n_bytes))
        except (OSError, MemoryError) as error:
            raise MemoryBudgetError(
                f"no memory for {show(self.n_bytes)} of weights",
                needed=self.n_bytes,
                budget=available() or 0,
                parts={"weights": self.n_bytes},
            ) from error
        self._base = ffi.from_buffer("uint8_t[]", self._block)
        done = 0
        for name, entry, offset in zip(self.names, self.entries, self._offsets, strict=True):
            entry.data = self._base + offset
            tensor = self._tensor(name)
            self._pack(tensor, entry, pool)
            tensor.forget()  # packed weights and one tensor are all that is in memory
            done += entry.n_bytes
            if progress:
                progress(done, self.n_bytes)

    def close(self) -> None:
        """Give the memory back. No plan may use the weights any more."""
        if self._block is not None:
            ffi.release(self._base)
            self._block.close()
            self._block = None

    def _tensor(self, name: str) -> Tensor:
        return self._gguf.tensors[f"{name}.weight"]

    def _describe(self, tensor: Tensor, entry: Any) -> None:
        n, k = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
        if tensor.type not in supported_types():
            raise UnsupportedError(
                f"{tensor.path}: tensor {tensor.name} is {tensor.type}, which has no layout yet",
                what=tensor.type,
                supported=supported_types(),
            )
        error = ffi.new("edge_error *")
        number, where = _NUMBERS[tensor.type], ffi.addressof(entry)
        native.check(
            lib.edge_weight_describe(number, lib.EDGE_FORM_FAST, n, k, where, error), error
        )
        if len(tensor.shape) == 1:
            entry.layout, entry.n_bytes = lib.EDGE_LAYOUT_VECTOR, 4 * k

    def _pack(self, tensor: Tensor, entry: Any, pool: Any) -> None:
        if entry.layout == lib.EDGE_LAYOUT_VECTOR:
            return self._pack_vector(tensor, entry, pool)
        error = ffi.new("edge_error *")
        src = ffi.from_buffer("uint8_t[]", tensor.data)
        type_number = _NUMBERS[tensor.type]
        status = lib.edge_weight_pack(
            pool, type_number, ffi.addressof(entry), src, tensor.n_bytes, error
        )
        ffi.release(src)
        if status == lib.EDGE_BAD_DATA:
            raise ModelFileError(
                f"row {error.row}, column {error.column} is NaN or infinite: the file is damaged",
                path=tensor.path,
                offset=tensor.offset,
                field=f"tensor {tensor.name}",
            )
        native.check(status, error)

    def _pack_vector(self, tensor: Tensor, entry: Any, pool: Any) -> None:
        """Through a panel of one row, so that every type that matrices may have serves."""
        row = ffi.new("edge_weight *")
        native.check(
            lib.edge_weight_describe(
                _NUMBERS[tensor.type], lib.EDGE_FORM_FAST, 1, entry.k, row, ffi.NULL
            )
        )
        panel = np.empty(row.n_bytes + _ALIGN, np.uint8)
        panel = panel[-panel.ctypes.data % _ALIGN :]
        row.data = ffi.from_buffer("uint8_t[]", panel)
        self._pack(tensor, row[0], pool)
        native.check(lib.edge_weight_unpack(row, 0, 1, ffi.cast("float *", entry.data)))


def _anonymous(n_bytes: int) -> mmap.mmap:
    """Zeroed memory that is given back on close; in huge pages where the system has them.

    Private, because shared memory gets no huge pages. Raises OSError, MemoryError.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, n_bytes)
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


@cache
def supported_types() -> tuple[str, ...]:
    """The tensor types that can be packed, in GGUF's spelling."""
    weight = ffi.new("edge_weight *")
    return tuple(
        t.name
        for number, t in TENSOR_TYPES.items()
        if lib.edge_weight_describe(number, lib.EDGE_FORM_FAST, 1, t.block, weight, ffi.NULL)
        == lib.EDGE_OK
    )
