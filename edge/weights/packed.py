"""Packed files: models whose tensors are already packed as panels. Loading one only maps and checks
it.

The file is a GGUF (version 3), and the same reader is its trust boundary:

    the model's own keys   copied as they are; in the cache without arrays, which the source has
    general.alignment      64
    edge.packed.version    version of this container
    edge.packed.layouts    version of the panels' bytes
    edge.packed.key        identifies the source, see `edge.weights.packed_cache.key_of`
    edge.packed.whole      whether the arrays (the vocabulary) are in the file, so that it is
                           complete without its source
    edge.packed.types, .forms, .rows, .columns   of each tensor; rows 0: a vector, as float32
    edge.packed.stacks     of each tensor: how many matrices of these rows it has; 0: it is one
    edge.packed.sums       two numbers for each SECTION of the data, by edge_checksum
    edge.packed.digest     SHA-256 of all bytes before the data, except its own 64 digits
    tensors                I8, (bytes,), each at a multiple of 64, in the order of use
    data                   the panels

Layouts are not in the file. They follow from type, form and shape, by the function that packing
uses, too, and a tensor must have as many bytes as that function says. The sums are checked at each
load, before anything is used. They are fast enough, and also bring the file into memory.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from edge import native
from edge.disk.atomic import write_all
from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.files import gguf_writer
from edge.files.gguf import GGUF, TENSOR_TYPES, Metadata
from edge.files.gguf_reader import BOOL, STRING, UINT32
from edge.files.gguf_writer import TensorEntry, entry, numbers, string, strings
from edge.files.tensor_types import TYPE_NUMBERS
from edge.native import CData, ffi, lib
from edge.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ALIGN",
    "FORMS",
    "VERSION",
    "Item",
    "PackedFile",
    "PackedTensor",
    "describe_weight",
    "is_packed",
    "packed_shape",
    "supported_types",
    "write",
]

VERSION = 1
ALIGN = 64
SECTION = 128 << 20  # bytes of data of one pair of sums, a step of progress and of messages

#: Name of a form -> its number in the enum edge_form.
_FORM_NUMBERS = {"fast": int(lib.EDGE_FORM_FAST), "compact": int(lib.EDGE_FORM_COMPACT)}
FORMS = tuple(_FORM_NUMBERS)

_PREFIX = "edge.packed."
#: Keys of a source that have no meaning, or another one, in the packed file.
_DROPPED = ("general.alignment", "split.", _PREFIX)


@dataclass(frozen=True)
class Item:
    """A tensor to pack. name, type, shape: in the model; form: of the packed tensor; n_bytes: when
    packed.
    """

    name: str
    type: str
    shape: tuple[int, ...]  # (n, k), (k,), or (n_experts, n, k)
    form: str
    n_bytes: int


@dataclass(frozen=True)
class PackedTensor(Item):
    """A packed tensor in a file; data: its panels, (n_bytes,), read-only, not copied."""

    path: str
    offset: int  # bytes from the start of the file
    data: memoryview


def packed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a tensor is packed: (k,), a vector of floats, or (n, k), a matrix.

    Stacked matrices are one matrix of all their rows. Biases are vectors, also where there is a row
    for each expert; the weights of a norm with a row for each head are a matrix. The gate of a
    shared expert is a matrix of one row, which files have as a vector.
    """
    if name.endswith("gate_inp_shexp.weight"):
        return (1, math.prod(shape))
    if len(shape) == 1 or name.endswith(".bias"):
        return (math.prod(shape),)
    return math.prod(shape[:-1]), shape[-1]


def describe_weight(type_name: str, shape: tuple[int, ...], form: str, weight: CData) -> None:
    """Fill the edge_weight of a tensor of this type and packed shape when it is in this form.

    Raises UnsupportedError for a type without a layout, NativeError for an impossible shape.
    """
    if type_name not in TYPE_NUMBERS:
        raise UnsupportedError(f"there is no tensor type {type_name!r}", what=type_name)
    n, k = shape if len(shape) == 2 else (1, shape[0])
    error = ffi.new("edge_error *")
    number, i_form = TYPE_NUMBERS[type_name], _FORM_NUMBERS[form]
    native.check(lib.edge_weight_describe(number, i_form, n, k, weight, error), error)
    if len(shape) == 1:
        weight.layout, weight.n_bytes = lib.EDGE_LAYOUT_VECTOR, 4 * k


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


def is_packed(metadata: Metadata) -> bool:
    """Whether these are the keys of a packed file."""
    return _PREFIX + "version" in metadata


