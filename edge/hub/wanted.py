"""What a user may write for MODEL when it is no path of this machine.

smollm2                            a short name, see `edge.hub.names.NAMES`
owner/repo                         a repository of the hub: the file that fits
owner/repo:Q4_K_M                  its file of that type
owner/repo:folder/file.gguf        that file
https://host/path/file.gguf        a file of any server
llama3.2:1b                        a model of Ollama on this machine
"""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass

from edge.errors import InputError, brief
from edge.hub.names import NAMES

__all__ = ["InRepo", "Url", "is_safe", "parse"]

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_HOSTS = {"huggingface.co", "hf.co", "www.huggingface.co"}
_HUB_FILE = re.compile(r"/([^/]+/[^/]+)/(?:resolve|blob)/main/(.+)")


@dataclass(frozen=True)
class InRepo:
    """A model in a repository. which: a type or a file; "": the one that fits."""

    repo: str
    which: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.which}" if self.which else self.repo


@dataclass(frozen=True)
class Url:
    """A file of a server."""

    url: str

    @property
    def place(self) -> str:
        """Host and path: where the file is kept, and how it is listed."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.netloc.rpartition('@')[2]}{urllib.parse.unquote(parts.path)}"

    def __str__(self) -> str:
        return self.place


def parse(text: str) -> InRepo | Url | None:
    """What a text stands for; None: a path, or a name that only this machine knows.

    Raises InputError for one that can be neither: with `..` in it, or a URL of no GGUF file.
    """
    if text.lower().startswith(("http://", "https://")):
        return _url(text)
    name, _, which = text.partition(":")
    if (place := NAMES.get(name.lower())) is not None:
        return _in_repo(place.repo, which or place.type, text)
    for host in _HUB_HOSTS:
        name = name.removeprefix(f"{host}/")
    if not _REPO.fullmatch(name) or (not which and _is_path(name)):
        return None
    return _in_repo(name, which, text)


def is_safe(name: str) -> bool:
    """Whether a file's name in a repository stays inside a folder, on every system."""
    parts = name.split("/")
    bad = {"", ".", ".."}
    return name.isprintable() and not bad & set(parts) and not re.search(r'[\\:*?"<>|]', name)


def _in_repo(repo: str, which: str, text: str) -> InRepo:
    if ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise InputError(f"{brief(text)}: no repository has such a name")
    if which and not is_safe(which):
        raise InputError(
            f"{brief(text)}: after the colon belongs a type, such as Q4_K_M, or a file's name"
        )
    return InRepo(repo, which)


def _url(text: str) -> InRepo | Url:
    parts = urllib.parse.urlsplit(text)
    path = urllib.parse.unquote(parts.path)
    hosts = _HUB_HOSTS | {urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc.lower()}
    if parts.netloc.lower() in hosts and (match := _HUB_FILE.fullmatch(path)):
        return _in_repo(match[1], match[2], text)
    if not parts.netloc or not path.endswith(".gguf") or not is_safe(path[1:]):
        raise InputError(f"{brief(text)}: a URL must end with the name of a .gguf file")
    return Url(text)


def _is_path(name: str) -> bool:
    """Whether owner/repo looks like a path: a file's name, or in a folder that is here."""
    return name.endswith((".gguf", ".onnx", ".session")) or os.path.isdir(name.split("/")[0])
