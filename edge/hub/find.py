"""A MODEL's path: what `edge.load` and the commands take.

A file is returned at once. The rest of this folder is imported for anything else only: a client for
servers takes time and memory, which no run of a file should pay.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from edge.disk.pull import default_model
from edge.progress import Progress

__all__ = ["find", "open_header"]


def _nothing(line: str) -> None:
    """Tell nobody."""


def find(
    model: str | None,
    *,
    memory: int | str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], object] = _nothing,
) -> str:
    """The path of a MODEL; it is fetched where it is not on this machine.

    model: a path, a folder of GGUF files, or what `edge.hub.wanted` lists; None: the default model.
    memory, progress, say: see `edge.hub.named.pull`. A text that nothing is known by is returned as
    it is. Raises the errors of `edge.hub.named.pull`.
    """
    if model is None:
        return str(default_model())
    if os.path.isfile(model):
        return model
    from edge.hub.named import find_named

    return find_named(model, memory, progress, say)


@contextlib.contextmanager
def open_header(
    model: str | None,
    *,
    memory: int | str | None = None,
    say: Callable[[str], object] = _nothing,
) -> Iterator[tuple[str, str]]:
    """The path of a MODEL, and its name. Of one that is not on this machine only the header is
    fetched, for the block: open it with `header_only`. Raises the errors of `find`.
    """
    if model is None or os.path.isfile(model):
        path = model or str(default_model())
        yield path, path
        return
    from edge.hub.named import open_named_header

    with open_named_header(model, memory, say) as opened:
        yield opened
