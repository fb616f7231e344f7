"""The models on this machine: those of edge, and those of Ollama and LM Studio, only read.

<hub's cache>/models--OWNER--REPO/blobs/SHA-256             what `edge-run pull` fetched, where
<hub's cache>/models--OWNER--REPO/snapshots/COMMIT/FILE     huggingface_hub keeps it, too
<edge's cache>/urls/HOST/PATH                               what it fetched from a URL
<edge's cache>/FILE                                         the default model
<Ollama's>/manifests/HOST/OWNER/NAME/TAG -> blobs/sha256-HEX
<LM Studio's>/OWNER/REPO/FILE
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.disk.download import INCOMPLETE
from edge.disk.pull import DEFAULT
from edge.disk.room import cache_dir
from edge.errors import UnsupportedError
from edge.hub.offers import Offer, OfferedFile, group

__all__ = [
    "LocalModel",
    "hub_folder",
    "in_folder",
    "offers_in",
    "repo_folder",
    "require_hub",
    "stored",
    "url_folder",
]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")  # where its service on Linux keeps them
_OLLAMA_HOSTS = ("registry.ollama.ai", "ollama.com")


@dataclass(frozen=True)
class LocalModel:
    """A model on the disk.

    name: what MODEL may be for it; place: "edge", "hub", "url", "LM Studio", "Ollama" or "folder";
    root: the folder of all models of this place; paths: of its files; complete: False for a
    download that was cut, whose paths are what came.
    """

    name: str
    place: str
    root: Path
    type: str
    paths: tuple[Path, ...]
    n_bytes: int
    complete: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether `edge-run remove` removes it."""
        return self.place in ("edge", "hub", "url")


def stored() -> list[LocalModel]:
    """All models on this machine that are found by name, incomplete downloads among them."""
    sources = (_of_edge, _of_hub, _of_urls, _of_lm_studio, _of_ollama)
    return [model for source in sources for model in source()]


def hub_folder() -> Path | None:
    """The cache of huggingface_hub, as HF_HUB_CACHE and HF_HOME say; None: it is not installed."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return Path(constants.HF_HUB_CACHE)


def repo_folder(hub: Path, repo: str) -> Path:
    """The folder of a repository in the hub's cache."""
    return hub / f"models--{repo.replace('/', '--')}"


def url_folder() -> Path:
    """The folder of files from URLs."""
    return cache_dir() / "urls"


def offers_in(folder: Path) -> list[Offer]:
    """The models in a folder and those below it, the largest first."""
    parts = []
    for path in _ggufs(folder):
        with contextlib.suppress(OSError):
            parts.append(OfferedFile(path.relative_to(folder).as_posix(), path.stat().st_size))
    return group(parts)


def in_folder(folder: Path, prefix: str, place: str, root: Path) -> list[LocalModel]:
    """The models in a folder, with names PREFIX:TYPE, or PREFIX:FILE where a type has several.

    root: see `LocalModel`.
    """
    offers = offers_in(folder)
    types = [offer.type for offer in offers]
    return [
        LocalModel(
            name=f"{prefix}:{o.type if o.type and types.count(o.type) == 1 else o.name}",
            place=place,
            root=root,
            type=o.type,
            paths=tuple(folder / part.name for part in o.parts),
            n_bytes=o.n_bytes,
        )
        for o in offers
    ]


def _of_edge() -> list[LocalModel]:
    path = cache_dir() / DEFAULT.file
    if not path.is_file():
        return []
    is_whole = path.stat().st_size == DEFAULT.n_bytes
    return [
        LocalModel(str(path), "edge", path.parent, "Q4_1", (path,), path.stat().st_size, is_whole)
    ]


def _of_hub() -> list[LocalModel]:
    hub, found = hub_folder(), list[LocalModel]()
    for place in _folders(hub) if hub else ():
        kind, _, name = place.name.partition("--")
        if kind != "models" or "--" not in name:
            continue
        repo, seen = name.replace("--", "/", 1), set[str]()
        for snapshot in _snapshots(place):
            models = in_folder(snapshot, repo, "hub", place.parent)
            found += [model for model in models if model.name not in seen]
            seen |= {model.name for model in models}
        found += _incomplete(place, repo)
    return found


