"""Files that are whole or not there, whatever happens while they are written."""

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
_LOCK_SECONDS = 5  # to wait for who holds a lock and shows no sign of work


@contextlib.contextmanager
def only_one(
    path: Path, *, seconds: float | None = None, at_work: Callable[[], object] | None = None
) -> Iterator[bool]:
    """Hold the lock file; False: this file system or platform has no locks.

    Who else holds it is waited for, some seconds (None: a few), and then as long as what `at_work`
    returns goes on to change: a process that was stopped must not stop all others.
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
    seen, since = None, time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = at_work() if seconds else None
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since >= seconds:
                raise TimeoutError(
                    errno.ETIMEDOUT, "another process holds this lock", str(path)
                ) from None
        except OSError:
            return False
        time.sleep(_POLL_SECONDS)


def _unlock(handle: int) -> None:
    """Closing is not enough: a child that was forked meanwhile has the file open, too."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def replacing(
    path: Path, prefix: str, *, durable: bool = False, mode: int = 0o666
) -> Iterator[FileIO]:
    """A scratch file beside `path`, named with a prefix, that takes its place when the block ends
    well, and is gone when it does not. durable: it survives a power cut; mode: who may read it,
    less what the umask forbids. Raises OSError.
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
    """Write all of it: unbuffered files may take less than they are given. Raises OSError.

    No view of the data is left behind: its memory may be used again.
    """
    done = 0
    with memoryview(data) as view:
        while done < len(view):
            with view[done:] as rest:
                done += file.write(rest)


def sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where folders can be synced (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
