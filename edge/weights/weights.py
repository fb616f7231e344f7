"""Weights in memory: every tensor of a graph as panels, packed here or mapped from a packed file.

Types with a grid can be packed in two forms, see edge_form. `fit` chooses the form of each tensor
from the header alone. Then the bytes are known, and `load`, `pieces` or `use` may follow.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge import native
from edge.device.memory import anonymous, available, resident_of
from edge.errors import InputError, MemoryBudgetError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF, Tensor
from edge.files.tensor_types import TYPE_NUMBERS
from edge.loading import LAYOUTS, Layout
from edge.native import ALIGNMENT, PANEL_ROWS, CData, ffi, lib
from edge.progress import Progress
from edge.sizes import show
from edge.weights.packed import (
    FORMS,
    Item,
    PackedFile,
    describe_weight,
    packed_shape,
    padded,
    supported_types,
)

__all__ = [
    "MappedWeights",
    "RawWeights",
    "Stored",
    "Weights",
    "pack_rows",
    "supported_types",
]

#: The most packed bytes of a slice, which is packed at a time.
_SLICE = 8 << 20
#: With layout "auto", the bytes to save are rounded up to a multiple of this part of all that can
#: be saved. So a little more or less free memory does not make another packed file at each start.
_STEPS = 8
#: Bytes of each tensor that identify its file, see `packed_cache.key_of`.
SAMPLED_BYTES = 3 * 4096


class Stored(Protocol):
    """A tensor in a GGUF or a packed file. type, shape: in the model, rows first."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def path(self) -> str: ...


