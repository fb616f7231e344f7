"""Files from servers: resumed where a connection or a process ended, checked, whole or absent.

The bytes go to `NAME.edge.incomplete` beside the target. That file stays when the connection, the
disk or the process fails, and the next call goes on behind it. A file that is complete and right is
renamed to the target. The client is the standard library's: that of huggingface_hub begins anew
after a kill, and differs between its versions.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import http.client
import os
import re
import secrets
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

from edge.disk.atomic import only_one, sync_folder, write_all
from edge.disk.own import SAFELY
from edge.errors import ModelFileError
from edge.progress import Progress, silent
from edge.sizes import show
from edge.version import __version__

__all__ = ["INCOMPLETE", "Remote", "fetch", "probe", "read_page", "start"]

#: How the name of a file ends that is not complete.
INCOMPLETE = ".edge.incomplete"

_BLOCK = 1 << 18  # bytes of a read at most; what is lost when the process is killed
_MOST_PAGE = 16 << 20
_TIMEOUT = 20  # seconds without a byte
_TRIES = 5  # failures in a row, with no byte between them
_MOST_WAIT = 60  # seconds that a server may ask to wait without an error
_PATIENCE = 120  # seconds that another process may hold the lock without progress
_RESERVE = 16 << 20  # bytes that stay free on the disk


@dataclass(frozen=True)
class Remote:
    """A file on a server.

    name: for messages; n_bytes: its length, None: not known yet; digest: its SHA-256, or the SHA-1
    of a git blob, in hex; "": not known; headers: of requests; etag: what names the version, where
    the server says it.
    """

    url: str
    name: str
    n_bytes: int | None = None
    digest: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    etag: str = ""


class _DiskError(Exception):
    """An OSError of the disk, as its cause: those of the network are another matter."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; a token goes to no other host."""

    def redirect_request(self, req: urllib.request.Request, *answer: Any) -> Any:
        """See the base class."""
        new = super().redirect_request(req, *answer)
        if new is not None and _origin(new.full_url) != _origin(req.full_url):
            new.remove_header("Authorization")
        return new


def probe(remote: Remote) -> Remote:
    """The same file, with its length and version as the server says them. Raises ModelFileError."""
    with _translated(remote), _open(remote, 0, 1) as response:
        n_bytes = _length(response)
        etag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if n_bytes is None:
            raise ModelFileError("the server does not say how long it is", path=remote.name)
        return replace(remote, n_bytes=n_bytes, etag=etag)


def start(remote: Remote, target: Path, n_bytes: int) -> None:
    """Let target have the first n_bytes of a file, or all of a shorter one: what it lacks is
    fetched. Raises ModelFileError.
    """
    with open(target, "ab") as file, _translated(remote):
        have = file.tell()
        with _open(remote, have, n_bytes - have) as response:
            if response.status != 206:
                file.truncate(have := 0)
            left = n_bytes - have
            while left > 0 and (block := response.read(min(_BLOCK, left))):
                file.write(block)
                left -= len(block)


def read_page(remote: Remote) -> bytes:
    """All of a small file, such as a page of an index. Raises ModelFileError."""
    with _translated(remote), _open(remote, 0) as response:
        page: bytes = response.read(_MOST_PAGE + 1)
        if len(page) > _MOST_PAGE:
            raise ModelFileError(f"it has more than {show(_MOST_PAGE)}", path=remote.name)
        return page


