"""The folders of the cache: where they are, and how much they may hold."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from edge.disk.own import make_folder
from edge.errors import EdgeWarning, UnsupportedError
from edge.sizes import parse_size

__all__ = ["cache_dir", "can_keep", "limit", "make_room", "sweep"]

_MOST = 20 << 30  # bytes of a folder of the cache, unless EDGE_CACHE_SIZE says otherwise
_SCRATCH_SECONDS = 86400  # without locks, scratch of this age is taken for abandoned


def cache_dir() -> Path:
    """The folder of models, packed weights and the chat's history; it is not created here.

    `EDGE_CACHE`, else `edge` in the platform's cache folder (`XDG_CACHE_HOME`, `~/.cache`).
    Raises UnsupportedError when there is no home folder to put it in.
    """
    if chosen := os.environ.get("EDGE_CACHE"):
        return Path(chosen).absolute()
    try:
        return _platform_cache() / "edge"
    except RuntimeError:
        raise UnsupportedError(
            "there is no home folder for the cache: set EDGE_CACHE to a folder", what="cache"
        ) from None


def limit(folder: Path, held: int) -> int:
    """Bytes that the files of a folder of the cache may take: EDGE_CACHE_SIZE, else half of the
    disk's free bytes and those that the files take now (`held`), at most 20 GiB.

    Raises InputError for a setting that is not a size, OSError.
    """
    if setting := os.environ.get("EDGE_CACHE_SIZE"):
        return parse_size(setting, "EDGE_CACHE_SIZE")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return min(_MOST, (shutil.disk_usage(folder).free + held) // 2)


def can_keep(folder: Path) -> bool:
    """Make a folder of the cache, see `make_folder`. Where another user could put files into it,
    warn and return False: edge runs without a cache. Raises OSError where it cannot be made.
    """
    try:
        make_folder(folder)
    except PermissionError as error:
        if error.errno != errno.EPERM:  # an error of the system, not of `make_folder`
            raise
        warnings.warn(
            f"{folder}: {error.strerror}: nothing is kept there", EdgeWarning, stacklevel=2
        )
        return False
    return True


def make_room(
    n_bytes: int, most: int, held: Sequence[tuple[Path, int]], remove: Callable[[Path], int]
) -> bool:
    """Remove entries of a cache until n_bytes more fit into `most` bytes; False: they cannot fit.

    held: the entries and their bytes, the least recently used first; remove: removes an entry and
    returns the bytes that this freed.
    """
    if n_bytes > most:
        return False
    used = sum(size for _, size in held)
    for path, _ in held:
        if used + n_bytes <= most:
            break
        used -= remove(path)
    return True


def sweep(folder: Path, prefix: str, is_only: bool, remove: Callable[[Path], object]) -> None:
    """Remove the scratch that killed processes have left: all of it where this process is the only
    one (is_only), else scratch that is older than a day.
    """
    oldest = time.time() if is_only else time.time() - _SCRATCH_SECONDS
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime <= oldest:
                remove(path)


def _platform_cache() -> Path:
    """The platform's cache folder. Raises RuntimeError when there is no home folder."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
