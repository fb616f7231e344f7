"""The GGUF reader: the trust boundary between a file from anywhere and the rest of edge.

A file is mapped read-only and nothing in it is trusted: every count, length and offset is compared
with the file's real size, and with a fixed limit, before anything is allocated. The tensors that
the reader returns are safe to index: they are inside the file, aligned, and do not overlap.

    magic "GGUF" | u32 version | u64 n_tensors | u64 n_keys
    n_keys times:    string key | u32 value type | value
    n_tensors times: string name | u32 n_dims | u64 dims[], fastest first | u32 type | u64 offset
    padding to the alignment, then the tensors' data, each at its offset from here

A string is its u64 length and its bytes, an array its u32 item type, its u64 length and its items.
Versions 2 and 3 differ in their number only (3 may be big-endian, which is refused).

The map shows the file as it is now. A program that changes the file while it is in use changes the
weights, and one that truncates it makes the kernel raise SIGBUS at the next read. No library can
prevent that; to replace a model, rename a new file over it. When `edge.load` returns, it has read
everything but the weights, and has packed the weights of a GGUF file: only the packed file stays
mapped. On SIGBUS `edge-run` ends with one line (`edge_exit_on_bus_error`).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from edge.errors import ModelFileError, UnsupportedError
from edge.files.gguf_reader import FLOAT32, FLOAT64, MAX_KEYS, STRING, Array, Reader, shown
from edge.files.tensor_types import LARGER_BLOCKS, TENSOR_TYPES, TensorType, type_name

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GGUF", "TENSOR_TYPES", "Metadata", "Tensor", "TensorType"]

MAX_NAME_BYTES = 65_535  # of the name of a key or a tensor
MAX_NUMBERS_BYTES = 65_536  # of a key of the architecture, which has a few numbers for each layer
MAX_TENSORS = 65_536
MAX_DIMS = 4
MAX_FILE_BYTES = 1 << 50  # of a file whose header alone was opened
MIN_ALIGNMENT, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 8, 32, 1 << 20

#: Arrays whose items would have another meaning in another type: key -> the types allowed.
_ITEMS = {"tokenizer.ggml.scores": (FLOAT32, FLOAT64)}

#: Files that people open by mistake: (first bytes, what the file is).
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
    """A tensor in a mapped file; only access to `data` reads its bytes. header_only: the header
    alone was opened, so there is no data.
    """

    name: str
    type: str  # GGUF's spelling: "Q4_0", "F16"; see `tensor_types.type_name`
    shape: tuple[int, ...]  # rows first: (n, k), or (n,)
    n_bytes: int  # for a type of unknown size: the bytes up to the next tensor
    path: str  # of the shard with its data
    offset: int  # bytes from the start of that file
    _map: mmap.mmap = field(repr=False, compare=False)
    header_only: bool = False

    @property
    def data(self) -> memoryview:
        """The bytes on disk, (n_bytes,), read-only, not copied.

        Raises ModelFileError after the file was closed, or when its header alone was opened.
        """
        if self._map.closed or self.header_only:
            raise ModelFileError(
                "the header alone was opened" if self.header_only else "the file was closed",
                path=self.path,
                field=f"tensor {shown(self.name)}",
            )
        return memoryview(self._map)[self.offset : self.offset + self.n_bytes]


class Span(NamedTuple):
    """Bytes of a file: the first byte, and the end behind the last one."""

    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """The file's keys: str, bool, int, float, or a list; a list is decoded at its first access.

    Raises ModelFileError on access to a list with a string that is not UTF-8.
    """

    def __init__(self, values: dict[str, Any], reader: Reader, spans: dict[str, Span]) -> None:
        self._values, self._reader, self._spans = values, reader, spans
        self._decoded: dict[str, list[Any]] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, Array):
            return value
        decoded = self._decoded.get(key)
        if decoded is None:
            decoded = self._reader.decode(value, f"key {shown(key)}")
            self._decoded[key] = decoded
        return decoded

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def span(self, key: str) -> Span:
        """The bytes of the key's entry in the file: its name, type and value."""
        return self._spans[key]

    def is_array(self, key: str) -> bool:
        """Whether the value is an array; does not decode it."""
        return isinstance(self._values[key], Array)

    def extent(self, key: str) -> tuple[int, int]:
        """(items, their bytes) of an array, not decoded; (0, 0): there is none. The length fields
        of strings are not counted.
        """
        value = self._values.get(key)
        if not isinstance(value, Array):
            return 0, 0
        n_bytes = self._spans[key].end - value.offset
        return value.n, n_bytes - (8 * value.n if value.kind == STRING else 0)

    def forget(self) -> None:
        """Free the decoded lists; they can be decoded again. A vocabulary of 200,000 tokens and its
        merges take 40 MiB.
        """
        self._decoded = {}