class Weights(ABC):
    """The weights of a model. names: the names of the graph's tensors in the file; vectors are
    float32.

    All other float32 vectors of the file (rotary factors for another context) are added, so that
    one packed file serves all contexts. Layouts and n_bytes are known at once.
    Raises UnsupportedError for a tensor type without a layout.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        known = set(self.names)
        self.names += [name for name in _vectors(self._tensors) if name not in known]
        self.index = {name: i for i, name in enumerate(self.names)}
        #: The edge_weight of each name, which the plan reads.
        self.entries = ffi.new("edge_weight[]", max(1, len(self.names)))
        self.forms = self._first_forms()
        self._block: mmap.mmap | None = None
        self._views: list[CData] = []
        self._describe()

    @abstractmethod
    def fit(self, layout: Layout, room: int | None = None) -> None:
        """Choose the form of each tensor. room: bytes that "auto" may use; None: no limit. With
        "auto" all tensors are fast where they fit; else tensors become compact, the largest saving
        first, until all fit.

        Raises UnsupportedError for a packed file of other forms.
        """

    @property
    @abstractmethod
    def compact_saves(self) -> int:
        """Bytes that the compact form of all tensors would save; 0 for a packed file."""

    @property
    @abstractmethod
    def packing_bytes(self) -> int:
        """The most bytes that packing needs besides the packed bytes: for a slice and samples of
        the file.
        """

    @abstractmethod
    def load(self, threads: CData, progress: Progress | None = None) -> None:
        """Bring the weights into memory. progress(bytes done, bytes in all).

        Raises ModelFileError for damaged data, MemoryBudgetError.
        """

    @property
    def is_compact(self) -> bool:
        """Whether any tensor is in the compact form."""
        return "compact" in self.forms

    def bytes_of(self, name: str) -> int:
        """Bytes of a weight when it is packed."""
        return int(self.entries[self.index[name]].n_bytes)

    def layout(self, name: str) -> str:
        """The name of a weight's layout, "vector" for a vector."""
        layout = self.entries[self.index[name]].layout
        if layout == lib.EDGE_LAYOUT_VECTOR:
            return "vector"
        return native.text(lib.edge_layout_name(layout))

    def takes_q8(self, name: str) -> bool:
        """Whether a matrix is multiplied with quantised activations, else with float32 ones."""
        return bool(lib.edge_layout_takes_q8(self.entries[self.index[name]].layout))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A copy of a vector that is in memory, (k,)."""
        entry = self.entries[self.index[name]]
        return np.frombuffer(ffi.buffer(entry.data, entry.n_bytes), np.float32).copy()

    def items(self) -> list[Item]:
        """The tensors as a packed file stores them, in the order of `pieces`."""
        return [
            Item(name, tensor.type, tensor.shape, form, entry.n_bytes)
            for name, form, entry in zip(self.names, self.forms, self.entries, strict=True)
            for tensor in (self._tensors[name],)
        ]

    def use(self, packed: PackedFile) -> None:
        """Take the weights from a verified packed file, which may be closed afterwards.

        Raises ModelFileError when the file's weights are not the described ones.
        """
        for item, entry in zip(self.items(), self.entries, strict=True):
            tensor = packed.tensors.get(item.name)
            if tensor is None or any(
                getattr(tensor, field) != getattr(item, field)
                for field in ("type", "shape", "form", "n_bytes")
            ):
                raise ModelFileError(
                    "the packed file does not have it as it should",
                    path=packed.path,
                    field=f"tensor {item.name}",
                )
            if len(tensor.data) != item.n_bytes:  # the header alone was opened
                raise ModelFileError(
                    "its data are not there", path=packed.path, field=f"tensor {item.name}"
                )
            view = ffi.from_buffer("uint8_t[]", tensor.data)
            self._views.append(view)
            entry.data = view

    def resident(self) -> int | None:
        """Bytes of the weights that are in memory; None: the system does not say."""
        spans = [(int(ffi.cast("uintptr_t", e.data)), int(e.n_bytes)) for e in self.entries]
        start = min(address for address, _ in spans)
        return resident_of(start, max(map(sum, spans)) - start)

    def close(self) -> None:
        """Give the memory back. No plan may use the weights any more."""
        for view in self._views:
            ffi.release(view)
        self._views = []
        if self._block is not None:
            self._block.close()
            self._block = None

    def _describe(self) -> None:
        """Fill the entries and n_bytes, by the forms."""
        self.n_bytes = 0
        for name, form, entry in zip(self.names, self.forms, self.entries, strict=True):
            tensor = self._tensors[name]
            if tensor.type not in supported_types():
                raise UnsupportedError(
                    f"{tensor.path}: tensor {tensor.name} is {tensor.type}, which is not built: "
                    "quantise the model to another type",
                    what=tensor.type,
                    supported=supported_types(),
                )
            describe_weight(
                tensor.type, packed_shape(name, tensor.shape), form, ffi.addressof(entry)
            )
            self.n_bytes += padded(entry.n_bytes)

    def _savings(self) -> dict[int, int]:
        """Index of each tensor that has two forms -> bytes that the compact form saves."""
        pair, savings = ffi.new("edge_weight[2]"), dict[int, int]()
        for i, name in enumerate(self.names):
            tensor = self._tensors[name]
            shape = packed_shape(name, tensor.shape)
            if len(shape) != 2:
                continue
            for form, weight in zip(FORMS, pair, strict=True):
                describe_weight(tensor.type, shape, form, ffi.addressof(weight))
            if pair[0].layout != pair[1].layout:
                savings[i] = padded(pair[0].n_bytes) - padded(pair[1].n_bytes)
        return savings

    @property
    @abstractmethod
    def _tensors(self) -> Mapping[str, Stored]:
        """The tensors of the file, by name, until the file is closed."""

    @abstractmethod
    def _first_forms(self) -> list[str]:
        """The forms before `fit`."""


class _Slice(NamedTuple):
    """Some rows of a tensor. part: the edge_weight of these rows; first: the first row; offset:
    bytes of the packed tensor before them.
    """

    part: CData
    first: int
    offset: int


class RawWeights(Weights):
    """The weights of a GGUF, which are packed. Before `fit` all forms are fast. prefix: of the
    names here, before those in the file.
    """

    def __init__(self, source: GGUF, names: Iterable[str], prefix: str = "") -> None:
        self._source = source
        self._named = source.tensors
        if prefix:
            self._named = {prefix + name: tensor for name, tensor in source.tensors.items()}
        super().__init__(names)

    def fit(self, layout: Layout, room: int | None = None) -> None:
        """See `Weights`. Raises InputError for another layout."""
        if layout not in LAYOUTS:
            raise InputError(f"layout {layout!r}: one of {', '.join(LAYOUTS)}")
        savings = self._savings()
        forms = dict.fromkeys(savings, "compact" if layout == "compact" else "fast")
        if layout == "auto" and room is not None:
            step = max(1, sum(savings.values()) // _STEPS)
            fast = self.n_bytes + sum(s for i, s in savings.items() if self.forms[i] == "compact")
            missing = fast - room
            missing = -(-missing // step) * step
            for i in sorted(savings, key=lambda i: -savings[i]):
                if missing > 0 and savings[i] > 0:
                    forms[i] = "compact"
                    missing -= savings[i]
        for i, form in forms.items():
            self.forms[i] = form
        self._describe()

    @property
    def compact_saves(self) -> int:
        """See `Weights`."""
        savings = self._savings()
        return sum(savings[i] for i in savings if self.forms[i] == "fast" and savings[i] > 0)

    @property
    def packing_bytes(self) -> int:
        """See `Weights`."""
        most = 0
        for i, name in enumerate(self.names):
            tensor = self._tensors[name]
            part = next(self._slices(i)).part
            most = max(most, tensor.n_bytes * part.n * part.k // math.prod(tensor.shape))
        return most + SAMPLED_BYTES * len(self._source.tensors)

    def load(self, threads: CData, progress: Progress | None = None) -> None:
        """Read every tensor and pack it into new memory; progress after each tensor.

        Raises ModelFileError for NaN or infinity in a tensor, MemoryBudgetError.
        """
        try:
            self._block = anonymous(max(1, self.n_bytes))
        except (OSError, MemoryError) as error:
            raise MemoryBudgetError(
                f"no memory for {show(self.n_bytes)} of weights",
                needed=self.n_bytes,
                budget=available() or 0,
                parts={"weights": self.n_bytes},
            ) from error
        base = ffi.from_buffer("uint8_t[]", self._block)
        self._views.append(base)
        n_packed = 0
        for i, entry in enumerate(self.entries):
            entry.data = base + n_packed
            for part, first, offset in self._slices(i):
                part.data = entry.data + offset
                self._pack(i, part, first, threads)
            n_packed += padded(entry.n_bytes)
            if progress:
                progress(n_packed, self.n_bytes)

    def pieces(
        self, threads: CData, progress: Progress | None = None
    ) -> Generator[memoryview, None, None]:
        """Pack every tensor, a slice at a time, into the data of a packed file. A piece is valid
        until the next one.

        Raises ModelFileError for NaN or infinity in a tensor, OSError, MemoryError.
        """
        size = max(part.n_bytes for i in range(len(self.names)) for part, _, _ in self._slices(i))
        n_packed = 0
        with anonymous(size) as block, ffi.from_buffer("uint8_t[]", block) as base:
            for i, entry in enumerate(self.entries):
                for part, first, _ in self._slices(i):
                    part.data = base
                    self._pack(i, part, first, threads)
                    with memoryview(block) as view, view[: part.n_bytes] as piece:
                        yield piece
                yield memoryview(bytes(padded(entry.n_bytes) - entry.n_bytes))
                n_packed += padded(entry.n_bytes)
                if progress:
                    progress(n_packed, self.n_bytes)

    @property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self._named

    def _first_forms(self) -> list[str]:
        return ["fast"] * len(self.names)

    def _slices(self, i: int) -> Iterator[_Slice]:
        """Tensor i in slices of whole panels."""
        entry, name = self.entries[i], self.names[i]
        part = ffi.new("edge_weight *", entry)
        if entry.layout == lib.EDGE_LAYOUT_VECTOR:
            yield _Slice(part, 0, 0)
            return
        panel = entry.n_bytes // -(-entry.n // PANEL_ROWS)
        n_rows = max(1, _SLICE // panel) * PANEL_ROWS
        kind = self._tensors[name].type
        for first in range(0, entry.n, n_rows):
            shape = (min(n_rows, entry.n - first), entry.k)
            describe_weight(kind, shape, self.forms[i], part)
            yield _Slice(part, first, first // PANEL_ROWS * panel)

    def _pack(self, i: int, part: CData, first: int, threads: CData) -> None:
        """Pack a slice of tensor i, from row `first` on, to part.data."""
        tensor = self._tensors[self.names[i]]
        if part.layout == lib.EDGE_LAYOUT_VECTOR:
            _pack_vector(tensor, part, threads)
        else:
            pack_rows(tensor, part, first, threads)
        self._source.forget()  # so that only one slice of the file is in memory at a time


class MappedWeights(Weights):
    """The weights of a packed file, in the forms that it has."""

    def __init__(self, file: PackedFile, names: Iterable[str]) -> None:
        self._file = file
        super().__init__(names)

    def fit(self, layout: Layout, room: int | None = None) -> None:
        """See `Weights`: the forms are those of the file."""
        other = {self.forms[i] for i in self._savings()} - {layout}
        if layout != "auto" and other:
            raise UnsupportedError(
                f"{self._file.path} is packed in the {other.pop()} layout: "
                f"`edge-run pack MODEL --layout {layout}`, from its source, makes another",
                what=f"layout {layout}",
            )

    @property
    def compact_saves(self) -> int:
        """See `Weights`."""
        return 0

    @property
    def packing_bytes(self) -> int:
        """See `Weights`."""
        return 0

    def load(self, threads: CData, progress: Progress | None = None) -> None:
        """Check the file's sums, and map it."""
        self._file.verify(threads, progress)
        self.use(self._file)

    @property
    def _tensors(self) -> Mapping[str, Stored]:
        return self._file.tensors

    def _first_forms(self) -> list[str]:
        return [self._file.tensors[name].form for name in self.names]


