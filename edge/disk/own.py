"""Files and folders that no other user can have written, so that their content can be trusted."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["SAFELY", "is_own", "make_folder", "open_own"]

#: Flags of os.open: do not follow links, do not wait for pipes and devices.
SAFELY = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def make_folder(folder: Path, mode: int = 0o755) -> None:
    """Make a folder, or accept an existing one where no other user can add or change files.

    mode: the permissions of a new folder, without those that the umask forbids. Raises OSError; its
    strerror says what is wrong with an existing folder.
    """
    folder.mkdir(mode, parents=True, exist_ok=True)
    objection = _objection(os.stat(folder))  # stat follows a link to the folder itself
    if objection:
        raise PermissionError(errno.EPERM, objection, str(folder))


def is_own(path: Path) -> bool:
    """Whether this is a regular file, or a link to one, that only we and root can have written.
    Raises OSError.
    """
    status = os.stat(path)
    return stat.S_ISREG(status.st_mode) and not _objection(status)


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """A handle of a regular file that only we and root can write to. Only we can read and write a
    file that this call creates.

    Links are not followed, pipes and devices not waited for. Raises OSError.
    """
    handle = os.open(path, flags | SAFELY, 0o600)
    status = os.fstat(handle)
    objection = _objection(status) if stat.S_ISREG(status.st_mode) else "it is no regular file"
    if objection:
        os.close(handle)
        raise PermissionError(errno.EPERM, objection, os.fspath(path))
    return handle


def _objection(status: os.stat_result) -> str:
    """Why another user could have written this; "": only we and root could, or files have no owners
    here (Windows).
    """
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    return "everybody may write to it" if status.st_mode & stat.S_IWOTH else ""
