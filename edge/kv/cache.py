"""The KV cache of one session: its tokens, and for each layer group a table of pages."""

from __future__ import annotations

import struct
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import get_args

from edge import check
from edge.errors import InputError, MemoryBudgetError
from edge.kv.pool import PagePool
from edge.kv.shape import PAGE, LayerGroup, WhenFull, pages_of, too_many
from edge.kv.table import PageTable
from edge.native import CData, ffi

__all__ = ["KVCache"]

_SINK_PAGES = 1
_LEAST_PAGES = 4  # of a context that slides: one of sinks, three of window
_FULL_PAGE = struct.Struct(f"<{PAGE}i")


class KVCache:
    """Keys and values of the tokens of one session, in pages that are taken when they are needed.

    tokens: the tokens in the cache; limit: the most that it can hold. Tokens can be dropped from
    the end only, since a cached key was rotated for its position.

    when_full: "stop": the cache holds n_context tokens. "slide": it holds n_positions tokens in the
    memory of n_context. Tokens keep their true positions. Each token sees the first page (64
    tokens, the sinks) and the last n_context / 64 - 1 pages, its own included; a layer with a
    window sees the part of these that is in its window. What a token sees depends on its position
    alone, so the results do not depend on how tokens are split into runs. The cache gives back
    pages that no later token sees, because of this window or that of a layer group.

    Pages have numbers: number i * n_groups + g is group g's page of the positions from i * 64 on.
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
        self._keys: list[bytes] = []  # of the first whole pages, see _key
        self.n_groups = len(pool.layout.groups)
        groups = ffi.new("edge_kv_group[]", self.n_groups)
        for group in groups:
            group.sink_pages = _SINK_PAGES if self.window_pages else 0
            group.window_pages = self.window_pages
        self._tables = [PageTable(pool, i, groups[i], n_pages) for i in range(self.n_groups)]
        self._handle: CData = ffi.new("edge_kv *", {"n_groups": self.n_groups, "groups": groups})
        self._groups = groups  # the handle points to them
        pages = [table.pages for table in self._tables]
        weakref.finalize(self, pool.abandon, pages).atexit = False  # if nobody closes it

    @property
    def length(self) -> int:
        """How many tokens are in the cache."""
        return len(self.tokens)

    @property
    def handle(self) -> CData:
        """The native edge_kv. Raises InputError once closed."""
        if self._handle is None:
            raise InputError("the session was closed")
        return self._handle

    def room(self, n_tokens: int) -> int:
        """How many of n_tokens the next run may take without more memory than the context has."""
        if not self.window_pages:
            return n_tokens
        end = max(self._full_pages, self.length // PAGE + 1) * PAGE
        return min(n_tokens, end - self.length)

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens in all. Raises ContextError, MemoryBudgetError."""
        if n_tokens > self.limit:
            raise too_many(n_tokens, self.limit)
        _ = self.handle
        self._drop(pages_of(self.length))  # pages that an interrupt or an error left
        for table in self._tables:
            table.give_back(self._unseen(table.group, self.length))
        try:
            for table in self._tables:
                table.reserve(self.length // PAGE, pages_of(n_tokens))
        except MemoryBudgetError:
            self._drop(pages_of(self.length))
            raise

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens that were run, and publish the pages that are full now."""
        first = self.length // PAGE
        self.tokens.extend(tokens)
        for i in range(first, min(self.length // PAGE, self._full_pages)):
            for table in self._tables:
                table.publish(i, self._key(i))

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens, or fewer.

        The next token may need pages that were given back. If the pool does not have them any more,
        the cache keeps the most tokens with which no page is missing; the caller must run the rest
        again. Raises InputError for more tokens than the cache holds.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens, cannot keep {length}")
        while (missing := self._fetch(length)) is not None:
            length = missing * PAGE
        del self._keys[length // PAGE :]  # first: never keys of other tokens
        del self.tokens[length:]  # then: never more tokens than pages
        self._drop(pages_of(length))

    def holds(self, length: int) -> bool:
        """Whether `trim` would keep this length; a stored page may still turn out damaged."""
        return all(
            table.pages[i] is not None or (self._is_public(i) and self.pool.has(g, self._key(i)))
            for g, table in enumerate(self._tables)
            for i in self._needed(table.group, length)
        )

    def adopt(self, tokens: Sequence[int]) -> int:
        """Take over published whole pages of `tokens`: as many as every layer group can provide.
        A group with a window needs only the pages that later tokens see.

        tokens: from the first on, beginning with those in the cache. Returns the new length.
        """
        _ = self.handle
        if array("i", tokens[: self.length]) != self.tokens:
            return self.length
        first, keys = self.length // PAGE, list[bytes]()
        n_pages = min(len(tokens) // PAGE, self._full_pages)

        def pool_has_page(group: int, i: int) -> bool:
            if i == len(keys):
                keys.append(self._key_after(keys[-1] if keys else self.pool.root, i, tokens))
            return self.pool.has(group, keys[i])

        keys += (self._key(i) for i in range(first))
        while True:
            self._drop(pages_of(self.length))
            n_pages = self._reach(range(first, n_pages), pool_has_page)
            if n_pages <= first:
                return self.length
            missing = self._take(keys, range(first, n_pages))
            if missing is None:
                self.tokens.extend(tokens[self.length : n_pages * PAGE])
                self._keys = keys[:n_pages]
                return self.length
            n_pages = missing  # it left the pool in the meantime

    def fork(self) -> KVCache:
        """Another cache with the same content, in the same memory until one of them writes."""
        _ = self.handle
        twin = KVCache(self.pool, self.n_context, when_full=self.when_full, n_positions=self.limit)
        for table, copy in zip(self._tables, twin._tables, strict=True):
            for page in table.pages[: pages_of(self.length)]:
                copy.push(page and self.pool.share(page))
        twin.tokens = self.tokens[:]
        return twin

    def keep(self, n_tokens: int) -> int:
        """Write the whole pages of the first n_tokens to the pool's store. Returns the number of
        first tokens for which the store has every page that later tokens need.

        Raises InputError when the pool has no store, or it cannot be written.
        """
        if self.pool.store is None:
            raise InputError("nothing can be kept: load the model with prefix_cache=FOLDER")
        n_pages = min(min(n_tokens, self.length) // PAGE, self._full_pages)
        kept = self._reach(range(n_pages), lambda g, i: self.pool.keep(g, self._key(i)))
        return kept * PAGE

    @property
    def n_pages(self) -> int:
        """Pages of all tokens, those that were given back included."""
        return pages_of(self.length) * self.n_groups

    def has_page(self, number: int) -> bool:
        """Whether this page is in memory, and was not given back behind a window."""
        i, group = divmod(number, self.n_groups)
        return self._tables[group].pages[i] is not None

    def page(self, number: int) -> memoryview:
        """The bytes of a page, valid until the cache is used again. Raises InputError for a page
        that is not in memory.
        """
        _ = self.handle
        i, group = divmod(number, self.n_groups)
        page = self._tables[group].pages[i] if 0 <= number < self.n_pages else None
        if page is None:
            raise InputError(f"the cache has no page {number}")
        return self.pool.view(page).toreadonly()

    def overflowed_layer(self) -> int | None:
        """The first layer with a key or value that became infinite when it was stored as f16.
        Positions that were reserved count. None: no layer, or the cache has another type.
        """
        import numpy as np

        layers = list[int]()
        if self.pool.layout.type == "f16":  # a page is float16, one layer after the other
            for table in self._tables:
                for page in filter(None, table.pages):
                    halves = np.frombuffer(self.pool.view(page), np.float16)
                    not_finite = np.flatnonzero(~np.isfinite(halves))
                    if len(not_finite) and np.isinf(halves[not_finite[0]]):  # NaN follows from it
                        members = table.group.layers
                        layers.append(members[int(not_finite[0]) * len(members) // len(halves)])
        return min(layers, default=None)

    def unseen(self, length: int) -> tuple[range, ...]:
        """For each layer group, the numbers of the pages that no token behind the first `length`
        sees: a gap between pages that are seen, or all pages before the first that is seen.
        """
        n = self.n_groups
        gaps = [self._unseen(table.group, length) for table in self._tables]
        return tuple(range(gap.start * n + g, gap.stop * n + g, n) for g, gap in enumerate(gaps))

    def restore(self, tokens: Sequence[int], pages: Sequence[bytes | memoryview | None]) -> None:
        """Fill an empty cache with the content of another one: its tokens, and its `page` of each
        number, or None for a page that it had given back.

        Raises InputError for pages that do not fit the tokens, MemoryBudgetError, ContextError; the
        cache is empty then.
        """
        if self.length or len(pages) != pages_of(len(tokens)) * self.n_groups:
            raise InputError(f"{len(pages)} pages of {len(tokens)} tokens do not fill the cache")
        if len(tokens) > self.limit:
            self.reserve(len(tokens))  # raises ContextError
        self._drop(0)
        unseen = self.unseen(len(tokens))
        try:
            for number, data in enumerate(pages):
                table = self._tables[number % self.n_groups]
                if data is None and number in unseen[table.index]:
                    table.push(None)
                    continue
                if data is None or memoryview(data).nbytes != table.page_bytes:
                    raise InputError(f"page {number} is not one of {table.page_bytes} bytes")
                page = self.pool.take(table.index)
                table.push(page)
                ffi.memmove(page.pointer, data, table.page_bytes)
        except BaseException:
            self._drop(0)
            raise
        self.append(tokens)

    def close(self) -> None:
        """Give the memory back."""
        self._handle = None
        self._keys = []
        self.tokens = array("i")
        self._drop(0)

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- inside; page i is the i-th page of a group ----

    @property
    def _full_pages(self) -> int:
        """How many first pages hold the same in every cache with these tokens. When a context
        slides, positions in later pages do not see all positions before them.
        """
        return _SINK_PAGES + self.window_pages if self.window_pages else pages_of(self.limit)

    def _is_public(self, i: int) -> bool:
        """Whether page i is whole, and the same in every cache with these tokens."""
        return i < min(self.length // PAGE, self._full_pages)

    def _key(self, i: int) -> bytes:
        """The key of page i, which is whole. Keys are computed when they are first needed."""
        while len(self._keys) <= i:
            before = self._keys[-1] if self._keys else self.pool.root
            self._keys.append(self._key_after(before, len(self._keys), self.tokens))
        return self._keys[i]

    def _key_after(self, before: bytes, i: int, tokens: Sequence[int]) -> bytes:
        """The key of page i of these tokens; the page before it has the key `before`."""
        return self.pool.key_after(before, _FULL_PAGE.pack(*tokens[i * PAGE : (i + 1) * PAGE]))

    def _unseen(self, group: LayerGroup, length: int) -> range:
        """Pages of a group that no token behind the first `length` sees; the gap begins behind the
        sinks when these are seen.
        """
        start, stop = 0, group.first_page(length)
        if self.window_pages:
            start = 0 if stop else _SINK_PAGES
            stop = max(stop, length // PAGE - self.window_pages + 1)
        return range(start, max(start, stop))

    def _needed(self, group: LayerGroup, length: int) -> list[int]:
        """Pages of the first `length` tokens that tokens behind them need."""
        gap, n_pages = self._unseen(group, length), pages_of(length)
        return [*range(min(gap.start, n_pages)), *range(gap.stop, n_pages)]

    def _fetch(self, length: int) -> int | None:
        """Take back from the pool the pages that a token behind the first `length` needs and that
        were given back. Returns the first page that the pool lacks, None: it lacks none.
        """
        for table in self._tables:
            for i in self._needed(table.group, length):
                if table.pages[i] is None and not (
                    self._is_public(i) and table.fetch(i, self._key(i))
                ):
                    return i
        return None

    def _reach(self, places: range, has_page: Callable[[int, int], bool]) -> int:
        """The largest number of first pages, at most places.stop, with which no group lacks a page
        that later tokens need. Pages before places.start are in the cache.

        has_page(group, i): whether page i of a group is available.
        """
        reach = places.start
        begins = [0] * self.n_groups  # of each group, the page behind its last missing one
        for i in places:
            for table in self._tables:
                if not has_page(table.index, i):
                    begins[table.index] = i + 1
                    if not table.group.window:
                        return reach
            gaps = [self._unseen(table.group, (i + 1) * PAGE) for table in self._tables]
            if all(
                begin <= (0 if gap.start else gap.stop)
                for begin, gap in zip(begins, gaps, strict=True)
            ):
                reach = i + 1
        return reach

    def _take(self, keys: Sequence[bytes], places: range) -> int | None:
        """Append pages of the pool, where later tokens need them. A last page that is full in part
        is replaced in all groups: else it would count as whole in a group where it is not.
        Returns the first page that the pool lacks, None: it lacks none.
        """
        for table in self._tables:
            gap = self._unseen(table.group, places.stop * PAGE)
            for i in places:
                if i in gap and i == len(table.pages):
                    table.push(None)
                elif not table.fetch(i, keys[i]):
                    return i
        return None

    def _drop(self, n_pages: int) -> None:
        """Give back all pages but the first n_pages of each group."""
        for table in self._tables:
            table.drop(n_pages)
