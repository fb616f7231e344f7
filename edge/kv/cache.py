"""The KV cache of one session: a table of pages out of the pool, and the tokens that they hold."""

from __future__ import annotations

import struct
import weakref
from array import array
from collections.abc import Sequence
from typing import Any, get_args

from edge import check
from edge.errors import InputError, MemoryBudgetError
from edge.kv.pool import Page, PagePool
from edge.kv.shape import PAGE, KVShape, WhenFull, kv_types, pages_of, too_many
from edge.native import ffi

__all__ = ["PAGE", "KVCache", "KVShape", "WhenFull", "kv_types", "too_many"]

_SINK_PAGES = 1
_LEAST_PAGES = 4  # of a context that slides: the sinks, and a window worth the name
_FULL_PAGE = struct.Struct(f"<{PAGE}i")


class KVCache:
    """Keys and values of the tokens of one session, in pages that come as needed.

    tokens: those that it holds; limit: the most that it can hold. A cached key was rotated for its
    position, so tokens can be dropped from the end only.

    when_full: "stop": it holds n_context tokens. "slide": n_positions, in the memory of n_context.
    Tokens keep their true positions. Each sees the first page (64 tokens, the sinks) and the last
    n_context / 64 - 1 pages up to its own; pages that no later token sees are given back. What it
    sees depends on its position alone, so the numbers do not depend on how tokens are run.
    Raises InputError for a context that is too small to slide.
    """

    def __init__(
        self,
        pool: PagePool,
        n_context: int,
        *,
        when_full: WhenFull = "stop",
        n_positions: int = 0,
    ) -> None:
        check.choice("when_full", when_full, get_args(WhenFull))
        n_pages = n_context // PAGE
        self.limit, self.window_pages = n_context, 0
        if when_full == "slide":
            if n_pages < _LEAST_PAGES:
                raise InputError(
                    f"a context of {n_context} tokens cannot slide: load the model with "
                    f"{_LEAST_PAGES * PAGE} or more"
                )
            self.limit, self.window_pages = n_positions, n_pages - _SINK_PAGES
        self.pool, self.n_context, self.when_full = pool, n_context, when_full
        self.tokens = array("i")
        self._pages: list[Page | None] = []  # None: given back, behind the window
        self._table = ffi.new("void *[]", max(1, n_pages))
        self._handle: Any = ffi.new("edge_kv *", {"pages": self._table})
        self._handle.shape = pool.shape.native[0]
        self._handle.sink_pages = _SINK_PAGES if self.window_pages else 0
        self._handle.window_pages = self.window_pages
        weakref.finalize(self, pool.abandon, self._pages).atexit = False  # if nobody closes it

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return len(self.tokens)

    @property
    def handle(self) -> Any:
        """The edge_kv. Raises InputError once closed."""
        if self._handle is None:
            raise InputError("the session was closed")
        return self._handle

    def room(self, n_tokens: int) -> int:
        """How many of n_tokens the next run may take so that memory stays that of the context."""
        if not self.window_pages:
            return n_tokens
        edge = max(self._full_pages, self.length // PAGE + 1) * PAGE
        return min(n_tokens, edge - self.length)

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens in all. Raises ContextError, MemoryBudgetError."""
        if n_tokens > self.limit:
            raise too_many(n_tokens, self.limit)
        handle = self.handle
        first, n_pages = self.length // PAGE, pages_of(n_tokens)
        self._drop(pages_of(self.length))  # what an interrupt or an error left behind the tokens
        self._slide(first)
        try:
            if first < len(self._pages):
                self._make_own(first)
            while len(self._pages) < n_pages:
                self._push(self.pool.take())
        except MemoryBudgetError:
            self._drop(pages_of(self.length))
            raise
        for i in range(first, n_pages):  # an interrupt may have come before one was entered
            page = self._pages[i]
            assert page is not None
            self._table[i] = page.pointer
        handle.n_pages = len(self._pages)

    def append(self, tokens: Sequence[int]) -> None:
        """The tokens were run: they are in the cache now. Pages that are full are published."""
        first = self.length // PAGE
        self.tokens.extend(tokens)
        for i in range(first, min(self.length // PAGE, self._full_pages)):
            before, page = (self._pages[i - 1] if i else None), self._pages[i]
            if page is None or (i and (before is None or before.node is None)):
                break
            shared = self.pool.publish(before, self._tokens_of(i, self.tokens), page)
            if shared is not page:
                self._replace(i, shared)

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens, or fewer: with a window that has slid, what the next
        token would see may be gone. Then only the sinks stay, and the rest must be run again.

        Raises InputError for more than there are.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens, cannot keep {length}")
        seen = self._pages[: pages_of(length)]
        seen[_SINK_PAGES : max(_SINK_PAGES, self._first_seen(length // PAGE))] = []
        if None in seen:
            length = min(length, self._pages.index(None) * PAGE)
        del self.tokens[length:]  # first: never more tokens than pages
        self._drop(pages_of(length))

    def adopt(self, tokens: Sequence[int]) -> int:
        """Take over published pages that go on as `tokens` do, as many whole ones as there are.

        tokens: from the first on, beginning with those that it holds. Returns the new length.
        """
        _ = self.handle
        if array("i", tokens[: self.length]) != self.tokens:
            return self.length
        self._drop(pages_of(self.length))
        i = self.length // PAGE
        while i < min(len(tokens) // PAGE, self._full_pages):
            before = self._pages[i - 1] if i else None
            if i and (before is None or before.node is None):
                break
            page = self.pool.find(before, self._tokens_of(i, tokens))
            if page is None:
                break
            if i < len(self._pages):  # the page that was full in part
                self._replace(i, page)
            else:
                self._push(page)
            i += 1
            self.tokens.extend(tokens[self.length : i * PAGE])
        return self.length

    def fork(self) -> KVCache:
        """Another cache with the same content, in the same memory until one of them writes."""
        _ = self.handle
        twin = KVCache(self.pool, self.n_context, when_full=self.when_full, n_positions=self.limit)
        for page in self._pages[: pages_of(self.length)]:
            twin._push(page and self.pool.share(page))
        twin.tokens = self.tokens[:]
        return twin

    def keep(self, n_tokens: int) -> int:
        """Write the whole pages of the first n_tokens to the pool's store; returns the tokens.

        Raises InputError when the pool has none, or it cannot be written.
        """
        pages = list[Page]()
        for page in self._pages[: min(n_tokens, self.length) // PAGE]:
            if page is None or page.node is None:
                break
            pages.append(page)
        self.pool.keep(pages)
        return len(pages) * PAGE

    @property
    def n_pages(self) -> int:
        """Pages that its tokens take, those that were given back included."""
        return pages_of(self.length)

    def has_page(self, i: int) -> bool:
        """Whether page i is in memory, and not given back behind the window."""
        return self._pages[i] is not None

    def page(self, i: int) -> memoryview:
        """The bytes of page i, to be read before the cache is used again. Raises InputError for a
        page that it does not have.
        """
        _ = self.handle
        page = self._pages[i] if 0 <= i < self.n_pages else None
        if page is None:
            raise InputError(f"the cache has no page {i}")
        return self.pool.view(page).toreadonly()

    def overflowed_layer(self) -> int | None:
        """The first layer with a key or value that became infinite when it was stored as f16, of
        the positions that room was made for; None: there is none, or they are of another type.
        """
        import numpy as np

        layers = list[int]()
        if self.pool.shape.type == "f16":  # all of a page are float16, layers one after the other
            for page in filter(None, self._pages):
                halves = np.frombuffer(self.pool.view(page), np.float16)
                strange = np.flatnonzero(~np.isfinite(halves))
                if len(strange) and np.isinf(halves[strange[0]]):  # what it makes is NaN
                    layers.append(int(strange[0]) * self.pool.shape.n_layers // len(halves))
        return min(layers, default=None)

    def unseen(self, length: int) -> range:
        """Pages that no token behind the first `length` sees."""
        return range(_SINK_PAGES, max(_SINK_PAGES, self._first_seen(length // PAGE)))

    def restore(self, tokens: Sequence[int], pages: Sequence[bytes | memoryview | None]) -> None:
        """Fill an empty cache with what another one held: its tokens, and `page` of each page, or
        None for one that it had given back.

        Raises InputError for pages that cannot be those of the tokens, MemoryBudgetError,
        ContextError; it is empty then.
        """
        if self.length or len(pages) != pages_of(len(tokens)):
            raise InputError(f"{len(pages)} pages of {len(tokens)} tokens do not fill the cache")
        if len(tokens) > self.limit:
            self.reserve(len(tokens))  # says so
        self._drop(0)
        gone = self.unseen(len(tokens))
        try:
            for i, data in enumerate(pages):
                if data is None and i in gone:
                    self._push(None)
                    continue
                if data is None or memoryview(data).nbytes != self.pool.page_bytes:
                    raise InputError(f"page {i} is not one of {self.pool.page_bytes} bytes")
                page = self.pool.take()
                self._push(page)
                ffi.memmove(page.pointer, data, self.pool.page_bytes)
        except BaseException:
            self._drop(0)
            raise
        self.append(tokens)

    def close(self) -> None:
        """Give the memory back."""
        self._handle = None
        self.tokens = array("i")
        self._drop(0)

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- inside ----

    @property
    def _full_pages(self) -> int:
        """Pages from the start whose positions see all before them: what they hold is the same in
        every cache with these tokens.
        """
        return _SINK_PAGES + self.window_pages if self.window_pages else pages_of(self.limit)

    @staticmethod
    def _tokens_of(i: int, tokens: Sequence[int]) -> bytes:
        return _FULL_PAGE.pack(*tokens[i * PAGE : (i + 1) * PAGE])

    def _first_seen(self, i: int) -> int:
        """The first page behind the sinks that a position in page i sees."""
        return max(0, i - self.window_pages + 1) if self.window_pages else 0

    def _slide(self, i: int) -> None:
        """Give back what no position from page i on sees."""
        first = min(self._first_seen(i), len(self._pages))
        gone = self._pages[_SINK_PAGES:first]
        if any(gone):
            self._pages[_SINK_PAGES:first] = [None] * len(gone)
            self.pool.give(gone)

    def _make_own(self, i: int) -> None:
        """Page i may be written to: it is a copy now, when it was shared."""
        page = self._pages[i]
        assert page is not None
        if page.is_shared and (own := self.pool.own(page)) is not page:
            self._replace(i, own)

    def _replace(self, i: int, page: Page) -> None:
        """Put a page of ours in the place of page i, which is given back."""
        old = self._pages[i]
        self._table[i] = page.pointer  # first: until the old one is given, either may be read
        self._pages[i] = page
        self.pool.give([old])

    def _push(self, page: Page | None) -> None:
        n = len(self._pages)
        if n == len(self._table):
            longer = ffi.new("void *[]", 2 * n)
            longer[0:n] = self._table[0:n]
            self._table = self.handle.pages = longer
        self._table[n] = page.pointer if page else ffi.NULL
        self._pages.append(page)

    def _drop(self, n_pages: int) -> None:
        """Give back all pages but the first n_pages."""
        while len(self._pages) > n_pages:  # one by one: an interrupt loses no more than one
            self.pool.give([self._pages.pop()])