def _snapshots(place: Path) -> list[Path]:
    """The snapshots of a repository, the one of its branch main first, then the newest."""
    main = ""
    with contextlib.suppress(OSError, ValueError):
        main = (place / "refs" / "main").read_text().strip()
    folders = _folders(place / "snapshots")
    return sorted(folders, key=lambda path: (path.name != main, -path.stat().st_mtime))


def _of_urls() -> list[LocalModel]:
    folder = url_folder()
    found = []
    for offer in offers_in(folder):
        paths = tuple(folder / part.name for part in offer.parts)
        found.append(LocalModel(offer.name, "url", folder, offer.type, paths, offer.n_bytes))
    for path in sorted(folder.rglob(f"*{INCOMPLETE}")) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix().removesuffix(INCOMPLETE).rpartition(".")[0]
        found.append(
            LocalModel(name, "url", folder, "", (path,), path.stat().st_size, complete=False)
        )
    return found


def _incomplete(place: Path, repo: str) -> list[LocalModel]:
    """What downloads that were cut have left in the folder of a repository."""
    paths = tuple(sorted((place / "blobs").glob(f"*{INCOMPLETE}")))
    n_bytes = sum(path.stat().st_size for path in paths)
    return [LocalModel(repo, "hub", place.parent, "", paths, n_bytes, False)] if paths else []


def _of_lm_studio() -> list[LocalModel]:
    home = Path(os.path.expanduser("~"))
    homes = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    with contextlib.suppress(OSError, ValueError):  # it says where the user moved the folder to
        homes.insert(0, Path((home / ".lmstudio-home-pointer").read_text().strip()))
    found, seen = list[LocalModel](), set[Path]()
    for folder in (home / "models" for home in homes):
        for owner in _folders(folder):
            for repo in _folders(owner):
                if repo.resolve() not in seen:
                    seen.add(repo.resolve())
                    found += in_folder(repo, f"{owner.name}/{repo.name}", "LM Studio", folder)
    return found


def _of_ollama() -> list[LocalModel]:
    chosen = os.environ.get("OLLAMA_MODELS")
    folders = [Path(chosen)] if chosen else []
    folders += [Path(os.path.expanduser("~/.ollama/models")), _OLLAMA_SERVICE]
    found: dict[str, LocalModel] = {}
    for folder in folders:
        for manifest in _manifests(folder / "manifests"):
            host, owner, name, tag = manifest.relative_to(folder / "manifests").parts
            short = name if owner == "library" else f"{owner}/{name}"
            full = short if host in _OLLAMA_HOSTS else f"{host}/{owner}/{name}"
            model = _of_manifest(folder, manifest, f"{full}:{tag}")
            if model is not None:
                found.setdefault(model.name, model)
    return list(found.values())


def _manifests(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(path for path in folder.glob("*/*/*/*") if path.is_file())


def _of_manifest(folder: Path, manifest: Path, name: str) -> LocalModel | None:
    """The model that a manifest of Ollama names; None: it is damaged, or has no file here."""
    layers: dict[str, Path] = {}
    facts = _json(manifest)
    listed = facts.get("layers")
    for layer in [facts.get("config"), *listed] if isinstance(listed, list) else ():
        if isinstance(layer, dict) and (match := _DIGEST.fullmatch(str(layer.get("digest")))):
            kind = str(layer.get("mediaType")).rpartition(".")[2]
            layers.setdefault(kind, folder / "blobs" / f"sha256-{match[1]}")
    path = layers.get("model")
    if path is None or not path.is_file():
        return None
    image = next((blob for kind, blob in layers.items() if kind.endswith("json")), None)
    kind = str(_json(image).get("file_type", "")) if image else ""
    return LocalModel(name, "Ollama", folder, kind.upper(), (path,), path.stat().st_size)


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty where it is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= 1 << 20:
            value = json.loads(path.read_bytes())
            return value if isinstance(value, dict) else {}
    return {}


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder; none where it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_dir())
    return []


def _ggufs(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent, name)
            if name.endswith(".gguf") and path.is_file():
                yield path


def require_hub() -> None:
    """Raise UnsupportedError unless huggingface_hub is installed."""
    if hub_folder() is None:
        raise UnsupportedError(
            "models of the hub need the package huggingface_hub: pip install huggingface_hub",
            what="huggingface_hub",
        )
