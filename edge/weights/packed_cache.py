"""Packed models in the cache folder: found by a key of their source, made when missing.

    <cache>/packed/<model's file name>-<key, 16 digits>.gguf

A file is used when its header, its key and all its data are right; else it is made again. The least
recently used files are removed to make room for a new one. Where the disk fails, or where another
user could write to the folder, the weights are packed into memory instead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge.disk import room
from edge.disk.atomic import only_one, replacing
from edge.disk.own import is_own
from edge.disk.room import cache_dir
from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.native import CData, lib
from edge.progress import Progress
from edge.weights import packed
from edge.weights.packed import PackedFile
from edge.weights.weights import SAMPLED_BYTES, RawWeights

__all__ = [
    "CachedFile",
    "CachedWeights",
    "Job",
    "clear",
    "files",
    "find_or_make",
    "folder",
    "key_of",
    "limit",
    "write_to",
]

_SAMPLE = SAMPLED_BYTES // 3  # bytes of a tensor's start, middle and end that the key hashes
_SCRATCH = ".pack-"


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache. model: the model's name, None: unknown; used: the last time, in seconds
    since 1970.
    """

    path: Path
    model: str | None
    n_bytes: int
    used: float


def folder() -> Path:
    """The folder of packed files, not created here. Raises UnsupportedError, as `cache_dir`."""
    return cache_dir() / "packed"


def limit() -> int:
    """Bytes that packed files may take, see `room.limit`. Raises InputError, OSError."""
    return room.limit(folder(), sum(_size(path) for path in _paths()))


def files() -> list[CachedFile]:
    """The packed files, the last used first."""
    cached = []
    for path in _paths():
        with contextlib.suppress(OSError):
            stat = path.stat()
            cached.append(CachedFile(path, _model_name(path), stat.st_size, stat.st_mtime))
    return sorted(cached, key=lambda file: -file.used)


def clear() -> int:
    """Remove all packed files; maps of them stay valid. Returns the freed bytes. Raises OSError."""
    if not folder().is_dir():
        return 0
    with only_one(folder() / ".lock") as is_only:
        room.sweep(folder(), _SCRATCH, is_only, _remove)
        return sum(_remove(path) for path in _paths())