class PackedFile:
    """An open packed file whose header is checked; `verify` checks the data.

    path, metadata, n_bytes, version: as of a GGUF; tensors: by name, with their types and shapes in
    the model; key: identifies its source; whole: whether it has the vocabulary.
    """

    def __init__(self, gguf: GGUF) -> None:
        """Check the header. When this raises, the GGUF stays open, and the caller closes it.

        Raises ModelFileError for a wrong header, UnsupportedError for another version.
        """
        self._gguf = gguf
        self.path, self.n_bytes, self.version = gguf.path, gguf.n_bytes, gguf.version
        self.header_only, self.whole_bytes = gguf.header_only, gguf.whole_bytes
        self.metadata: Metadata = gguf.metadata
        self._check_versions()
        self._check_digest()
        self.key: str = self._get("key", str)
        self.whole: bool = self._get("whole", bool)
        self._data = memoryview(b"") if gguf.header_only else gguf.data()
        n_data = gguf.whole_bytes - len(gguf.headers()[0])
        self._sums: list[int] = self._get("sums", list)
        if len(self._sums) != 2 * -(-n_data // SECTION) or set(map(type, self._sums)) - {int}:
            raise self._error("sums", f"not those of {n_data} bytes")
        self.tensors = self._read_tensors()

    def verify(self, threads: CData, progress: Progress | None = None) -> None:
        """Compare all data with the sums. progress(bytes done, bytes in all).

        Raises ModelFileError for data that differ, with their offset, and when the header alone was
        opened.
        """
        if self.header_only:
            raise ModelFileError("the header alone was opened", path=self.path)
        total = len(self._data)
        sums = checksums(threads, self._data, progress)
        if sums != self._sums:
            i = next(i for i in range(len(sums)) if sums[i] != self._sums[i]) // 2
            first, end = i * SECTION, min((i + 1) * SECTION, total)
            raise ModelFileError(
                f"the checksum of {end - first} bytes from here on is wrong: the file is damaged",
                path=self.path,
                offset=self.n_bytes - total + first,
                field="packed data",
            )

    def close(self) -> None:
        """Unmap. Existing views stay valid: the map is freed with the last of them."""
        self.tensors = {}
        self._data = memoryview(b"")
        self._gguf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _error(self, key: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=self.path, field=f"key {_PREFIX}{key}")

    def _get(self, key: str, kind: type) -> Any:
        value = self.metadata.get(_PREFIX + key)
        if type(value) is not kind:
            raise self._error(key, f"must be of type {kind.__name__}")
        return value

    def _check_versions(self) -> None:
        """Check the versions first: in a file of another version, all else may differ."""
        versions = {"version": VERSION, "layouts": lib.edge_layout_version()}
        for key, version in versions.items():
            value = self._get(key, int)
            if value != version:
                raise UnsupportedError(
                    f"{self.path}: packed by another version of edge ({key} {value}, this one has "
                    f"{version}): pack it again from its source",
                    what=f"packed {key} {value}",
                    supported=[str(version)],
                )
        if len(self._gguf.paths) != 1 or self._gguf.alignment != ALIGN:
            raise self._error("version", f"a packed file is one file with an alignment of {ALIGN}")

    def _check_digest(self) -> None:
        (header,) = self._gguf.headers()
        digits = self._get("digest", str).encode()
        end = self.metadata.span(_PREFIX + "digest").end
        if _digest(header, end) != digits:
            raise self._error("digest", "the header's digest is wrong: the file is damaged")

    def _read_tensors(self) -> dict[str, PackedTensor]:
        source = list(self._gguf.tensors.values())
        columns = [self._get(key, list) for key in ("types", "forms", "rows", "columns")]
        columns.append(self.metadata.get(_PREFIX + "stacks", [0] * len(source)))
        if any(type(column) is not list or len(column) != len(source) for column in columns):
            raise self._error("types", f"not one for each of {len(source)} tensors")
        weight, tensors = ffi.new("edge_weight *"), dict[str, PackedTensor]()
        for tensor, kind, form, n, k, stack in zip(source, *columns, strict=True):
            field = f"tensor {tensor.name!a:.100}"
            is_typed = type(kind) is str and form in FORMS and {*map(type, (n, k, stack))} == {int}
            if not is_typed or not (0 <= n < 1 << 31 and 0 < k < 1 << 31 and 0 <= stack < 1 << 31):
                raise ModelFileError(
                    "its type, form or shape is wrong", path=self.path, field=field
                )
            shape = (stack, n, k) if n and stack else (n, k) if n else (k,)
            try:
                describe_weight(kind, packed_shape(tensor.name, shape), form, weight)
            except EdgeError as e:
                raise ModelFileError(str(e), path=self.path, field=field) from e
            if tensor.type != "I8" or tensor.shape != (weight.n_bytes,):
                raise ModelFileError(
                    f"{tensor.n_bytes} bytes of {tensor.type}, a packed {kind} matrix of "
                    f"{shape} has {weight.n_bytes} of I8",
                    path=self.path,
                    field=field,
                )
            tensors[tensor.name] = PackedTensor(
                tensor.name,
                kind,
                shape,
                form,
                tensor.n_bytes,
                self.path,
                tensor.offset,
                memoryview(b"") if self.header_only else tensor.data,
            )
        return tensors


def checksums(threads: CData, data: memoryview, progress: Progress | None = None) -> list[int]:
    """Two numbers for each SECTION of data, in one list."""
    sums, pair = list[int](), ffi.new("uint64_t[2]")
    with ffi.from_buffer("uint8_t[]", data) as whole:
        for first in range(0, len(data), SECTION):
            n = min(SECTION, len(data) - first)
            native.check(lib.edge_checksum(threads, whole + first, n, pair))
            sums.extend(pair)
            if progress:
                progress(first + n, len(data))
    return sums


# ---- writing -------------------------------------------------------------------------------------


def write(
    file: IO[bytes],
    header: Header,
    packed: Iterable[bytes | memoryview],
    sums: Callable[[memoryview], list[int]],
) -> None:
    """Write a packed file into an empty, unbuffered file that is open for reading, too.

    packed: the bytes of all tensors, each padded to ALIGN, in pieces of any size; sums: computes
    `checksums` of the data. Raises OSError, and the errors of `packed`.
    """
    start = len(header.encode([0] * header.n_sums))
    file.seek(start)
    for piece in packed:
        write_all(file, piece)
    n_bytes = start + header.n_data
    with (
        mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as view,
        memoryview(view) as everything,
        everything[start:] as data,
    ):
        data_sums = sums(data)
    file.seek(0)
    write_all(file, header.encode(data_sums))


@dataclass(frozen=True)
class Header:
    """The header of a packed file. key, whole: see the top of this module; metadata: of the source;
    raw: the bytes of the header of its first shard.
    """

    items: list[Item]
    key: str
    whole: bool
    metadata: Metadata
    raw: memoryview

    @property
    def n_data(self) -> int:
        """Bytes of data."""
        return sum(padded(item.n_bytes) for item in self.items)

    @property
    def n_sums(self) -> int:
        """How many numbers `checksums` gives for the data."""
        return 2 * -(-self.n_data // SECTION)

    def encode(self, sums: list[int]) -> bytes:
        """The bytes of the header, padded up to the data."""
        items = self.items
        entries = gguf_writer.copied(self.metadata, self.raw, self._is_kept)
        entries += [
            entry("general.alignment", UINT32, struct.pack("<I", ALIGN)),
            entry(_PREFIX + "version", UINT32, struct.pack("<I", VERSION)),
            entry(_PREFIX + "layouts", UINT32, struct.pack("<I", lib.edge_layout_version())),
            entry(_PREFIX + "key", STRING, string(self.key)),
            entry(_PREFIX + "whole", BOOL, struct.pack("<B", self.whole)),
            strings(_PREFIX + "types", [item.type for item in items]),
            strings(_PREFIX + "forms", [item.form for item in items]),
            numbers(_PREFIX + "rows", [([0, *item.shape])[-2] for item in items]),
            numbers(_PREFIX + "columns", [item.shape[-1] for item in items]),
            numbers(_PREFIX + "stacks", [([0, 0, *item.shape])[-3] for item in items]),
            numbers(_PREFIX + "sums", sums),
            entry(_PREFIX + "digest", STRING, string("0" * 64)),
        ]
        head = gguf_writer.start(len(items), entries)
        digest_end, offset, tensors = len(head), 0, list[TensorEntry]()
        for item in items:
            number = TYPE_NUMBERS["I8"]
            tensors.append(TensorEntry(item.name, (item.n_bytes,), number, offset))
            offset += padded(item.n_bytes)
        gguf_writer.add_tensors(head, tensors, ALIGN)
        head[digest_end - 64 : digest_end] = _digest(memoryview(head), digest_end)
        return bytes(head)

    def _is_kept(self, key: str) -> bool:
        return not key.startswith(_DROPPED) and (self.whole or not self.metadata.is_array(key))


def padded(n_bytes: int) -> int:
    """n_bytes, rounded up to a multiple of ALIGN."""
    return -(-n_bytes // ALIGN) * ALIGN


def _digest(header: memoryview, end: int) -> bytes:
    """SHA-256, as hex digits, of all bytes of a header except the 64 before `end`."""
    sha = hashlib.sha256(header[: end - 64])
    sha.update(header[end:])
    return sha.hexdigest().encode()
