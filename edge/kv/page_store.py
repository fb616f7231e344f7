"""Pages of computed prompts in a folder, where they outlive the process.

    <folder>/<key, hex>.page    header, then the page as it is in memory

The key is a hash of all that a page's bytes depend on: the model, the form of its pages, and every
token up to the page's last. So files are added and removed, but never changed, and several
processes may share a folder. The least recently used files are removed for new ones. A page reveals
the text that it was computed from, so only its owner may read it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from edge import forked, native
from edge.disk.atomic import only_one, replacing, write_all
from edge.disk.own import make_folder, open_own
from edge.disk.room import make_room, sweep
from edge.errors import InputError
from edge.native import ffi, lib
from edge.sizes import show

__all__ = ["PageStore"]

_MOST = 1 << 30  # bytes of a folder
_VERSION = 1
_HEADER = struct.Struct("<8sQ32sQ2Q")  # magic, version, key, bytes of the page, checksum
_MAGIC = b"edgepage"
_SUFFIX, _SCRATCH = ".page", ".page-"


class PageStore:
    """A folder of pages, made if it is missing. Safe for several threads and processes.

    error: why the last page could not be written; None: it was written.
    Raises InputError for a folder that cannot be made or written to, or that others can write to.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = _MOST) -> None:
        self.folder, self.limit = Path(os.fsdecode(folder)), limit
        self.error: str | None = None
        self._lock: threading.Lock | forked.Refusal = threading.Lock()
        forked.watch(self)
        self._threads = native.new_threads(1)
        try:
            make_folder(self.folder, 0o700)
            with (
                contextlib.suppress(TimeoutError),  # the process that writes there makes room
                only_one(self.folder / ".lock", seconds=0) as is_only,
            ):
                self._make_room(0, is_only)
        except OSError as error:
            raise self._error(error) from error

    def has(self, key: bytes) -> bool:
        """Whether this key has a file; the file may still turn out to be damaged."""
        return self._path(key).exists()

    def read(self, key: bytes, page: memoryview) -> bool:
        """Fill `page` with the page of this key. False: there is no file, or it is damaged.

        A damaged file is removed; the bytes of `page` are undefined then. Raises InputError once
        closed.
        """
        path = self._path(key)
        try:
            with os.fdopen(open_own(path, os.O_RDONLY), "rb", buffering=0) as file:
                header = file.read(_HEADER.size)
                n = file.readinto(page)
                if n == len(page) and header == self._header(key, page) and not file.read(1):
                    os.utime(path)
                    return True
        except FileNotFoundError:
            return False
        except OSError:  # the disk cannot be read, or the file is not ours
            pass
        with contextlib.suppress(OSError):
            path.unlink()
        return False

    def write(self, key: bytes, page: memoryview, *, durable: bool = False) -> None:
        """Write a page. durable: the page survives a power cut once this returns. Else a power cut
        may leave a damaged file, which `read` removes, and the page is skipped while another
        process writes one.

        Raises InputError when the page cannot be written; no part of it is left then.
        """
        path, n_bytes = self._path(key), _HEADER.size + len(page)
        try:
            if not _touch(path, n_bytes):
                header = self._header(key, page)
                lock = only_one(self.folder / ".lock", seconds=None if durable else 0)
                with lock as is_only:
                    self._make_room(n_bytes, is_only)
                    self._write(path, (header, page), durable)
            self.error = None
        except OSError as error:
            if isinstance(error, TimeoutError) and not durable:
                return
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
        """The header of a page's file. Raises InputError once closed."""
        total = ffi.new("uint64_t[2]")
        with self._lock, ffi.from_buffer("uint8_t[]", page) as data:
            if self._threads is None:
                raise InputError("the model was closed")
            native.check(lib.edge_checksum(self._threads, data, len(page), total))
        return _HEADER.pack(_MAGIC, _VERSION, key, len(page), *total)

    def _write(self, path: Path, parts: Sequence[bytes | memoryview], durable: bool) -> None:
        with replacing(path, _SCRATCH, durable=durable, mode=0o600) as file:
            for part in parts:
                write_all(file, part)

    def _make_room(self, n_bytes: int, is_only: bool) -> None:
        """Remove the least recently used files until n_bytes more fit, and scratch files that a
        process left behind. is_only: no other process writes a file now.
        """
        sweep(self.folder, _SCRATCH, is_only, Path.unlink)
        if not make_room(n_bytes, self.limit, self._page_files(), _remove):
            raise OSError(f"a page of {show(n_bytes)}, the limit is {show(self.limit)}")

    def _page_files(self) -> list[tuple[Path, int]]:
        """The files of pages and their sizes in bytes, the least recently used first."""
        files = list[tuple[int, int, Path]]()  # time of last use, bytes
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                stats = path.lstat()
                files.append((stats.st_mtime_ns, stats.st_size, path))
        return [(path, size) for _, size, path in sorted(files)]

    def _error(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder}: prompts cannot be kept there: {error.strerror or error}; "
            "put that right, or name another folder as prefix_cache"
        )


def _remove(path: Path) -> int:
    """Remove a page. Returns the bytes that this freed."""
    try:
        n_bytes = path.lstat().st_size
        path.unlink()
    except FileNotFoundError:  # another process removed it
        return 0
    return n_bytes


def _touch(path: Path, n_bytes: int) -> bool:
    """Mark a file as used now. False: there is no such file, or it is not whole."""
    try:
        stats = path.lstat()
        if stats.st_size != n_bytes or not stat.S_ISREG(stats.st_mode):
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
