"""The KV cache of one session: its tokens, and for each layer group a table of pages."""

from __future__ import annotations

import struct
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any, get_args

from edge import check
from edge.errors import InputError, MemoryBudgetError
from edge.kv.pool import PagePool
from edge.kv.shape import PAGE, LayerGroup, WhenFull, pages_of, too_many
from edge.kv.table import PageTable
from edge.native import ffi

__all__ = ["KVCache"]

_SINK_PAGES = 1
_LEAST_PAGES = 4  # of a context that slides: the sinks, and a window worth the name
_FULL_PAGE = struct.Struct(f"<{PAGE}i")


class KVCache:
    """Keys and values of the tokens of one session, in pages that come as needed.

    tokens: those that it holds; limit: the most that it can hold. A cached key was rotated for its
    position, so tokens can be dropped from the end only.

    when_full: "stop": it holds n_context tokens. "slide": n_positions, in the memory of n_context.
    Tokens keep their true positions. Each sees the first page (64 tokens, the sinks) and the last
    n_context / 64 - 1 pages up to its own, as far as a window of its layer lets it; what it sees
    depends on its position alone, so the numbers do not depend on how tokens are run. Pages that no
    later token sees, behind this window or that of a layer group, are given back.

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
        self._keys: list[bytes] = []  # of its first whole pages in the pool, as far as asked for
        self.n_groups = len(pool.layout.groups)
        groups = ffi.new("edge_kv_group[]", self.n_groups)
        for group in groups:
            group.sink_pages = _SINK_PAGES if self.window_pages else 0
            group.window_pages = self.window_pages
        self._tables = [PageTable(pool, i, groups[i], n_pages) for i in range(self.n_groups)]
        self._handle: Any = ffi.new("edge_kv *", {"n_groups": self.n_groups, "groups": groups})
        self._groups = groups  # the handle points to them
        pages = [table.pages for table in self._tables]
        weakref.finalize(self, pool.abandon, pages).atexit = False  # if nobody closes it

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
        _ = self.handle
        self._drop(pages_of(self.length))  # what an interrupt or an error left behind the tokens
        for table in self._tables:
            table.give_back(self._unseen(table.group, self.length))
        try:
            for table in self._tables:
                table.reserve(self.length // PAGE, pages_of(n_tokens))
        except MemoryBudgetError:
            self._drop(pages_of(self.length))
            raise

    def append(self, tokens: Sequence[int]) -> None:
        """The tokens were run: they are in the cache now. Pages that are full are published."""
        first = self.length // PAGE
        self.tokens.extend(tokens)
        for i in range(first, min(self.length // PAGE, self._full_pages)):
            for table in self._tables:
                table.publish(i, self._key(i))

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens, or fewer: what the next token would see may have been
        given back. Where the pool does not have it any more, the most is kept with which nothing
        is missing, and the rest must be run again.

        Raises InputError for more than there are.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens, cannot keep {length}")
        while (missing := self._fetch(length)) is not None:
            length = missing * PAGE
        del self._keys[length // PAGE :]  # first: never keys of other tokens
        del self.tokens[length:]  # then: never more tokens than pages
        self._drop(pages_of(length))

    def holds(self, length: int) -> bool:
        """Whether `trim` to this length keeps it all, as far as can be said without doing it."""
        return all(
            table.pages[i] is not None or (self._is_public(i) and self.pool.has(g, self._key(i)))
            for g, table in enumerate(self._tables)
            for i in self._needed(table.group, length)
        )

    def adopt(self, tokens: Sequence[int]) -> int:
        """Take over published pages that go on as `tokens` do: as many whole ones as every layer
        group can serve, of which one with a window needs only what later tokens see.

        tokens: from the first on, beginning with those that it holds. Returns the new length.
        """
        _ = self.handle
        if array("i", tokens[: self.length]) != self.tokens:
            return self.length
        first, keys = self.length // PAGE, list[bytes]()
        n_pages = min(len(tokens) // PAGE, self._full_pages)

        def is_there(group: int, i: int) -> bool:
            if i == len(keys):
                keys.append(self._key_after(keys[-1] if keys else self.pool.root, i, tokens))
            return self.pool.has(group, keys[i])

        keys += (self._key(i) for i in range(first))
        while True:
            self._drop(pages_of(self.length))
            n_pages = self._reach(range(first, n_pages), is_there)
            if n_pages <= first:
                return self.length
            missing = self._take(keys, range(first, n_pages))
            if missing is None:
                self.tokens.extend(tokens[self.length : n_pages * PAGE])
                self._keys = keys[:n_pages]
                return self.length
            n_pages = missing  # it was gone when we came for it

    def fork(self) -> KVCache:
        """Another cache with the same content, in the same memory until one of them writes."""
        _ = self.handle
        twin = KVCache(self.pool, self.n_context, when_full=self.when_full, n_positions=self.limit)
        for mine, its in zip(self._tables, twin._tables, strict=True):
            for page in mine.pages[: pages_of(self.length)]:
                its.push(page and self.pool.share(page))
        twin.tokens = self.tokens[:]
        return twin

    def keep(self, n_tokens: int) -> int:
        """Write the whole pages of the first n_tokens to the pool's store; returns of how many
        tokens it has all that later ones need.

        Raises InputError when the pool has none, or it cannot be written.
        """
        if self.pool.store is None:
            raise InputError("nothing can be kept: load the model with prefix_cache=FOLDER")
        n_pages = min(min(n_tokens, self.length) // PAGE, self._full_pages)
        kept = self._reach(range(n_pages), lambda g, i: self.pool.keep(g, self._key(i)))
        return kept * PAGE

    @property
    def n_pages(self) -> int:
        """Pages that its tokens take, those that were given back included."""
        return pages_of(self.length) * self.n_groups

    def has_page(self, number: int) -> bool:
        """Whether this page is in memory, and was not given back behind a window."""
        i, group = divmod(number, self.n_groups)
        return self._tables[group].pages[i] is not None

    def page(self, number: int) -> memoryview:
        """The bytes of a page, to be read before the cache is used again. Raises InputError for a
        page that it does not have.
        """
        _ = self.handle
        i, group = divmod(number, self.n_groups)
        page = self._tables[group].pages[i] if 0 <= number < self.n_pages else None
        if page is None:
            raise InputError(f"the cache has no page {number}")
        return self.pool.view(page).toreadonly()

    def overflowed_layer(self) -> int | None:
        """The first layer with a key or value that became infinite when it was stored as f16, of
        the positions that room was made for; None: there is none, or they are of another type.
        """
        import numpy as np

        layers = list[int]()
        if self.pool.layout.type == "f16":  # all of a page are float16, layers one after the other
            for table in self._tables:
                for page in filter(None, table.pages):
                    halves = np.frombuffer(self.pool.view(page), np.float16)
                    strange = np.flatnonzero(~np.isfinite(halves))
                    if len(strange) and np.isinf(halves[strange[0]]):  # what it makes is NaN
                        members = table.group.layers
                        layers.append(members[int(strange[0]) * len(members) // len(halves)])
        return min(layers, default=None)

    def unseen(self, length: int) -> tuple[range, ...]:
        """Of each layer group, numbers of the pages that no token behind the first `length` sees;
        a gap between those that are seen, or all up to the first that is.
        """
        n = self.n_groups
        gaps = [self._unseen(table.group, length) for table in self._tables]
        return tuple(range(gap.start * n + g, gap.stop * n + g, n) for g, gap in enumerate(gaps))

    def restore(self, tokens: Sequence[int], pages: Sequence[bytes | memoryview | None]) -> None:
        """Fill an empty cache with what another one held: its tokens, and `page` of each number, or
        None for one that it had given back.

        Raises InputError for pages that cannot be those of the tokens, MemoryBudgetError,
        ContextError; it is empty then.
        """
        if self.length or len(pages) != pages_of(len(tokens)) * self.n_groups:
            raise InputError(f"{len(pages)} pages of {len(tokens)} tokens do not fill the cache")
        if len(tokens) > self.limit:
            self.reserve(len(tokens))  # says so
        self._drop(0)
        gone = self.unseen(len(tokens))
        try:
            for number, data in enumerate(pages):
                table = self._tables[number % self.n_groups]
                if data is None and number in gone[table.index]:
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

    # ---- inside; pages are counted in each group ----

    @property
    def _full_pages(self) -> int:
        """Pages from the start that hold the same in every cache with these tokens: when a context
        slides, positions in later ones do not see all before them.
        """
        return _SINK_PAGES + self.window_pages if self.window_pages else pages_of(self.limit)

    def _is_public(self, i: int) -> bool:
        """Whether page i is whole, and the same in every cache with these tokens."""
        return i < min(self.length // PAGE, self._full_pages)

    def _key(self, i: int) -> bytes:
        """The key of page i, a whole one. They are made when they are first asked for."""
        while len(self._keys) <= i:
            before = self._keys[-1] if self._keys else self.pool.root
            self._keys.append(self._key_after(before, len(self._keys), self.tokens))
        return self._keys[i]

    def _key_after(self, before: bytes, i: int, tokens: Sequence[int]) -> bytes:
        """The key of page i of these tokens, behind a page with the key `before`."""
        return self.pool.key_after(before, _FULL_PAGE.pack(*tokens[i * PAGE : (i + 1) * PAGE]))

    def _unseen(self, group: LayerGroup, length: int) -> range:
        """Pages of a group that no token behind the first `length` sees: a gap behind the sinks,
        where those are seen.
        """
        start, stop = 0, group.first_page(length)
        if self.window_pages:
            start = 0 if stop else _SINK_PAGES
            stop = max(stop, length // PAGE - self.window_pages + 1)
        return range(start, max(start, stop))

    def _needed(self, group: LayerGroup, length: int) -> list[int]:
        """The other pages of the first `length` tokens."""
        gap, n_pages = self._unseen(group, length), pages_of(length)
        return [*range(min(gap.start, n_pages)), *range(gap.stop, n_pages)]

    def _fetch(self, length: int) -> int | None:
        """Bring back from the pool what a token behind the first `length` needs and was given back.
        The first page that is not to be had; None: all are there.
        """
        for table in self._tables:
            for i in self._needed(table.group, length):
                if table.pages[i] is None and not (
                    self._is_public(i) and table.fetch(i, self._key(i))
                ):
                    return i
        return None

    def _reach(self, places: range, is_there: Callable[[int, int], bool]) -> int:
        """How many first pages can be had such that no group lacks one that later tokens need, at
        most places.stop; those before places.start are there.

        is_there(group, i): whether a group's page i is to be had.
        """
        reach, begins = places.start, [0] * self.n_groups  # of what is there without a gap
        for i in places:
            for table in self._tables:
                if not is_there(table.index, i):
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
        """Put pages of the pool behind those of the tokens, where later tokens need them, and in
        the place of one that is full in part: in all groups, or it would count as whole in one
        where it is not. The first that is not to be had; None: all are there.
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
