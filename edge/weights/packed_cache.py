"""Packed models in the cache folder: found by what they were made from, made when missing.

    <cache>/packed/<model's file name>-<key, 16 digits>.gguf

A file there is used when its header, its key and all its data check out; else it is made again.
The least recently used ones make room for a new one. Whatever the disk refuses, a run goes on
with weights in memory of its own; so it does where another user could write what it would map.
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
from typing import Any

from edge.disk import room
from edge.disk.atomic import only_one, replacing
from edge.disk.own import is_own
from edge.disk.room import cache_dir
from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.native import lib
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

_SAMPLE = SAMPLED_BYTES // 3  # of a tensor's start, middle and end go into the key
_SCRATCH = ".pack-"


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache. model: the model's name, None: unknown; used: seconds since 1970."""

    path: Path
    model: str | None
    n_bytes: int
    used: float


def folder() -> Path:
    """Where the packed files are; not created here. Raises UnsupportedError, as `cache_dir`."""
    return cache_dir() / "packed"


def limit() -> int:
    """Bytes that packed files may take, see `room.limit`. Raises InputError, OSError."""
    return room.limit(folder(), sum(_size(path) for path in _paths()))


def files() -> list[CachedFile]:
    """The packed files, the last used first."""
    found = []
    for path in _paths():
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append(CachedFile(path, _model_name(path), stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda file: -file.used)


def clear() -> int:
    """Remove all packed files; those in use stay in memory. Returns bytes. Raises OSError."""
    if not folder().is_dir():
        return 0
    with only_one(folder() / ".lock") as is_only:
        room.sweep(folder(), _SCRATCH, is_only, _remove)
        return sum(_remove(path) for path in _paths())


def key_of(gguf: GGUF, weights: RawWeights) -> str:
    """The key of a model's packed file: SHA-256, hex, over what decides its bytes.

    Headers, sizes and times of its files, samples of every tensor, versions, forms. The samples
    alone do not tell a file that was changed in one place; its time does. Raises OSError.
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
    sha.update(b"".join(samples))  # at once: each update lets another thread have the GIL
    items = sorted(weights.items(), key=lambda item: item.name)  # contexts differ in order
    sha.update("\n".join(f"{item.name} {item.form} {item.n_bytes}" for item in items).encode())
    return sha.hexdigest()


@dataclass(frozen=True)
class Job:
    """A packed file to make. key: see `key_of`; whole: take the vocabulary along: the file can
    stand alone then, and is synced to the disk.
    """

    gguf: GGUF
    weights: RawWeights
    key: str
    whole: bool = False

    @classmethod
    def of(cls, gguf: GGUF, weights: RawWeights, *, whole: bool = False) -> Job:
        """With the key of these weights. Raises OSError."""
        return cls(gguf, weights, key_of(gguf, weights), whole)


class CachedWeights(RawWeights):
    """Those of a GGUF, which are mapped from the cache where that can be."""

    def load(self, threads: Any, progress: Progress | None = None) -> None:
        """Map them from a packed file, or pack them into memory. See `Weights`; raises InputError
        for a bad EDGE_CACHE_SIZE, too.
        """
        found = find_or_make(self._source, self, threads, progress)
        if found is None:
            super().load(threads, progress)
            return
        with found:
            self.use(found)


def find_or_make(
    gguf: GGUF, weights: RawWeights, threads: Any, progress: Progress | None = None
) -> PackedFile | None:
    """A verified packed file of these weights; None: the cache is off, or the disk refuses.

    Raises ModelFileError for NaN or infinity in a tensor, InputError for a bad EDGE_CACHE_SIZE;
    warns of a folder that is not ours alone to write to.
    """
    try:
        most = limit()
        if most == 0 or not room.can_keep(folder()):
            return None
        job = Job.of(gguf, weights)
        stem = os.path.basename(gguf.path).removesuffix(".gguf")[:100]
        path = folder() / f"{stem}-{job.key[:16]}.gguf"
        found = _use(path, job.key, threads, progress)
        return found or _make(path, job, most, threads, progress)
    except (OSError, MemoryError, UnsupportedError):  # unsupported: there is no home folder
        return None


def write_to(path: Path, job: Job, threads: Any, progress: Progress | None = None) -> None:
    """Pack into a scratch file beside `path`, and rename.

    Raises OSError, MemoryError, ModelFileError for NaN or infinity in a tensor.
    """
    gguf, weights = job.gguf, job.weights
    header = packed.Header(weights.items(), job.key, job.whole, gguf.metadata, gguf.headers()[0])
    if shutil.disk_usage(path.parent).free < header.n_data:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    # In the cache nothing is synced: a file torn by a power cut fails its checksums, and is made
    # again. That is cheaper than to wait for the disk after each packing.
    with replacing(path, _SCRATCH, durable=job.whole) as file:
        pieces = weights.pieces(threads, progress)
        with contextlib.closing(pieces):
            packed.write(file, header, pieces, lambda data: packed.checksums(threads, data))


def _use(path: Path, key: str, threads: Any, progress: Progress | None) -> PackedFile | None:
    """The file, verified, when it is there and right; one that is damaged or foreign goes."""
    gguf = None
    try:
        if path.exists() and not is_own(path):
            raise ModelFileError("another user can write to it", path=path, field="owner")
        gguf = GGUF.open(path)
        found = PackedFile(gguf)
        if found.key != key:
            raise ModelFileError("it was made from another model", path=path, field="key")
        found.verify(threads, progress)
    except BaseException as error:
        if gguf is not None:
            gguf.close()
        if not isinstance(error, (ModelFileError, UnsupportedError)):
            raise
        if not isinstance(error, ModelFileError) or error.field:  # else: it cannot be opened
            with contextlib.suppress(OSError):
                path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used: the others go first
    return found


def _make(
    path: Path, job: Job, most: int, threads: Any, progress: Progress | None
) -> PackedFile | None:
    """Pack, unless another process does so right now, then use the file. most: bytes that packed
    files may take. Raises OSError.
    """
    with only_one(path.parent / ".lock", at_work=_scratch_bytes) as is_only:
        found = _use(path, job.key, threads, progress)
        if found is not None:
            return found
        room.sweep(folder(), _SCRATCH, is_only, _remove)
        held = [(old, _size(old)) for old in sorted(_paths(), key=_time)]
        n_bytes = job.weights.n_bytes + sum(map(len, job.gguf.headers()))
        if not room.make_room(n_bytes, most, held, _remove):
            return None
        write_to(path, job, threads, progress)
        return _use(path, job.key, threads, None)


def _scratch_bytes() -> list[int]:
    """How far those who pack are."""
    return [_size(path) for path in folder().glob(f"{_SCRATCH}*")]


def _paths() -> Iterator[Path]:
    return folder().glob("*.gguf")


def _remove(path: Path) -> int:
    """Bytes that went; 0 when it is in use (on Windows), or not ours to remove."""
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
