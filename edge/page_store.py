"""Pages of computed prompts in a folder, so that they outlive the memory, and the process.

    <folder>/<key, hex>.page    header, then the page as it is in memory

The key is a hash of all that decides a page's bytes: the model, the form of its pages, and every
token up to the page's last. So files are never changed, only added and removed, and several
processes may share a folder. The least recently used ones make room for new ones.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from edge import forked, native
from edge.errors import InputError
from edge.memory import show
from edge.native import ffi, lib
from edge.store import only_one, replacing

__all__ = ["PageStore"]

_MOST = 1 << 30  # bytes of a folder
_VERSION = 1
_HEADER = struct.Struct("<8sQ32sQ2Q")  # magic, version, key, bytes of the page, checksum
_MAGIC = b"edgepage"
_SUFFIX, _SCRATCH = ".page", ".page-"


class PageStore:
    """A folder of pages; made when it is missing. Safe for several threads and processes.

    error: why the last page could not be written, None after one that was.
    Raises InputError for a folder that cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = _MOST) -> None:
        self.folder, self.limit = Path(os.fsdecode(folder)), limit
        self.error: str | None = None
        self._lock: threading.Lock | forked.Refusal = threading.Lock()
        forked.watch(self)
        self._threads = native.new_pool(1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with only_one(self.folder / ".lock") as is_only:
                self._make_room(0, is_only)
        except OSError as error:
            raise self._error(error) from error

    def has(self, key: bytes) -> bool:
        """Whether there is a file for this key; it may still turn out to be damaged."""
        return self._path(key).exists()

    def read(self, key: bytes, page: memoryview) -> bool:
        """Fill `page` with the page of this key, whole; False: it is not there.

        A file with anything wrong is removed; the page's bytes are undefined then.
        """
        path = self._path(key)
        try:
            with self._lock, open(path, "rb", buffering=0) as file:
                header = file.read(_HEADER.size)
                n = file.readinto(page)
                if n == len(page) and header == self._header(key, page) and not file.read(1):
                    os.utime(path)
                    return True
        except FileNotFoundError:
            return False
        except OSError:  # a disk that fails to read, or a file that is not ours to touch
            pass
        with contextlib.suppress(OSError):
            path.unlink()
        return False

    def write(self, key: bytes, page: memoryview, *, durable: bool = False) -> None:
        """Keep a page. durable: it survives a power cut from now on; without, the cut may leave a
        damaged file, which `read` removes.

        Raises InputError when it cannot be written: nothing is left of it then.
        """
        path = self._path(key)
        try:
            with self._lock, only_one(self.folder / ".lock") as is_only:
                if self._threads is None:
                    raise OSError("the model was closed")
                if not _touch(path, _HEADER.size + len(page)):
                    self._make_room(_HEADER.size + len(page), is_only)
                    self._write(path, key, page, durable)
            self.error = None
        except OSError as error:
            refusal = self._error(error)
            self.error = str(refusal)
            raise refusal from error

    def close(self) -> None:
        """Give the thread back."""
        if self._lock is forked.REFUSAL:
            return
        with self._lock:
            if self._threads is not None:
                ffi.release(self._threads)
            self._threads = None

    def _forked(self) -> None:
        self._lock = forked.REFUSAL

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}{_SUFFIX}"

    def _header(self, key: bytes, page: memoryview) -> bytes:
        """The header that a page's file has."""
        total = ffi.new("uint64_t[2]")
        with ffi.from_buffer("uint8_t[]", page) as data:
            native.check(lib.edge_checksum(self._threads, data, len(page), total))
        return _HEADER.pack(_MAGIC, _VERSION, key, len(page), *total)

    def _write(self, path: Path, key: bytes, page: memoryview, durable: bool) -> None:
        with replacing(path, _SCRATCH, durable=durable) as file:
            for part in (self._header(key, page), page):
                if file.write(part) != len(part):
                    raise OSError("the disk took only a part of it")

    def _make_room(self, n_bytes: int, is_only: bool) -> None:
        """Remove the least recently used files until n_bytes more fit, and scratch files that a
        process left behind. is_only: nobody writes one at present.
        """
        if n_bytes > self.limit:
            raise OSError(f"a page of {show(n_bytes)}, the limit is {show(self.limit)}")
        files = sorted(self._files(is_only))
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + n_bytes <= self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size

    def _files(self, is_only: bool) -> Iterator[tuple[int, int, str]]:
        """(nanoseconds of its last use, bytes, path) of each page."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    if entry.name.startswith(_SCRATCH) and is_only:
                        os.unlink(entry.path)
                    elif entry.name.endswith(_SUFFIX):
                        stat = entry.stat()
                        yield stat.st_mtime_ns, stat.st_size, entry.path

    def _error(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder}: prompts cannot be kept there: {error.strerror or error}; "
            "free some space, or name another folder as prefix_cache"
        )


def _touch(path: Path, n_bytes: int) -> bool:
    """Mark a file as used now; False: it is not there, or not whole."""
    try:
        if path.stat().st_size != n_bytes:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