class GGUF:
    """A model file, or all shards of a split one, mapped. Open it with `GGUF.open`.

    path: the file that was opened; version: 2 or 3; metadata: see Metadata (of the first shard);
    tensors: by name, in the file's order; alignment: bytes; n_bytes: of all shards; paths: of the
    shards, in order; header_only: whether the header alone was opened; whole_bytes: of all shards
    when they are complete.
    """

    def __init__(self, path: str, shards: list[_Shard]) -> None:
        self.path = path
        self.header_only = shards[0].header_only
        self._shards = shards
        self.version = shards[0].version
        self.alignment = shards[0].alignment
        self.metadata = shards[0].metadata
        self.n_bytes = sum(shard.reader.size for shard in shards)
        self.whole_bytes = sum(max(shard.reader.size, shard.end) for shard in shards)
        self.paths = [shard.path for shard in shards]
        self.tensors = {name: t for shard in shards for name, t in shard.tensors.items()}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, header_only: bool = False) -> Self:
        """Map a GGUF file; any shard of a split model (`-00001-of-00003.gguf`) opens all shards.

        header_only: whether to open the header alone. The tensors' data cannot be read then, and
        may be missing, as in a file that is being downloaded.

        Raises ModelFileError for a file that is missing, damaged, or not a GGUF, and for a
        missing shard; UnsupportedError for big-endian files, and other versions than 2 and 3.
        """
        path = os.fsdecode(path)
        shards: list[_Shard] = []
        try:
            opened = _Shard(path, header_only)
            shards.append(opened)
            paths = _shard_paths(path, opened)
            if len(paths) > 1:
                for other in paths:
                    if other != path:
                        shards.append(_Shard(other, header_only))
                shards.sort(key=lambda shard: paths.index(shard.path))
                _check_shards(shards)
            return cls(path, shards)
        except BaseException:
            _close(shards)
            raise

    def forget(self) -> None:
        """Drop all pages of the file from this process's memory, since the system also maps pages
        around those that are read. They can be read again.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for shard in self._shards:
                shard.reader.map.madvise(mmap.MADV_DONTNEED)

    def headers(self) -> list[memoryview]:
        """The bytes of each shard up to its tensors' data, padding included."""
        return [memoryview(shard.reader.map)[: shard.data_start] for shard in self._shards]

    def data(self) -> memoryview:
        """The bytes of the first shard behind its header, as `headers` cuts it.

        Raises ModelFileError when the header alone was opened.
        """
        if self.header_only:
            raise ModelFileError("the header alone was opened", path=self.path)
        return memoryview(self._shards[0].reader.map)[self._shards[0].data_start :]

    def close(self) -> None:
        """Unmap. Existing views stay valid: a map is freed with the last view of it."""
        _close(self._shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Info(NamedTuple):
    """A tensor as the header describes it, not yet compared with the file's size."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int  # -1: the type does not say
    offset: int  # from the start of the data
    at: int  # byte of the file where this description starts


class _Shard:
    """One file: its header, metadata and tensors, all checked."""

    def __init__(self, path: str, header_only: bool = False) -> None:
        self.path, self.header_only = path, header_only
        self.reader = Reader(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap, unless there are views: the map is freed with the last of them."""
        with contextlib.suppress(BufferError):
            self.reader.map.close()

    def _read(self) -> None:
        r = self.reader
        self.version = _read_version(r)
        n_tensors = r.count(MAX_TENSORS, "tensor count")
        n_keys = r.count(MAX_KEYS, "key count")
        values, spans = dict[str, Any](), dict[str, Span]()
        for i in range(n_keys):
            at = r.pos
            key = r.string(f"key {i}, name", MAX_NAME_BYTES)
            if key in values:
                raise r.error("the key is there twice", f"key {shown(key)}", at)
            values[key] = r.value(f"key {shown(key)}")
            spans[key] = Span(at, r.pos)
        self._check_arrays(values, spans)
        self.metadata = Metadata(values, r, spans)
        self.alignment = self._alignment()
        infos = [_read_info(r, i) for i in range(n_tensors)]
        self.tensors = self._place(infos)

    def _check_arrays(self, values: dict[str, Any], spans: dict[str, Span]) -> None:
        """Raise ModelFileError for an array of a wrong type, or too long for its key."""
        architecture = values.get("general.architecture")
        prefix = f"{architecture}." if isinstance(architecture, str) else None
        for key, value in values.items():
            field, (start, end) = f"key {shown(key)}", spans[key]
            if isinstance(value, Array) and value.kind not in _ITEMS.get(key, (value.kind,)):
                raise self.reader.error("an array of floats belongs here", field, start)
            if prefix and key.startswith(prefix) and end - start > MAX_NUMBERS_BYTES:
                raise self.reader.error(
                    f"{end - start} bytes are more than the limit of {MAX_NUMBERS_BYTES}",
                    field,
                    start,
                )

    def _alignment(self) -> int:
        """Bytes of the file's alignment. Raises ModelFileError for one that is out of range."""
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
        """The tensors by name. Raises ModelFileError unless their names differ, and their data are
        aligned, inside the file, and do not overlap.
        """
        r, tensors = self.reader, dict[str, Tensor]()
        start = -(-r.pos // self.alignment) * self.alignment
        self.data_start = min(start, r.size)
        self.end = start
        size = MAX_FILE_BYTES if self.header_only else r.size
        infos = _sized(_with_larger_blocks(infos), r.size - start)
        for info in infos:
            field, offset = f"tensor {shown(info.name)}", start + info.offset
            if info.name in tensors:
                raise r.error("the tensor is there twice", field, info.at)
            if info.offset % self.alignment:
                raise r.error(
                    f"offset {info.offset} is no multiple of the alignment {self.alignment}",
                    field,
                    info.at,
                )
            if info.n_bytes > size - offset:
                raise r.error(
                    f"{info.n_bytes} bytes of {info.type} from byte {offset} on do not fit "
                    f"a file of {size}: is it truncated?",
                    field,
                    info.at,
                )
            self.end = max(self.end, offset + info.n_bytes)
            tensors[info.name] = Tensor(*info[:4], self.path, offset, r.map, self.header_only)
        by_offset = sorted(infos, key=lambda info: info.offset)
        for before, info in itertools.pairwise(by_offset):
            if before.offset + before.n_bytes > info.offset:
                raise r.error(
                    f"the data overlap those of {shown(before.name)}",
                    f"tensor {shown(info.name)}",
                    info.at,
                )
        return tensors


def _read_info(r: Reader, i: int) -> _Info:
    """The description of tensor i, at the reader's position."""
    start = r.pos
    name = r.string(f"tensor {i}, name", MAX_NAME_BYTES)
    field = f"tensor {shown(name)}"
    at = r.pos
    n_dims = r.count(MAX_DIMS, f"{field}, number of dimensions", "I")
    dims = [r.scalar("Q", f"{field}, shape") for _ in range(n_dims)]
    if not dims or 0 in dims:
        raise r.error("the tensor has no elements", f"{field}, shape", at)
    number = r.scalar("I", f"{field}, type")
    kind, n_bytes = TENSOR_TYPES.get(number), -1
    if kind is not None:
        if dims[0] % kind.block:
            raise r.error(
                f"a row of {dims[0]} is no multiple of {kind.name}'s block of {kind.block}",
                f"{field}, shape",
                at,
            )
        # the product is exact: Python's integers have no limit
        n_bytes = math.prod(dims) // kind.block * kind.block_bytes
    offset = r.scalar("Q", f"{field}, offset")
    return _Info(name, type_name(number), tuple(reversed(dims)), n_bytes, offset, start)


def _with_larger_blocks(infos: list[_Info]) -> list[_Info]:
    """The same tensors. Those of a type in LARGER_BLOCKS have the larger blocks, which take fewer
    bytes, if one of them would not fit before the next tensor otherwise.
    """
    starts, tight, sized = sorted({info.offset for info in infos}), set[str](), list(infos)
    for info in infos:
        after = bisect.bisect_right(starts, info.offset)
        if after < len(starts) and info.n_bytes > starts[after] - info.offset:
            tight.add(info.type)
    for i, info in enumerate(infos):
        kind = LARGER_BLOCKS.get(info.type) if info.type in tight else None
        if kind and info.shape[-1] % kind.block == 0:
            n_bytes = math.prod(info.shape) // kind.block * kind.block_bytes
            sized[i] = info._replace(type=kind.name, n_bytes=n_bytes)
    return sized


def _sized(infos: list[_Info], end: int) -> list[_Info]:
    """The same tensors. One of a type of unknown size gets the bytes up to the next tensor, or to
    the end.
    """
    starts = sorted({*(info.offset for info in infos), end})
    sized = list[_Info]()
    for info in infos:
        if info.n_bytes < 0:
            after = bisect.bisect_right(starts, info.offset)
            room = starts[after] - info.offset if after < len(starts) else 1
            info = info._replace(n_bytes=room)
        sized.append(info)
    return sized


def _read_version(r: Reader) -> int:
    """Read magic and version. The error for another file says what that file seems to be."""
    head = r.map[:24]
    if head[:4] != b"GGUF":
        if b"GGUF".startswith(head):
            r.need(24, "magic")
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        guess = next((name for start, name in _OTHER_FILES if text.startswith(start.lower())), None)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < r.size:
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
    """The paths of all shards, in order; only `path` if the model is not split."""
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
    """Raise ModelFileError unless the shards are those of one model, in order and complete."""
    first, n_tensors = shards[0], sum(len(shard.tensors) for shard in shards)
    counts = [(s, "split.no", i) for i, s in enumerate(shards)]
    counts += [(s, "split.count", len(shards)) for s in shards]
    if "split.tensors.count" in first.metadata:
        counts.append((first, "split.tensors.count", n_tensors))
    for shard, key, expected in counts:
        value = shard.metadata.get(key)
        if value != expected:
            number = value if isinstance(value, (int, float)) else "no number"
            raise ModelFileError(
                f"is {number}, but by the shards' names and contents it must be {expected}",
                path=shard.path,
                field=f"key {key}",
            )
    if len({name for shard in shards for name in shard.tensors}) < n_tensors:
        raise ModelFileError("two shards have a tensor of the same name", path=first.path)


def _close(shards: list[_Shard]) -> None:
    for shard in shards:
        shard.close()
