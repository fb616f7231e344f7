"""A MODEL that is no file: found on this machine, or fetched."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from edge.disk.atomic import replacing, write_all
from edge.disk.download import Remote, fetch
from edge.errors import InputError, ModelFileError
from edge.hub.fitting import Fit, choose, consider
from edge.hub.names import NAMES
from edge.hub.offers import Offer, OfferedFile, group, select
from edge.hub.remote import Listing, files_of_url, header, list_repo
from edge.hub.stored import (
    LocalModel,
    hub_folder,
    offers_in,
    repo_folder,
    stored,
    url_folder,
)
from edge.hub.wanted import InRepo, Url, parse
from edge.progress import Progress, silent

__all__ = ["Pulled", "find_named", "open_named_header", "pull"]

#: Called with a line for people, before something takes long.
Say = Callable[[str], object]
#: A budget: bytes, a size as "1.5GB", or None for what is available.
Memory: TypeAlias = "int | str | None"


def _nothing(line: str) -> None:
    """The `Say` that tells nobody."""


@dataclass(frozen=True)
class Pulled:
    """What a pull gave. name: what MODEL may be for it; fetched: whether anything had to come."""

    name: str
    path: str
    fetched: bool


def find_named(model: str, memory: Memory, progress: Progress | None, say: Say) -> str:
    """See `edge.hub.find.find`; model: no file."""
    local = _on_disk(model, memory, say)
    if local is not None:
        return local
    if parse(model) is None:
        return model
    return pull(model, memory=memory, progress=progress, say=say).path


def pull(
    model: str,
    *,
    memory: Memory = None,
    force: bool = False,
    progress: Progress | None = None,
    say: Say = _nothing,
) -> Pulled:
    """Fetch a model of the hub, or of a URL.

    memory: the budget that it must fit into when no type is named, see `edge.loading.Loading`.
    force: fetch it again where it is here already. progress(bytes done, bytes in all). say: is told
    which file was chosen and why, before it is fetched.

    Raises InputError for a name that nobody has, ModelFileError for a model that cannot be fetched
    or written or is damaged, UnsupportedError for one that this build cannot run,
    MemoryBudgetError when none fits.
    """
    wanted = parse(model)
    if isinstance(wanted, Url):
        return _pull_url(wanted, force, progress or silent, say, memory)
    if isinstance(wanted, InRepo):
        if wanted.which and not force and (here := _stored_as(wanted)) is not None:
            return Pulled(here.name, str(here.paths[0]), False)
        return _pull_repo(wanted, force, progress or silent, say, memory)
    raise InputError(
        f"{model} is no name of a model, no owner/repository and no URL. Names: {', '.join(NAMES)}"
    )


@contextlib.contextmanager
def open_named_header(model: str, memory: Memory, say: Say) -> Iterator[tuple[str, str]]:
    """See `edge.hub.find.open_header`; model: no file."""
    path = _on_disk(model, memory, say)
    wanted = parse(model) if path is None else None
    if wanted is None:
        yield path or model, path or model
    elif isinstance(wanted, Url):
        with header(files_of_url(wanted), str(wanted)) as path:
            yield path, str(wanted)
    else:
        listing = list_repo(wanted.repo)
        offer = _choice(listing, wanted, memory, say).offer
        name = f"{wanted.repo}:{offer.type or offer.name}"
        with header(listing.remotes(offer), name) as path:
            yield path, name


def _on_disk(model: str, memory: Memory, say: Say) -> str | None:
    """The path of a model on this machine; None: it is not here."""
    if os.path.exists(model):
        return _in_folder(model, "", memory, say) if os.path.isdir(model) else model
    folder, colon, which = model.rpartition(":")
    if colon and os.path.isdir(folder):
        return _in_folder(folder, which, memory, say)
    wanted = parse(model)
    if isinstance(wanted, InRepo):
        here = _stored_as(wanted) if wanted.which else None
        if here is not None:
            return str(here.paths[0])
        if not wanted.which and (best := _best_stored(wanted.repo, memory, say)) is not None:
            return best
    names = {model, f"{model}:latest"}
    if isinstance(wanted, Url):
        names.add(wanted.place)
    found = [m for m in stored() if m.complete and m.name in names] if not _is_path(model) else []
    return str(found[0].paths[0]) if found else None


def _is_path(model: str) -> bool:
    """Whether a text is no name for sure: then no folder of models need be read."""
    is_file = model.endswith((".gguf", ".onnx")) and ":" not in model
    return is_file or os.path.isabs(model) or model.startswith(".") or not model.isprintable()


def _in_folder(folder: str, which: str, memory: Memory, say: Say) -> str:
    """The model in a folder of GGUF files; a folder of another kind is returned as it is."""
    offers = offers_in(Path(folder)) if not _has_onnx(folder) else []
    if not offers and not which:
        return folder
    offer = select(offers, which, folder) if which else _best(offers, Path(folder), memory, say)
    return os.path.join(folder, *offer.name.split("/"))


def _has_onnx(folder: str) -> bool:
    """Whether a folder has ONNX graphs, or cannot be read."""
    try:
        return any(name.endswith(".onnx") for name in os.listdir(folder))
    except OSError:  # the engine says what is wrong with it
        return True


def _best(offers: list[Offer], folder: Path, memory: Memory, say: Say) -> Offer:
    """The one of the models in a folder that fits, if there are several."""
    if len(offers) == 1:
        return offers[0]

    @contextlib.contextmanager
    def local(offer: Offer) -> Iterator[str]:
        yield str(folder.joinpath(*offer.name.split("/")))

    choice = choose(offers, local, memory)
    say(choice.reason)
    return choice.offer


def _stored_as(wanted: InRepo) -> LocalModel | None:
    """The model on this machine that a repository's type or file names."""
    which = wanted.which
    for model in stored():
        repo, _, _rest = model.name.partition(":")
        if repo == wanted.repo and model.complete and model.place in ("hub", "LM Studio"):
            files = [path.as_posix() for path in model.paths]
            if which.upper() in (model.type, model.type.removeprefix("UD-")) or any(
                file.endswith(f"/{which}") for file in files
            ):
                return model
    return None


