"""Files and folders that nobody but we can have written: what is in them may be trusted."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["SAFELY", "is_own", "make_folder", "open_own"]

#: Flags of os.open: links are not followed, and pipes and devices not waited for.
SAFELY = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def make_folder(folder: Path, mode: int = 0o755) -> None:
    """Make a folder, or take one that is there and where no other user can put or change files.

    mode: who may read a new one, less what the umask forbids. Raises OSError; its strerror says
    what is wrong with one that is there.
    """
    folder.mkdir(mode, parents=True, exist_ok=True)
    objection = _objection(os.stat(folder))  # of the folder, which may be behind a link
    if objection:
        raise PermissionError(errno.EPERM, objection, str(folder))


def is_own(path: Path) -> bool:
    """Whether it, or what it links to, is a file that nobody but we, and root, can have written.
    Raises OSError.
    """
    found = os.stat(path)
    return stat.S_ISREG(found.st_mode) and not _objection(found)


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """A handle of a regular file that nobody but we, and root, can write to; one that it makes is
    for us alone.

    Links are not followed, pipes and devices not waited for. Raises OSError.
    """
    handle = os.open(path, flags | SAFELY, 0o600)
    found = os.fstat(handle)
    objection = _objection(found) if stat.S_ISREG(found.st_mode) else "it is no regular file"
    if objection:
        os.close(handle)
        raise PermissionError(errno.EPERM, objection, os.fspath(path))
    return handle


def _objection(found: os.stat_result) -> str:
    """Why another user could have written this; "" where nobody but we, and root, could, and where
    files have no owners (Windows).
    """
    if not hasattr(os, "geteuid"):
        return ""
    if found.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    return "everybody may write to it" if found.st_mode & stat.S_IWOTH else ""
