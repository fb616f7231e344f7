"""When a session is written to its file, and what of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edge.errors import EdgeWarning, InputError, SessionFileError
from edge.kv.shape import PAGE
from edge.session.contents import Kind, Part
from edge.session.file import SessionFile

if TYPE_CHECKING:
    from edge.backend import Cache
    from edge.session.transcript import Transcript

__all__ = ["Facts", "Journal", "save"]

#: What a file says of a session besides tokens and pages: plain values for META or for STATE.
Facts = Callable[[Kind], dict[str, Any]]

_LEAST_OBSOLETE = 1 << 20  # bytes for which a file is not written anew


def save(
    transcript: Transcript,
    facts: Facts,
    path: str | os.PathLike[str],
    held: SessionFile | None = None,
) -> SessionFile:
    """Write all of a session to a new file, which is returned open.

    held: the open file at this path, if it is ours. Raises SessionFileError, and InputError for
    messages that JSON cannot hold.
    """
    cache = transcript.cache
    parts = [
        Part.json(Kind.META, facts(Kind.META)),
        _state(facts),
        Part.tokens(0, transcript.tokens),
        *_pages(cache, 0, cache.n_pages),
    ]
    with _released(parts):
        return SessionFile.create(path, parts, held)


class Journal:
    """Keeps a session's file up to date while the session goes on.

    What is new is appended once there are `every` new tokens, and at the end of each call. When
    most of the file is obsolete, it is written anew, under another name first.
    """

    def __init__(self, transcript: Transcript, facts: Facts, file: SessionFile, every: int) -> None:
        """The file holds the session as it is, but for pages that have room."""
        self.file, self.every = file, every
        self._transcript, self._facts = transcript, facts
        self._n_tokens = len(transcript.tokens)  # the session's first tokens that the file holds
        self._n_pages = transcript.cache.length // PAGE  # and the first pages of each group
        self._state = Part.json(Kind.STATE, file.contents.state).data
        self._least = _LEAST_OBSOLETE

    def cut(self, n_tokens: int) -> None:
        """The session is cut to n_tokens: what comes next replaces the rest."""
        self._n_tokens = min(self._n_tokens, n_tokens)
        self._n_pages = min(self._n_pages, n_tokens // PAGE)

    def is_due(self) -> bool:
        """Whether there is enough that is new."""
        n_full = self._transcript.cache.length // PAGE
        n_new = len(self._transcript.tokens) - self._n_tokens
        return max(n_new, (n_full - self._n_pages) * PAGE) >= self.every

    def write(self, *, last: bool = False) -> None:
        """Append what is new; the last time, a page that has room too.

        A file that is not there any more is written anew, with an EdgeWarning: what was appended to
        it would be lost. Raises SessionFileError: the file then holds what it held before.
        """
        tokens, cache, parts = self._transcript.tokens, self._transcript.cache, list[Part]()
        state = _state(self._facts)
        if state.data != self._state:
            parts.append(state)
        if self._n_tokens < max(len(tokens), len(self.file.contents.tokens)):
            parts.append(Part.tokens(self._n_tokens, tokens[self._n_tokens :]))
        n_full = cache.length // PAGE
        first, end = self._n_pages * cache.n_groups, n_full * cache.n_groups
        pages = _pages(cache, first, cache.n_pages if last else end)
        parts += [part for part in pages if part.b > self._positions(part.a, cache.n_groups)]
        if not parts and not last:
            return
        with _released(parts):
            is_there = self.file.is_there()
            if is_there and parts:
                self.file.append(parts)
            elif not is_there:
                self.rewrite()
        if not is_there:
            message = f"{self.file.path} was deleted or changed by others: it was written anew"
            warnings.warn(EdgeWarning(message), stacklevel=2)
            return
        self._n_tokens, self._n_pages = len(tokens), max(self._n_pages, n_full)
        self._state = state.data
        self._compact()

    def rewrite(self) -> None:
        """Write the file anew, with what is live. Raises SessionFileError: it is as it was."""
        transcript, old = self._transcript, self.file
        self.file = save(transcript, self._facts, old.path, old)
        old.close()
        self._n_tokens, self._n_pages = len(transcript.tokens), transcript.cache.length // PAGE
        self._state = Part.json(Kind.STATE, self.file.contents.state).data

    def _positions(self, number: int, n_groups: int) -> int:
        """How many positions of a page, as the session has it, are in the file."""
        _, positions = self.file.contents.pages.get(number, (None, 0))
        return min(positions, self._n_tokens - number // n_groups * PAGE)

    def _compact(self) -> None:
        """Write the file anew where most of it is obsolete."""
        cache, pages = self._transcript.cache, self.file.contents.pages
        for i in [i for i in pages if i < cache.n_pages and not cache.has_page(i)]:
            del pages[i]  # behind the window: nobody asks for it again
        live = self.file.contents.n_bytes
        obsolete = self.file.end - live
        if obsolete > max(live, self._least):
            try:
                self.rewrite()
                self._least = _LEAST_OBSOLETE
            except SessionFileError:  # no room for both: go on in the old one, try later
                self._least = 2 * obsolete


def _pages(cache: Cache, first: int, last: int) -> list[Part]:
    """Pages of the cache with numbers first to last - 1, but for those behind a window."""
    return [
        Part(Kind.PAGE, i, min(PAGE, cache.length - i // cache.n_groups * PAGE), cache.page(i))
        for i in range(first, last)
        if cache.has_page(i)
    ]


@contextmanager
def _released(parts: Sequence[Part]) -> Iterator[None]:
    """Release the pages at the end. The traceback of an error would hold them, and the cache could
    not be closed.
    """
    try:
        yield
    finally:
        for part in parts:
            if isinstance(part.data, memoryview):
                part.data.release()


def _state(facts: Facts) -> Part:
    """The STATE record. Raises InputError for messages that JSON cannot hold."""
    state = facts(Kind.STATE)
    try:
        return Part.json(Kind.STATE, state)
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"the messages cannot be saved: {e}") from e