def key_of(gguf: GGUF, weights: RawWeights) -> str:
    """The key of a model's packed file: SHA-256, in hex, of everything that its bytes depend on.

    These are headers, sizes and times of the source's files, samples of every tensor, versions and
    forms. Samples alone would miss a change in another place of a file; its time shows that.
    Raises OSError.
    """
    sha = hashlib.sha256(struct.pack("<II", packed.VERSION, lib.edge_layout_version()))
    for path, header in zip(gguf.paths, gguf.headers(), strict=True):
        stat = os.stat(path)
        sha.update(struct.pack("<QQ", stat.st_size, stat.st_mtime_ns))
        sha.update(header)
    samples = list[bytes]()
    for tensor in gguf.tensors.values():
        data = tensor.data
        for start in (0, (len(data) - _SAMPLE) // 2, len(data) - _SAMPLE):
            samples.append(bytes(data[max(0, start) : max(0, start) + _SAMPLE]))
    gguf.forget()
    sha.update(b"".join(samples))  # in one call: each call gives the GIL to another thread
    items = sorted(weights.items(), key=lambda item: item.name)  # the context decides their order
    sha.update("\n".join(f"{item.name} {item.form} {item.n_bytes}" for item in items).encode())
    return sha.hexdigest()


@dataclass(frozen=True)
class Job:
    """A packed file to make. key: see `key_of`; whole: whether to include the vocabulary, so that
    the file is complete without its source; it is also synced to the disk then.
    """

    gguf: GGUF
    weights: RawWeights
    key: str
    whole: bool = False

    @classmethod
    def of(cls, gguf: GGUF, weights: RawWeights, *, whole: bool = False) -> Job:
        """A job with the key of these weights. Raises OSError."""
        return cls(gguf, weights, key_of(gguf, weights), whole)


class CachedWeights(RawWeights):
    """The weights of a GGUF, mapped from a packed file of the cache where that is possible."""

    def load(self, threads: CData, progress: Progress | None = None) -> None:
        """Map them from a packed file, or pack them into memory. See `Weights`; also raises
        InputError for a bad EDGE_CACHE_SIZE.
        """
        file = find_or_make(self._source, self, threads, progress)
        if file is None:
            super().load(threads, progress)
            return
        with file:
            self.use(file)


def find_or_make(
    gguf: GGUF, weights: RawWeights, threads: CData, progress: Progress | None = None
) -> PackedFile | None:
    """A verified packed file of these weights; None: the cache is off, or the disk fails.

    Raises ModelFileError for NaN or infinity in a tensor, InputError for a bad EDGE_CACHE_SIZE.
    Warns of a folder that other users can write to.
    """
    try:
        most = limit()
        if most == 0 or not room.can_keep(folder()):
            return None
        job = Job.of(gguf, weights)
        stem = os.path.basename(gguf.path).removesuffix(".gguf")[:100]
        path = folder() / f"{stem}-{job.key[:16]}.gguf"
        file = _use(path, job.key, threads, progress)
        return file or _make(path, job, most, threads, progress)
    except (OSError, MemoryError, UnsupportedError):  # UnsupportedError: there is no home folder
        return None


def write_to(path: Path, job: Job, threads: CData, progress: Progress | None = None) -> None:
    """Pack into a scratch file beside `path`, and rename it to `path`.

    Raises OSError, MemoryError, ModelFileError for NaN or infinity in a tensor.
    """
    gguf, weights = job.gguf, job.weights
    header = packed.Header(weights.items(), job.key, job.whole, gguf.metadata, gguf.headers()[0])
    if shutil.disk_usage(path.parent).free < header.n_data:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    # A file of the cache is not synced: if a power cut damages it, its checksums fail, and it is
    # made again. That is cheaper than waiting for the disk after each packing.
    with replacing(path, _SCRATCH, durable=job.whole) as file:
        pieces = weights.pieces(threads, progress)
        with contextlib.closing(pieces):
            packed.write(file, header, pieces, lambda data: packed.checksums(threads, data))


def _use(path: Path, key: str, threads: CData, progress: Progress | None) -> PackedFile | None:
    """The file, verified; None: it is missing or wrong. A damaged or foreign file is removed."""
    gguf = None
    try:
        if path.exists() and not is_own(path):
            raise ModelFileError("another user can write to it", path=path, field="owner")
        gguf = GGUF.open(path)
        file = PackedFile(gguf)
        if file.key != key:
            raise ModelFileError("it was made from another model", path=path, field="key")
        file.verify(threads, progress)
    except BaseException as error:
        if gguf is not None:
            gguf.close()
        if not isinstance(error, (ModelFileError, UnsupportedError)):
            raise
        if not isinstance(error, ModelFileError) or error.field:  # no field: it cannot be opened
            with contextlib.suppress(OSError):
                path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the last used file is removed last
    return file


def _make(
    path: Path, job: Job, most: int, threads: CData, progress: Progress | None
) -> PackedFile | None:
    """Make the file, or wait for another process that is making it, and use it. most: bytes that
    packed files may take. Raises OSError.
    """
    with only_one(path.parent / ".lock", at_work=_scratch_bytes) as is_only:
        file = _use(path, job.key, threads, progress)
        if file is not None:
            return file
        room.sweep(folder(), _SCRATCH, is_only, _remove)
        held = [(old, _size(old)) for old in sorted(_paths(), key=_time)]
        n_bytes = job.weights.n_bytes + sum(map(len, job.gguf.headers()))
        if not room.make_room(n_bytes, most, held, _remove):
            return None
        write_to(path, job, threads, progress)
        return _use(path, job.key, threads, None)


def _scratch_bytes() -> list[int]:
    """Bytes that each running packing has written."""
    return [_size(path) for path in folder().glob(f"{_SCRATCH}*")]


def _paths() -> Iterator[Path]:
    return folder().glob("*.gguf")


def _remove(path: Path) -> int:
    """Remove a file; returns the freed bytes. 0: it is in use (on Windows), or another user's."""
    n_bytes = _size(path)
    try:
        path.unlink()
    except OSError:
        return 0
    return n_bytes


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.lstat().st_size
    return 0


def _time(path: Path) -> float:
    """When the file was last used, in seconds since 1970."""
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


def _model_name(path: Path) -> str | None:
    try:
        with GGUF.open(path) as gguf:
            name = gguf.metadata.get("general.name")
    except EdgeError:
        return None
    return name if isinstance(name, str) else None
