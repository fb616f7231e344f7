"""The files among which a user chooses: of a folder, of this machine, of a repository."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from edge.errors import InputError
from edge.hub.offers import Offer, OfferedFile, group
from edge.hub.remote import files_of_url, header, list_repo
from edge.hub.stored import in_folder, stored
from edge.hub.wanted import InRepo, parse

__all__ = ["AtHand", "Choices", "choices"]


@dataclass(frozen=True)
class AtHand:
    """A model that can be had. name: what MODEL may be for it; offer: its files; path: of its first
    file, None: not on this machine; header: opens its header, a `with` that gives its path.
    """

    name: str
    offer: Offer
    path: str | None
    header: Callable[[], AbstractContextManager[str]]


@dataclass(frozen=True)
class Choices:
    """models: to choose from. asked: the one that was asked for; None: any."""

    models: tuple[AtHand, ...]
    asked: AtHand | None = None


def choices(model: str | None) -> Choices:
    """The models that a MODEL stands for.

    None: all on this machine; a folder: those in it; a repository, by its name or a short one: all
    that it has on the server; a URL: its file; a file, or a name of a model on this machine: it,
    and all on this machine, for others of its family are among them.

    Raises InputError for what is none of these or a folder of ONNX graphs, and the errors of
    `edge.hub.remote.list_repo` and `files_of_url`.
    """
    if model is not None and os.path.isdir(model):
        return Choices(_of_folder(model))
    here = [_local(m.name, m.paths, m.type) for m in stored() if m.complete]
    if model is None:
        return Choices(tuple(here))
    if os.path.isfile(model):
        return _with_others(_file(model), here)
    named = [m for m in here if m.name in (model, f"{model}:latest")]
    if named:
        return _with_others(named[0], here)
    wanted = parse(model)
    if wanted is None:
        raise InputError(f"{model}: there is no such file or folder, and no model has this name")
    if isinstance(wanted, InRepo):
        return Choices(_of_repo(wanted.repo))
    remotes = files_of_url(wanted)
    parts = tuple(OfferedFile(remote.name, remote.n_bytes or 0) for remote in remotes)
    name = str(wanted)
    return Choices((AtHand(name, group(parts)[0], None, lambda: header(remotes, name)),))


def _of_repo(repo: str) -> tuple[AtHand, ...]:
    listing = list_repo(repo)

    def remote(offer: Offer) -> AtHand:
        name = f"{repo}:{offer.name}"
        types = [other.type for other in listing.offers]
        if offer.type and types.count(offer.type) == 1:
            name = f"{repo}:{offer.type}"
        return AtHand(name, offer, None, lambda: header(listing.remotes(offer), name))

    return tuple(map(remote, listing.offers))


def _of_folder(folder: str) -> tuple[AtHand, ...]:
    models = in_folder(Path(folder), folder, "folder", Path(folder))
    if not models:
        onnx = any(name.endswith(".onnx") for name in os.listdir(folder))
        what = "holds ONNX graphs: advice is for GGUF files" if onnx else "has no GGUF model"
        raise InputError(f"{folder} {what}")
    return tuple(_local(m.name, m.paths, m.type) for m in models)


def _file(path: str) -> AtHand:
    """The model of a file that is named, whatever its name; shards that lie beside it count."""
    place = Path(path)
    with contextlib.suppress(OSError):
        beside = [OfferedFile(p.name, p.stat().st_size) for p in place.parent.glob("*.gguf")]
        for offer in group(beside):
            if place.name in (part.name for part in offer.parts):
                paths = tuple(place.parent / part.name for part in offer.parts)
                return _at(path, offer, paths[0])
    offer = Offer((OfferedFile(place.name, place.stat().st_size),), "")
    return _at(path, offer, place)


def _local(name: str, paths: tuple[Path, ...], type_name: str) -> AtHand:
    parts = tuple(OfferedFile(path.name, path.stat().st_size) for path in paths)
    return _at(name, Offer(parts, type_name), paths[0])


def _at(name: str, offer: Offer, path: Path) -> AtHand:
    @contextlib.contextmanager
    def opened() -> Iterator[str]:
        yield str(path)

    return AtHand(name, offer, str(path), opened)


def _with_others(asked: AtHand, here: list[AtHand]) -> Choices:
    """The model that was asked for, first, and the others."""
    assert asked.path is not None
    others = [m for m in here if not (m.path and os.path.samefile(m.path, asked.path))]
    return Choices((asked, *others), asked)