def _best_stored(repo: str, memory: Memory, say: Say) -> str | None:
    """The model of a repository on this machine that fits; None: none is here."""
    models = [m for m in stored() if m.complete and m.name.partition(":")[0] == repo]
    models = [m for m in models if m.place in ("hub", "LM Studio")]
    if not models:
        return None
    root = Path(os.path.commonpath([path.parent for m in models for path in m.paths]))
    offers = group(
        OfferedFile(path.relative_to(root).as_posix(), path.stat().st_size)
        for m in models
        for path in m.paths
    )
    return str(root.joinpath(*_best(offers, root, memory, say).name.split("/")))


def _choice(listing: Listing, wanted: InRepo, memory: Memory, say: Say) -> Fit:
    """The model of a repository that was asked for, or that fits; `say` is told."""

    def opened(offer: Offer) -> contextlib.AbstractContextManager[str]:
        return header(listing.remotes(offer), f"{listing.repo}:{offer.type or offer.name}")

    if wanted.which:
        choice = consider(select(listing.offers, wanted.which, wanted.repo), opened, memory)
    else:
        choice = choose(listing.offers, opened, memory)
    say(choice.reason)
    return choice


def _pull_repo(wanted: InRepo, force: bool, progress: Progress, say: Say, memory: Memory) -> Pulled:
    listing = list_repo(wanted.repo)
    hub = hub_folder()
    assert hub is not None  # `list_repo` needs it
    offer = _choice(listing, wanted, memory, say).offer
    place, locks = repo_folder(hub, wanted.repo), repo_folder(hub / ".locks", wanted.repo)
    snapshot, fetched = place / "snapshots" / listing.commit, False
    remotes = listing.remotes(offer)
    report = _Together(progress, offer.n_bytes)
    try:
        for part, remote in zip(offer.parts, remotes, strict=True):
            blob = place / "blobs" / part.digest
            pointer = snapshot.joinpath(*part.name.split("/"))
            if force or not pointer.is_file():
                lock = locks / f"{part.digest}.edge.lock"
                fetched |= _fetch(remote, blob, lock, force, report)
                _point(pointer, blob)
            report.next(part.n_bytes)
        _remember(place, listing.commit)
    except OSError as e:
        raise ModelFileError(f"cannot be written: {e.strerror or e}", path=place) from e
    name = f"{wanted.repo}:{offer.type or offer.name}"
    return Pulled(name, str(snapshot.joinpath(*offer.name.split("/"))), fetched)


def _pull_url(wanted: Url, force: bool, progress: Progress, say: Say, memory: Memory) -> Pulled:
    remotes, folder = files_of_url(wanted), url_folder()
    paths = [folder.joinpath(*remote.name.split("/")) for remote in remotes]
    fetched = False
    if force or not all(path.is_file() for path in paths):
        parts = tuple(OfferedFile(remote.name, remote.n_bytes or 0) for remote in remotes)
        offer = group(parts)[0]
        choice = consider(offer, lambda _: header(remotes, str(wanted)), memory)
        say(choice.reason)
        report = _Together(progress, offer.n_bytes)
        for remote, path in zip(remotes, paths, strict=True):
            fetched |= _fetch(remote, path, folder / ".lock", force, report)
            report.next(remote.n_bytes or 0)
    return Pulled(str(wanted), str(paths[0]), fetched)


def _fetch(remote: Remote, target: Path, lock: Path, force: bool, progress: Progress) -> bool:
    """Fetch a file; with force, to another name beside it first."""
    if not force:
        return fetch(remote, target, lock=lock, progress=progress)
    again = target.with_name(f"{target.name}.again")
    fetch(remote, again, lock=lock, progress=progress)
    os.replace(again, target)
    return True


class _Together:
    """Reports the progress of several files as one."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._before = progress, total, 0

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._before + done, self._total)

    def next(self, n_bytes: int) -> None:
        """A file of so many bytes is there."""
        self._before += n_bytes
        self._progress(self._before, self._total)


def _point(pointer: Path, blob: Path) -> None:
    """Let a file of a snapshot be its blob: a link, as huggingface_hub makes it, or the file."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if pointer.is_file():
        return
    with contextlib.suppress(FileNotFoundError):
        pointer.unlink()  # a link to a blob that was removed
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:  # a file system without links
        shutil.move(blob, pointer)


def _remember(place: Path, commit: str) -> None:
    """Note that the branch main is at this commit, as huggingface_hub does."""
    (place / "refs").mkdir(parents=True, exist_ok=True)
    with replacing(place / "refs" / "main", ".main-") as file:
        write_all(file, commit.encode())