def fetch(
    remote: Remote,
    target: Path,
    *,
    lock: Path,
    progress: Progress | None = None,
) -> bool:
    """Fetch a file to target, unless it is there; False: it was, or another process fetched it.

    lock: a file that all who fetch to this target hold. progress(bytes done, bytes in all).
    Raises ModelFileError when it cannot be fetched or written, or is not what it should be.
    """
    version = f".{_tag(remote)}" if not remote.digest else ""
    part = target.with_name(f"{target.name}{version}{INCOMPLETE}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with only_one(lock, seconds=_PATIENCE, at_work=lambda: _size(part)) as is_only:
            if target.exists():
                return False
            if is_only:
                _complete(remote, part, target, progress or silent)
                return True
            alone = part.with_name(f"{target.name}.{secrets.token_hex(4)}{INCOMPLETE}")
            try:  # without locks, nobody else may append to this file
                _complete(remote, alone, target, progress or silent)
            finally:
                alone.unlink(missing_ok=True)
            return True
    except TimeoutError:
        raise ModelFileError(
            "another process fetches it, and has made no progress for "
            f"{_PATIENCE} seconds: end that process, or try again later",
            path=remote.name,
        ) from None
    except OSError as e:
        raise ModelFileError(f"cannot be fetched: {e.strerror or e}", path=target) from e


def _complete(remote: Remote, part: Path, target: Path, progress: Progress) -> None:
    """Fetch what `part` lacks, check it, and rename it to target."""
    handle = os.open(part, os.O_RDWR | os.O_CREAT | SAFELY, 0o666)
    with open(handle, "r+b", buffering=0) as file:
        transfer = _Transfer(remote, file, progress)
        try:
            transfer.run()
        except _DiskError as e:
            raise _no_room(remote, part, e.__cause__) from e
        try:
            transfer.check()
        except ModelFileError:
            part.unlink(missing_ok=True)
            raise
        try:
            os.fsync(file.fileno())
        except OSError as e:
            raise _no_room(remote, part, e) from e
    os.replace(part, target)
    sync_folder(target.parent)


class _Transfer:
    """One file on its way: what is there already, and its digest so far."""

    def __init__(self, remote: Remote, file: FileIO, progress: Progress) -> None:
        self._remote, self._file, self._progress = remote, file, progress
        self._total = remote.n_bytes
        self._digest: Any = None
        self._done = 0

    def run(self) -> None:
        """Fetch until the file is complete; go on after connections that were cut.

        Raises ModelFileError, _DiskError.
        """
        self._restart(keep=True)
        failures = 0
        while self._total is None or self._done < self._total:
            before = self._done
            wait = 0.0
            try:
                with _open(self._remote, self._done) as response:
                    self._receive(response)
                why = "the connection was cut"
            except urllib.error.HTTPError as e:
                if e.code == 416 and self._done:  # what is here is longer than the file
                    self._restart(keep=False)
                elif (seconds := _retry_after(e)) is None or seconds > _MOST_WAIT:
                    raise _refused(self._remote, e, self._done) from e
                else:
                    wait = seconds
                why = f"the server says {e.code}"
            except (OSError, http.client.HTTPException) as e:
                why = _reason(e)
            failures = 0 if self._done > before else failures + 1
            if failures > _TRIES:
                raise ModelFileError(
                    f"cannot be fetched: {why}, {failures} times in a row; {show(self._done)} are "
                    "kept: the same command goes on behind them",
                    path=self._remote.name,
                )
            if self._total is None or self._done < self._total:
                _sleep(max(wait, 2.0 ** (failures - 2) if failures else 0.0))

    def check(self) -> None:
        """Raise ModelFileError unless the complete file is what it should be."""
        found, wanted, why = self._digest.hexdigest(), self._remote.digest, ""
        if self._done != self._total:
            why = f"more than the {self._total} bytes came that the server stated"
        elif wanted and found != wanted:
            kind = "SHA-256" if len(wanted) == 64 else "git hash"
            why = f"its {kind} is {found}, the server states {wanted}"
        if why:
            raise ModelFileError(f"{why}: it was discarded, fetch it again", path=self._remote.name)

    def _receive(self, response: Any) -> None:
        """Write what a response brings."""
        length = _length(response)
        if response.status != 206:
            if self._done:  # the server sends the file from its start
                self._restart(keep=False)
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {self._done}-"):
            raise http.client.HTTPException("other bytes came than were asked for")
        if self._total is None:
            if length is None:
                raise ModelFileError(
                    "the server does not say how long it is", path=self._remote.name
                )
            self._total = length
            self._restart(keep=False)
        elif length is not None and length != self._total:
            raise ModelFileError(
                f"the server sends {length} bytes, it stated {self._total}: try again later",
                path=self._remote.name,
            )
        self._require_room()
        while self._done <= self._total and (block := response.read1(_BLOCK)):
            self._write(block)
            self._progress(min(self._done, self._total), self._total)

    def _write(self, block: bytes) -> None:
        try:
            write_all(self._file, block)
        except OSError as e:
            raise _DiskError from e
        self._digest.update(block)
        self._done += len(block)

    def _restart(self, *, keep: bool) -> None:
        """Begin with the bytes of the file that are here, or with none."""
        try:
            size = os.fstat(self._file.fileno()).st_size
            if not keep or self._total is None or size > self._total:
                self._file.truncate(0)
            self._file.seek(0)
            self._digest, self._done = self._new_digest(), 0
            while block := self._file.read(_BLOCK):
                self._digest.update(block)
                self._done += len(block)
        except OSError as e:
            raise _DiskError from e

    def _new_digest(self) -> Any:
        if len(self._remote.digest) == 40:  # as git names a blob
            return hashlib.sha1(b"blob %d\0" % (self._total or 0), usedforsecurity=False)
        return hashlib.sha256()

    def _require_room(self) -> None:
        """Raise ModelFileError unless the disk has room for the rest."""
        rest = (self._total or 0) - self._done
        free = _free_bytes(self._file)
        if free is not None and rest + _RESERVE > free:
            raise ModelFileError(
                f"{show(rest)} are to come, the disk has {show(free)} free: make room, and run the "
                "same command again",
                path=self._remote.name,
            )


def _free_bytes(file: FileIO) -> int | None:
    """Bytes that an open file's disk has for us; None: the system does not say."""
    try:
        status = os.fstatvfs(file.fileno())
    except (AttributeError, OSError):
        return None
    return status.f_bavail * status.f_frsize


@contextlib.contextmanager
def _translated(remote: Remote) -> Iterator[None]:
    """Raise ModelFileError for errors of one request."""
    try:
        yield
    except urllib.error.HTTPError as e:
        raise _refused(remote, e, 0) from e
    except (OSError, http.client.HTTPException) as e:
        raise ModelFileError(f"cannot be fetched: {_reason(e)}", path=remote.name) from e


def _open(remote: Remote, first: int, n_bytes: int | None = None) -> Any:
    """The response to a request for bytes from `first` on. Raises OSError, HTTPException."""
    last = "" if n_bytes is None else first + n_bytes - 1
    headers = {"User-Agent": f"edge-run/{__version__}", "Accept-Encoding": "identity"}
    headers |= remote.headers
    if first or n_bytes is not None:
        headers["Range"] = f"bytes={first}-{last}"
    if first and remote.etag.startswith('"'):
        headers["If-Range"] = remote.etag  # all of it, if there is another version now
    request = urllib.request.Request(remote.url, headers=headers)
    return _opener().open(request, timeout=_TIMEOUT)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """What opens URLs: made once, for it reads all certificates, which takes a second on a Pi."""
    context = ssl.create_default_context()
    default = ssl.get_default_verify_paths().cafile
    more = {os.environ.get(name, "") for name in ("REQUESTS_CA_BUNDLE", "PIP_CERT")} - {default, ""}
    if default is None and ssl.get_default_verify_paths().capath is None:
        with contextlib.suppress(ImportError):  # a Python that finds none of the system's
            import certifi

            more.add(certifi.where())
    for path in more:
        if os.path.isfile(path):
            context.load_verify_locations(path)
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))


