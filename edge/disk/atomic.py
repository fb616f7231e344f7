"""Files that are either complete or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO

from edge.disk.own import open_own

__all__ = ["only_one", "replacing", "sync_folder", "write_all"]

_POLL_SECONDS = 0.1
_LOCK_SECONDS = 5  # how long to wait for a holder of the lock that shows no progress


@contextlib.contextmanager
def only_one(
    path: Path, *, seconds: float | None = None, at_work: Callable[[], object] | None = None
) -> Iterator[bool]:
    """Hold a lock file while the block runs; False: this file system or platform has no locks.

    Waits for another process that holds the lock as long as the value of `at_work` changes at least
    once in so many seconds (None: 5). So a process that hangs does not block all others.
    Raises TimeoutError, and OSError for a lock file that cannot be opened or is not ours.
    """
    handle = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        patience = _LOCK_SECONDS if seconds is None else seconds
        yield _lock(handle, path, patience, at_work or (lambda: None))
    finally:
        _unlock(handle)
        os.close(handle)


def _lock(handle: int, path: Path, seconds: float, at_work: Callable[[], object]) -> bool:
    """See `only_one`."""
    try:
        import fcntl
    except ImportError:
        return False
    last, since = None, time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            state = at_work() if seconds else None
            if state != last:
                last, since = state, time.monotonic()
            elif time.monotonic() - since >= seconds:
                raise TimeoutError(
                    errno.ETIMEDOUT, "another process holds this lock", str(path)
                ) from None
        except OSError:
            return False
        time.sleep(_POLL_SECONDS)


def _unlock(handle: int) -> None:
    """Release the lock. Closing the file is not enough: a forked child may have it open, too."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def replacing(
    path: Path, prefix: str, *, durable: bool = False, mode: int = 0o666
) -> Iterator[FileIO]:
    """A scratch file beside `path`. It replaces `path` when the block ends, and is removed when the
    block raises.

    prefix: how its name begins. durable: whether the new file survives a power cut. mode: its
    permissions, without those that the umask forbids. Raises OSError.
    """
    scratch = path.with_name(f"{prefix}{secrets.token_hex(8)}")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    try:
        with open(scratch, "x+b", buffering=0, opener=opener) as file:
            yield file
            if durable:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    if durable:
        sync_folder(path.parent)


def write_all(file: FileIO | IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Write all of the data: an unbuffered file may take less in one call. Raises OSError.

    No view of the data remains, so its memory may be used again.
    """
    n_written = 0
    with memoryview(data) as view:
        while n_written < len(view):
            with view[n_written:] as rest:
                n_written += file.write(rest)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut; Windows cannot sync folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