def _vectors(tensors: Mapping[str, Stored]) -> list[str]:
    """The float32 vectors of a file."""
    return [name for name, t in tensors.items() if t.type == "F32" and len(t.shape) == 1]


def pack_rows(tensor: Tensor, part: CData, first: int, threads: CData) -> None:
    """Pack part.n rows of a tensor, from row `first` on, to part.data. part: an edge_weight.

    Raises ModelFileError for NaN or infinity in these rows.
    """
    row_bytes = tensor.n_bytes * part.k // math.prod(tensor.shape)
    start = first * row_bytes
    src = ffi.from_buffer("uint8_t[]", tensor.data[start : start + part.n * row_bytes])
    error = ffi.new("edge_error *")
    number = TYPE_NUMBERS[tensor.type]
    status = lib.edge_weight_pack(threads, number, part, src, part.n * row_bytes, error)
    ffi.release(src)
    if status == lib.EDGE_BAD_DATA:
        raise ModelFileError(
            f"row {first + error.row}, column {error.column} is NaN or infinite: "
            "the file is damaged",
            path=tensor.path,
            offset=tensor.offset,
            field=f"tensor {tensor.name}",
        )
    native.check(status, error)


def _pack_vector(tensor: Tensor, part: CData, threads: CData) -> None:
    """Pack each row as a matrix of one row and unpack that: so it may have any type of matrices."""
    row, k = ffi.new("edge_weight *"), tensor.shape[-1]
    describe_weight(tensor.type, (1, k), "fast", row)
    panel = np.empty(row.n_bytes + ALIGNMENT, np.uint8)
    panel = panel[-panel.ctypes.data % ALIGNMENT :]
    row.data = ffi.from_buffer("uint8_t[]", panel)
    for i in range(part.k // k):
        pack_rows(tensor, row, i, threads)
        out = ffi.cast("float *", part.data + 4 * i * k)
        native.check(lib.edge_weight_unpack(row, 0, 1, out))
