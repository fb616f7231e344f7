"""The GGUF reader: the trust boundary between a file from anywhere and the rest of edge.

A file is mapped read-only and nothing in it is believed: every count, length and offset is held
against the file's real size, and against a fixed limit, before anything is allocated. What comes
out is safe to index: tensors lie inside the file, aligned and apart from each other.

    magic "GGUF" | u32 version | u64 n_tensors | u64 n_keys
    n_keys times:    string key | u32 value type | value
    n_tensors times: string name | u32 n_dims | u64 dims[], fastest first | u32 type | u64 offset
    padding to the alignment, then the tensors' data, each at its offset from here

A string is its u64 length and its bytes, an array its u32 item type, its u64 length and its items.
Versions 2 and 3 differ in name only (3 may be big-endian, which is refused).

The map shows the file as it is now: whoever changes a file while it is in use changes the weights
under us, and whoever truncates it makes the kernel raise SIGBUS at the next read. Nothing in a
process can prevent that; replace a model by renaming a new file over it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edge.errors import ModelFileError, UnsupportedError
from edge.tensor_types import TENSOR_TYPES, TensorType

__all__ = ["GGUF", "TENSOR_TYPES", "Metadata", "Tensor", "TensorType"]

MAX_BYTES = 64 << 20  # of one string, or of one array
MAX_ITEMS = 1 << 22  # of one array; the largest vocabularies have some 600,000 merges
MAX_NAME_BYTES = 65_535  # of a key or a tensor's name
MAX_KEYS = 65_536  # arrays within arrays count too
MAX_TENSORS = 65_536
MAX_DEPTH = 4  # of arrays in arrays
MAX_DIMS = 4
MIN_ALIGNMENT, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 8, 32, 1 << 20

_BOOL, _STRING, _ARRAY = 7, 8, 9
#: Value types of fixed size, by number: struct code.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, _BOOL, 10, 11, 12), "BbHhIifBQqd", strict=True))
_U64 = struct.Struct("<Q").unpack_from

#: Files that people open by mistake: first bytes -> what it is.
_OTHER_FILES = (
    (b"<", "it looks like a web page (HTML or XML): was the download refused?"),
    (b"PK\x03\x04", "it is a zip file (or a PyTorch checkpoint): unpack or convert it first"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself"),
    (b"\x1f\x8b", "it is gzip-compressed"),
    (b"{", "it looks like JSON"),
    *((old, "it is from before GGUF: convert it again") for old in (b"lmgg", b"fmgg", b"tjgg")),
)
_SHARD_NAME = re.compile(r"(?s)(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a mapped file; nothing is read until `data` is."""

    name: str
    type: str  # GGUF's spelling: "Q4_0", "F16"
    shape: tuple[int, ...]  # rows first: (n, k), or (n,)
    n_bytes: int
    path: str  # of the shard that holds it
    offset: int  # bytes from the start of that file
    _map: mmap.mmap = field(repr=False, compare=False)

    @property
    def data(self) -> memoryview:
        """The bytes on disk, (n_bytes,), read-only, not copied. Raises ModelFileError if closed."""
        if self._map.closed:
            raise ModelFileError(
                "the file was closed", path=self.path, field=f"tensor {_shown(self.name)}"
            )
        return memoryview(self._map)[self.offset : self.offset + self.n_bytes]

    def forget(self) -> None:
        """Let go of the pages that reading `data` brought in; they can be read again."""
        first = self.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and self.n_bytes:
            self._map.madvise(mmap.MADV_DONTNEED, first, self.offset + self.n_bytes - first)


