"""Models that edge fetched, removed. Those of other programs are never touched."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from edge.errors import InputError, ModelFileError
from edge.hub.stored import LocalModel, hub_folder, stored, url_folder
from edge.hub.wanted import InRepo, Url, parse

__all__ = ["remove"]


def remove(model: str) -> list[LocalModel]:
    """Remove a model from this machine, with what downloads of it have left. Returns what went.

    model: as `edge-run list` shows it, a short name, or a repository, all of whose GGUF files go.
    Raises InputError when it is not here or belongs to another program, ModelFileError when it
    cannot be removed.
    """
    wanted = parse(model)
    here = stored()
    found = [m for m in here if _is_meant(m, model, wanted)]
    ours = [m for m in found if m.is_ours]
    if not ours:
        if found:
            raise InputError(f"{model} is of {found[0].place}: remove it there")
        names = ", ".join(m.name for m in here if m.is_ours)
        raise InputError(f"{model} is not here" + (f": here are {names}" if names else ""))
    try:
        for target in ours:
            for path in target.paths:
                _remove(path)
    except OSError as e:
        raise ModelFileError(
            f"cannot be removed: {e.strerror or e}", path=e.filename or model
        ) from e
    return ours


def _is_meant(stored: LocalModel, model: str, wanted: InRepo | Url | None) -> bool:
    if stored.name == model:
        return True
    if isinstance(wanted, Url):
        return stored.place == "url" and stored.name == wanted.place
    if isinstance(wanted, InRepo):
        repo, _, _which = stored.name.partition(":")
        if repo != wanted.repo:
            return False
        files = [path.as_posix() for path in stored.paths]
        return (
            not wanted.which
            or not stored.complete
            or wanted.which.upper() in (stored.type, stored.type.removeprefix("UD-"))
            or any(file.endswith(f"/{wanted.which}") for file in files)
        )
    return False


def _remove(path: Path) -> None:
    """Remove a file; of the hub's cache also its blob, unless another snapshot has it."""
    hub = hub_folder()
    blob = Path(os.path.realpath(path)) if path.is_symlink() else None
    path.unlink(missing_ok=True)
    if hub is not None and hub in path.parents:
        repo = hub / path.relative_to(hub).parts[0]
        blobs = Path(os.path.realpath(repo / "blobs"))
        if blob is not None and blob.parent == blobs and not _is_used(repo, blob):
            blob.unlink(missing_ok=True)
        _prune(path.parent, repo)
        if not _has_files(repo):
            shutil.rmtree(repo, ignore_errors=True)
            shutil.rmtree(hub / ".locks" / repo.name, ignore_errors=True)
    elif url_folder() in path.parents:
        _prune(path.parent, url_folder())


def _is_used(repo: Path, blob: Path) -> bool:
    """Whether a file of a snapshot is this blob."""
    return any(
        path.is_symlink() and Path(os.path.realpath(path)) == blob
        for path in (repo / "snapshots").rglob("*")
    )


def _has_files(repo: Path) -> bool:
    """Whether a repository's folder in the hub's cache has anything but notes."""
    folders = (repo / "snapshots", repo / "blobs")
    return any(path.is_symlink() or path.is_file() for f in folders for path in f.rglob("*"))


def _prune(folder: Path, top: Path) -> None:
    """Remove empty folders upwards, below `top`."""
    while folder != top and top in folder.parents:
        with contextlib.suppress(OSError):
            folder.rmdir()
        folder = folder.parent