def _length(response: Any) -> int | None:
    """The length of the whole file, by the headers of a response for all or a part of it."""
    ranged = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status == 206:
        return int(ranged[1]) if ranged else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds to wait before the request is tried again; None: that would not help."""
    if error.code in (408, 429) or error.code >= 500:
        value = error.headers.get("Retry-After", "")
        return float(value) if value.isdecimal() else 0.0
    return None


def _refused(remote: Remote, error: urllib.error.HTTPError, done: int) -> ModelFileError:
    """The error for a status that is final."""
    wait = error.headers.get("Retry-After", "")
    kept = f"; {show(done)} are kept, and the same command goes on behind them" if done else ""
    hints = {
        401: "it needs an account: set HF_TOKEN to a token of yours",
        403: "it may not be read: ask for access, and set HF_TOKEN to a token of yours",
        404: "there is no such file: check the name",
        429: f"too many requests: try again in {wait} seconds"
        if wait
        else "too many requests: try again later",
    }
    hint = hints.get(error.code, "try again later")
    return ModelFileError(
        f"cannot be fetched: the server says {error.code}: {hint}{kept}", path=remote.name
    )


def _reason(error: BaseException) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner) or type(inner).__name__


def _no_room(remote: Remote, part: Path, error: BaseException | None) -> ModelFileError:
    """The error for a disk that fails."""
    code = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error)
    hint = "make room, and run the same command again: it goes on behind "
    hint = (
        f"{hint}the {show(_size(part))} that are here" if code == errno.ENOSPC else "see the disk"
    )
    return ModelFileError(f"cannot be written: {reason}: {hint}", path=remote.name)


def _tag(remote: Remote) -> str:
    """What tells versions of a file of no known digest apart: bytes of two must not be joined."""
    return hashlib.sha256(f"{remote.etag} {remote.n_bytes}".encode()).hexdigest()[:8]


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _sleep(seconds: float) -> None:
    """Wait; tests replace it."""
    time.sleep(seconds)