class Metadata(Mapping[str, Any]):
    """The file's keys: str, bool, int, float, or a list; lists are decoded when first asked for.

    Raises ModelFileError on access to a list with a string that is not UTF-8.
    """

    def __init__(
        self, values: dict[str, Any], reader: _Reader, spans: dict[str, tuple[int, int]]
    ) -> None:
        self._values, self._reader, self._spans = values, reader, spans
        self._decoded: dict[str, list[Any]] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, _Array):
            return value
        decoded = self._decoded.get(key)
        if decoded is None:
            decoded = self._reader.decode(value, f"key {_shown(key)}")
            self._decoded[key] = decoded
        return decoded

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def span(self, key: str) -> tuple[int, int]:
        """Where the key's entry is in the file, its name, type and value: first byte, end."""
        return self._spans[key]

    def is_array(self, key: str) -> bool:
        """Whether the value is an array; does not decode it."""
        return isinstance(self._values[key], _Array)

    def forget(self) -> None:
        """Let go of the lists that were decoded; they can be decoded again. A vocabulary of
        200,000 tokens and its merges are 40 MiB.
        """
        self._decoded = {}


class GGUF:
    """A model file, or all shards of a split one, mapped. Open it with `GGUF.open`.

    path: the file that was opened; version: 2 or 3; metadata: see Metadata (of the first shard);
    tensors: by name, in the file's order; alignment, n_bytes: bytes, the latter of all shards;
    paths: of the shards, in order.
    """

    def __init__(self, path: str, shards: list[_Shard]) -> None:
        self.path = path
        self._shards = shards
        self.version = shards[0].version
        self.alignment = shards[0].alignment
        self.metadata = shards[0].metadata
        self.n_bytes = sum(shard.reader.size for shard in shards)
        self.paths = [shard.path for shard in shards]
        self.tensors = {name: t for shard in shards for name, t in shard.tensors.items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUF:
        """Map a GGUF file; of a split model (`-00001-of-00003.gguf`) any shard opens all.

        Raises ModelFileError for a file that is missing, damaged, or not a GGUF, and for a
        missing shard; UnsupportedError for big-endian files, other versions than 2 and 3, and
        tensor types that are not known.
        """
        path = os.fsdecode(path)
        shards: list[_Shard] = []
        try:
            opened = _Shard(path)
            shards.append(opened)
            paths = _shard_paths(path, opened)
            if len(paths) > 1:
                for other in paths:
                    if other != path:
                        shards.append(_Shard(other))
                shards.sort(key=lambda shard: paths.index(shard.path))
                _check_shards(shards)
            return cls(path, shards)
        except BaseException:
            _close(shards)
            raise

    def headers(self) -> list[memoryview]:
        """The bytes of each shard up to its tensors' data, padding included."""
        return [memoryview(shard.reader.map)[: shard.data_start] for shard in self._shards]

    def data(self) -> memoryview:
        """The bytes of the first shard behind its header, as `headers` cuts it."""
        return memoryview(self._shards[0].reader.map)[self._shards[0].data_start :]

    def close(self) -> None:
        """Unmap. Views that were taken stay valid: a map goes with the last view of it."""
        _close(self._shards)

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Array(NamedTuple):
    """An array whose extent is checked and whose items are not decoded yet."""

    kind: int  # value type of the items
    n: int
    offset: int  # of the first item
    inner: tuple[_Array, ...] = ()  # the items, where they are arrays


class _Reader:
    """A position in a mapped file; every step is checked before it is made."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.map = _map_file(path)
        self.size = len(self.map)
        self.pos = 0
        self.n_arrays = 0

    def error(self, message: str, field: str, offset: int | None = None) -> ModelFileError:
        """The error to raise; offset: bytes, None for the current position."""
        at = self.pos if offset is None else offset
        return ModelFileError(message, path=self.path, offset=at, field=field)

    def need(self, n_bytes: int, field: str) -> None:
        """Raise ModelFileError unless so many bytes follow."""
        if n_bytes > self.size - self.pos:
            raise self.error(
                f"needs {n_bytes} bytes, {self.size - self.pos} are left: is the file truncated?",
                field,
            )

    def scalar(self, code: str, field: str) -> Any:
        """One number of a struct code."""
        n_bytes = struct.calcsize("<" + code)
        self.need(n_bytes, field)
        (value,) = struct.unpack_from("<" + code, self.map, self.pos)
        self.pos += n_bytes
        return value

    def count(self, limit: int, field: str, code: str = "Q") -> int:
        """A count, at most limit."""
        at = self.pos
        n: int = self.scalar(code, field)
        if n > limit:
            raise self.error(f"{n} is more than the limit of {limit}", field, at)
        return n

    def string(self, field: str, limit: int = MAX_BYTES) -> str:
        """A string of at most limit bytes."""
        n = self.count(limit, field)
        self.need(n, field)
        start, self.pos = self.pos, self.pos + n
        try:
            return self.map[start : self.pos].decode()
        except UnicodeDecodeError as e:
            raise self.error("the string is not UTF-8", field, start + e.start) from None

    def value(self, field: str) -> Any:
        """A metadata value: str, bool, int, float, or an _Array."""
        at = self.pos
        kind = self.scalar("I", field)
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            return self.array(field, self.pos + MAX_BYTES)
        if kind not in _SCALARS:
            raise self.error(f"there is no value type {kind}", field, at)
        value = self.scalar(_SCALARS[kind], field)
        if kind == _BOOL:
            if value > 1:
                raise self.error(f"{value} is neither true (1) nor false (0)", field, self.pos - 1)
            return bool(value)
        return value

    def array(self, field: str, end: int, depth: int = 1) -> _Array:
        """Step over an array that must stop at byte `end`, checking its extent."""
        self.n_arrays += 1
        if self.n_arrays > MAX_KEYS or depth > MAX_DEPTH:
            raise self.error("too many arrays within arrays", field)
        at = self.pos
        kind = self.scalar("I", field)
        n = self.count(MAX_ITEMS, field)
        start, inner = self.pos, list[_Array]()
        if kind == _STRING:
            self._skip_strings(n, min(end, self.size), field)
        elif kind == _ARRAY:
            for _ in range(n):
                inner.append(self.array(field, end, depth + 1))
        elif kind in _SCALARS:
            n_bytes = n * struct.calcsize("<" + _SCALARS[kind])
            self.need(n_bytes, field)
            self.pos += n_bytes
            if kind == _BOOL and self.map[start : self.pos].strip(b"\0\1"):
                raise self.error("a bool is neither true (1) nor false (0)", field, start)
        else:
            raise self.error(f"there is no value type {kind}", field, at)
        if self.pos > end:
            raise self.error(f"the array has more than {MAX_BYTES} bytes", field, at)
        return _Array(kind, n, start, tuple(inner))

    def _skip_strings(self, n: int, end: int, field: str) -> None:
        """Step over n strings that must stop at byte `end`.

        The loop only adds, and lets unpack_from find out that it has left the file: vocabularies
        have 200,000 strings, and this is most of the time that opening them takes.
        """
        pos, data = self.pos, self.map
        try:
            for _ in range(n):
                pos += 8 + _U64(data, pos)[0]
        except (struct.error, OverflowError):
            pos = end + 1
        if pos <= end:
            self.pos = pos
            return
        for i in range(n):  # once more, slowly, to say which
            item, at = f"{field}[{i}]", self.pos
            length = self.count(MAX_BYTES, item)
            self.need(length, item)
            self.pos += length
            if self.pos > end:
                raise self.error(f"the array has more than {MAX_BYTES} bytes", item, at)

    def decode(self, array: _Array, field: str) -> list[Any]:
        """The items of an array that was stepped over."""
        if self.map.closed:
            raise ModelFileError("the file was closed", path=self.path, field=field)
        if array.kind == _STRING:
            return self._decode_strings(array.n, array.offset, field)
        if array.kind == _ARRAY:
            return [self.decode(item, field) for item in array.inner]
        items = struct.unpack_from(f"<{array.n}{_SCALARS[array.kind]}", self.map, array.offset)
        return [item == 1 for item in items] if array.kind == _BOOL else list(items)

    def _decode_strings(self, n: int, pos: int, field: str) -> list[str]:
        data, out = self.map, list[str]()
        add = out.append
        try:
            for _ in range(n):
                start = pos + 8
                pos = start + _U64(data, pos)[0]
                add(data[start:pos].decode())
        except UnicodeDecodeError as e:
            field, start = f"{field}[{len(out)}]", start + e.start
            raise self.error("the string is not UTF-8", field, start) from None
        except (struct.error, OverflowError):  # the lengths were right when they were checked
            raise self.error("the file was changed while it was open", field, pos) from None
        return out


class _Info(NamedTuple):
    """A tensor as the header describes it, not yet held against the data."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int  # from the start of the data
    at: int  # byte where this description starts


class _Shard:
    """One file: its header, metadata and tensors, all checked."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.reader = _Reader(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap, unless there are views: the map goes with the last of them."""
        with contextlib.suppress(BufferError):
            self.reader.map.close()

    def _read(self) -> None:
        r = self.reader
        self.version = _read_version(r)
        n_tensors = r.count(MAX_TENSORS, "tensor count")
        n_keys = r.count(MAX_KEYS, "key count")
        values, spans = dict[str, Any](), dict[str, tuple[int, int]]()
        for i in range(n_keys):
            at = r.pos
            key = r.string(f"key {i}, name", MAX_NAME_BYTES)
            if key in values:
                raise r.error("the key is there twice", f"key {_shown(key)}", at)
            values[key] = r.value(f"key {_shown(key)}")
            spans[key] = at, r.pos
        self.metadata = Metadata(values, r, spans)
        self.alignment = self._alignment()
        infos = [_read_info(r, i) for i in range(n_tensors)]
        self.tensors = self._place(infos)

    def _alignment(self) -> int:
        n = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(n) is not int or not MIN_ALIGNMENT <= n <= MAX_ALIGNMENT or n & (n - 1):
            raise ModelFileError(
                f"must be a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}, it is "
                f"{n if isinstance(n, (int, float)) else 'no number'}",
                path=self.path,
                field="key general.alignment",
            )
        return n

    def _place(self, infos: list[_Info]) -> dict[str, Tensor]:
        """The tensors: names differ, data are aligned, inside the file, and do not overlap."""
        r, tensors = self.reader, dict[str, Tensor]()
        start = -(-r.pos // self.alignment) * self.alignment
        self.data_start = min(start, r.size)
        for info in infos:
            field, offset = f"tensor {_shown(info.name)}", start + info.offset
            if info.name in tensors:
                raise r.error("the tensor is there twice", field, info.at)
            if info.offset % self.alignment:
                raise r.error(
                    f"offset {info.offset} is no multiple of the alignment {self.alignment}",
                    field,
                    info.at,
                )
            if info.n_bytes > r.size - offset:
                raise r.error(
                    f"{info.n_bytes} bytes of {info.type} from byte {offset} on do not fit "
                    f"a file of {r.size}: is it truncated?",
                    field,
                    info.at,
                )
            tensors[info.name] = Tensor(*info[:4], self.path, offset, r.map)
        in_place = sorted(infos, key=lambda info: info.offset)
        for before, info in itertools.pairwise(in_place):
            if before.offset + before.n_bytes > info.offset:
                raise r.error(
                    f"the data overlap those of {_shown(before.name)}",
                    f"tensor {_shown(info.name)}",
                    info.at,
                )
        return tensors


def _read_info(r: _Reader, i: int) -> _Info:
    """The description of tensor i, at the reader's position."""
    start = r.pos
    name = r.string(f"tensor {i}, name", MAX_NAME_BYTES)
    field = f"tensor {_shown(name)}"
    at = r.pos
    n_dims = r.count(MAX_DIMS, f"{field}, number of dimensions", "I")
    dims = [r.scalar("Q", f"{field}, shape") for _ in range(n_dims)]
    if not dims or 0 in dims:
        raise r.error("the tensor has no elements", f"{field}, shape", at)
    type_at = r.pos
    number = r.scalar("I", f"{field}, type")
    if number not in TENSOR_TYPES:
        raise UnsupportedError(
            f"{r.path}, {field} at byte {type_at}: weight type {number} is not known: "
            "it is newer than this version of edge, or was given up long ago",
            what=f"tensor type {number}",
        )
    kind = TENSOR_TYPES[number]
    if dims[0] % kind.block:
        raise r.error(
            f"a row of {dims[0]} is no multiple of {kind.name}'s block of {kind.block}",
            f"{field}, shape",
            at,
        )
    n_bytes = math.prod(dims) // kind.block * kind.block_bytes  # exact: integers have no limit
    offset = r.scalar("Q", f"{field}, offset")
    return _Info(name, kind.name, tuple(reversed(dims)), n_bytes, offset, start)


def _shown(name: str) -> str:
    """A name from the file, fit for a message: one line, not long, no control characters."""
    return name if name.isprintable() and len(name) <= 100 else ascii(name[:100])


def _map_file(path: str) -> mmap.mmap:
    """Map a regular file that is not empty, read-only."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError("this is a folder: name the .gguf file in it", path=path)
        if not stat.S_ISREG(mode):
            raise ModelFileError("this is not a regular file, it cannot be mapped", path=path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ModelFileError("the file is empty", path=path)
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError("there is no such file", path=path) from None
    except OSError as e:
        raise ModelFileError(f"cannot be opened: {e.strerror or e}", path=path) from None
    except (ValueError, OverflowError) as e:  # a NUL in the path; more than the address space
        raise ModelFileError(f"cannot be opened: {e}", path=path) from None


def _read_version(r: _Reader) -> int:
    """Magic and version; an error that says what the file is instead."""
    head = r.map[:24]
    if head[:4] != b"GGUF":
        if b"GGUF".startswith(head):
            r.need(24, "magic")
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        guess = next((what for start, what in _OTHER_FILES if text.startswith(start.lower())), None)
        if head[8:9] == b"{" and _U64(head.ljust(8, b"\0"))[0] < r.size:
            guess = "it looks like safetensors: convert it to GGUF first"
        raise r.error(f"not a GGUF file{f': {guess}' if guess else ''}", "magic")
    r.pos = 4
    version: int = r.scalar("I", "version")
    if version in (2, 3):
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if 0 < swapped < 1 << 16 <= version:
        raise UnsupportedError(
            f"{r.path}, version at byte 4: this is a big-endian GGUF",
            what="big-endian GGUF",
            supported=("little-endian",),
        )
    raise UnsupportedError(
        f"{r.path}, version at byte 4: this is version {version} of GGUF",
        what=f"GGUF version {version}",
        supported=("2", "3"),
    )


def _shard_paths(path: str, shard: _Shard) -> list[str]:
    """The paths of all shards, in order; `path` alone if the model is not split."""
    n = shard.metadata.get("split.count", 1)
    if n in (0, 1):
        return [path]
    folder, name = os.path.split(path)
    match = _SHARD_NAME.fullmatch(name)
    if type(n) is not int or match is None or n != int(match[3]):
        ending = f"-00001-of-{n:05}.gguf" if type(n) is int else "-00001-of-0000N.gguf"
        raise ModelFileError(
            f"this is one shard of a split model, its name must end like {ending}",
            path=path,
            field="key split.count",
        )
    names = [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, n + 1)]
    if name not in names:
        raise ModelFileError(f"there is no shard {int(match[2])} of {n}", path=path)
    paths = [path if other == name else os.path.join(folder, other) for other in names]
    for other in paths:
        if not os.path.exists(other):
            raise ModelFileError(f"this shard is missing: {name} needs all {n}", path=other)
    return paths


def _check_shards(shards: list[_Shard]) -> None:
    """The shards, in order, are those of one model, and complete."""
    first, n_tensors = shards[0], sum(len(shard.tensors) for shard in shards)
    wanted = [(s, "split.no", i) for i, s in enumerate(shards)]
    wanted += [(s, "split.count", len(shards)) for s in shards]
    if "split.tensors.count" in first.metadata:
        wanted.append((first, "split.tensors.count", n_tensors))
    for shard, key, want in wanted:
        value = shard.metadata.get(key)
        if value != want:
            shown = value if isinstance(value, (int, float)) else "no number"
            raise ModelFileError(
                f"is {shown}, but by the shards' names and contents it must be {want}",
                path=shard.path,
                field=f"key {key}",
            )
    if len({name for shard in shards for name in shard.tensors}) < n_tensors:
        raise ModelFileError("two shards have a tensor of the same name", path=first.path)


def _close(shards: list[_Shard]) -> None:
    for shard in shards:
        shard.close()
