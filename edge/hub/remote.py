"""What servers have: the files of a repository, and their headers by requests for a range.

The API of the hub, its tokens, HF_ENDPOINT and HF_HUB_OFFLINE are huggingface_hub's. The bytes of
files come through `edge.disk.download`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.disk.download import Remote, probe, start
from edge.errors import EdgeError, InputError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.hub.offers import Offer, OfferedFile, group
from edge.hub.stored import require_hub, stored
from edge.hub.wanted import Url, is_safe

__all__ = ["Listing", "files_of_url", "header", "list_repo"]

_TIMEOUT = 20  # seconds
_FIRST = 1 << 20  # bytes that are asked for at first; until the header is there, four times as many
_MOST = 64 << 20  # bytes of a header; vocabularies of 260,000 tokens take about 15 MiB


@dataclass(frozen=True)
class Listing:
    """The models of a repository. commit: that they are of."""

    repo: str
    commit: str
    offers: list[Offer]

    def remotes(self, offer: Offer) -> list[Remote]:
        """The files of a model on the server."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        headers = {name.title(): value for name, value in build_hf_headers().items()}
        return [
            Remote(
                url=hf_hub_url(self.repo, part.name, revision=self.commit),
                name=f"{self.repo}:{part.name}",
                n_bytes=part.n_bytes,
                digest=part.digest,
                headers=headers,
            )
            for part in offer.parts
        ]


def list_repo(repo: str) -> Listing:
    """The models of a repository, as its branch main is now.

    Raises ModelFileError when it cannot be read, UnsupportedError when it has no GGUF file or
    huggingface_hub is not installed, InputError for a name that no repository has.
    """
    require_hub()
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    with _translated(repo):
        info = HfApi().model_info(repo, files_metadata=True, timeout=_TIMEOUT)
        commit, parts = str(info.sha), list[OfferedFile]()
        names = [file for file in info.siblings or [] if file.rfilename.endswith(".gguf")]
        for file in names:
            if not is_safe(file.rfilename):
                continue
            if isinstance(file.size, int):
                digest = file.lfs["sha256"] if file.lfs else file.blob_id
                parts.append(OfferedFile(file.rfilename, file.size, str(digest or "")))
            else:  # a mirror that states names only
                found = get_hf_file_metadata(hf_hub_url(repo, file.rfilename, revision=commit))
                parts.append(OfferedFile(file.rfilename, found.size or 0, str(found.etag)))
    unsafe = [file.rfilename for file in names if not is_safe(file.rfilename)]
    if unsafe and not parts:
        raise ModelFileError("the names of its files lead out of its folder", path=repo)
    if not _is_digest(commit):  # it names a folder
        raise ModelFileError("its server states no commit: see HF_ENDPOINT", path=repo)
    bad = [part.name for part in parts if not _is_digest(part.digest)]
    if bad:
        raise ModelFileError(f"the server states no checksum of {bad[0]}", path=repo)
    offers = group(parts)
    if not offers:
        raise UnsupportedError(
            f"{repo} has no GGUF model: such repositories often have names that end in -GGUF",
            what=repo,
        )
    return Listing(repo, commit, offers)


def files_of_url(wanted: Url) -> list[Remote]:
    """The file of a URL, or all shards of the model that it is one of. Raises ModelFileError."""
    folder, _, name = wanted.url.partition("?")[0].rpartition("/")
    query = wanted.url[len(folder) + 1 + len(name) :]
    head, of, count = name.removesuffix(".gguf").rpartition("-of-")
    names = [name]
    if of and len(count) == 5 and count.isdecimal() and 0 < int(count) < 1000:
        names = [f"{head[:-5]}{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1)]
        if name not in names:
            raise InputError(f"{name}: it is no shard of {int(count)}")
    place = wanted.place.rpartition("/")[0]
    return [probe(Remote(f"{folder}/{name}{query}", f"{place}/{name}")) for name in names]


@contextlib.contextmanager
def header(remotes: Sequence[Remote], name: str) -> Iterator[str]:
    """The path of a model's header, all shards of it, fetched for the block: see `GGUF.open`.

    name: of the model, which takes the place of the path in errors of the block.
    Raises ModelFileError for files that are no GGUF, or cannot be fetched.
    """
    with tempfile.TemporaryDirectory(prefix="edge-header-") as folder:
        paths = [
            Path(folder, remote.url.partition("?")[0].rpartition("/")[2]) for remote in remotes
        ]
        try:
            _fetch_headers(remotes, paths)
            yield str(paths[0])
        except EdgeError as error:
            for path in map(str, paths):
                error.args = (str(error).replace(path, name),)
            if isinstance(error, ModelFileError):
                error.path = name
            raise


def _fetch_headers(remotes: Sequence[Remote], paths: Sequence[Path]) -> None:
    """Write the start of each file, as much as its header takes."""
    sizes = dict.fromkeys(map(str, paths), _FIRST)
    for remote, path in zip(remotes, paths, strict=True):
        start(remote, path, _FIRST)
    while True:
        try:
            GGUF.open(paths[0], header_only=True).close()
            return
        except ModelFileError as error:
            size = sizes.get(error.path, _MOST)
            if size >= _MOST or Path(error.path).stat().st_size < size:
                raise
            with open(error.path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise
            sizes[error.path] = size * 4
            start(remotes[[*map(str, paths)].index(error.path)], Path(error.path), size * 4)


def _is_digest(text: str) -> bool:
    return len(text) in (40, 64) and not set(text) - set("0123456789abcdef")


@contextlib.contextmanager
def _translated(repo: str) -> Iterator[None]:
    """Raise errors of edge for those of huggingface_hub."""
    from huggingface_hub import errors

    # The root of its client's errors, which older versions of the client derive from OSError.
    root: Any = getattr(errors, "HTTPError", OSError)
    try:
        yield
    except errors.HFValidationError as error:
        raise InputError(f"{repo}: no repository has such a name") from error
    except errors.HfHubHTTPError as error:
        raise ModelFileError(_advice(repo, error), path=repo) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"its server's answer is not that of a hub ({type(error).__name__}): see HF_ENDPOINT",
            path=repo,
        ) from error
    except (OSError, root, ValueError) as error:
        here = [model.name for model in stored() if model.complete and model.place != "edge"]
        raise ModelFileError(
            f"the hub cannot be asked ({_reason(error)}): see HF_HUB_OFFLINE, HF_ENDPOINT and the "
            f"network. On this machine {'are ' + ', '.join(here) if here else 'is no model'}",
            path=repo,
        ) from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on"
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _advice(repo: str, error: Any) -> str:
    """What to do about a status of the hub."""
    from huggingface_hub import errors

    status, wait = error.response.status_code, error.response.headers.get("Retry-After", "")
    token = "set HF_TOKEN to a token of your account"
    if isinstance(error, errors.GatedRepoError):
        return f"it asks for an agreement: accept it on the page of {repo}, and {token}"
    if status in (401, 403):
        return f"there is no such repository, or it is private: check the name, or {token}"
    if status == 404 or isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository: check the name; for a private one, {token}"
    if status == 429:
        when = f"in {wait} seconds" if wait else "later"
        return f"the hub has had too many requests: try again {when}; with a token it allows more"
    return f"the hub says {status}: try again later"
