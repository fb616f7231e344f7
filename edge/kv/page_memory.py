"""Memory in pages of one size: planned pages, pages beyond them, and how many tables have each.

    free        memory that holds nothing
    referenced  in the table of one cache or more; private, or published and never written again
    cached      published, in the table of no cache; in planned memory only

An interrupt may come between any two steps. Their order makes sure that no cache writes to a page
that another one has. An interrupted call may leave a planned page in no list; `_recover` finds it
when no other page is free.
"""

from __future__ import annotations

import contextlib
import heapq
import mmap
from collections import OrderedDict
from collections.abc import Callable

from edge.device import memory
from edge.native import CData, ffi

__all__ = ["Page", "PageMemory"]


class Page:
    """One page. refs: how many tables have it; key: the key that it is published under, or None;
    group: the index of its layer group; used: whether it was written to since it was mapped.
    """

    __slots__ = ("block", "group", "key", "number", "offset", "pointer", "refs", "used")

    def __init__(self, number: int, group: int, block: mmap.mmap, place: tuple[int, CData]) -> None:
        self.number, self.group, self.block = number, group, block
        self.offset, self.pointer = place
        self.refs = 0
        self.key: bytes | None = None
        self.used = False

    @property
    def is_shared(self) -> bool:
        """Whether others may read the page: it must be copied before it is written to."""
        return self.refs > 1 or self.key is not None


class PageMemory:
    """The pages of one layer group. Its pool holds the lock of the pool in every call.

    planned: pages that are reserved at once, as addresses: the system gives the memory when a page
    is first used. published: key -> page. spill: called with a published page before it leaves the
    memory. Raises OSError, MemoryError, OverflowError and ValueError for too many pages.
    """

    def __init__(
        self, group: int, page_bytes: int, planned: int, spill: Callable[[Page], None]
    ) -> None:
        self.page_bytes, self.planned = page_bytes, planned
        self.published: dict[bytes, Page] = {}
        self._group, self._spill = group, spill
        self._cached: OrderedDict[int, Page] = OrderedDict()  # least recently used first
        self._n_touched, self._n_most = 0, 0
        self._blocks: dict[int, tuple[mmap.mmap, CData]] = {}  # by the number of the first page
        self._next_number = planned
        self._free: list[int] = []  # a heap of numbers: low ones first keeps memory together
        self._pages: list[Page] = []
        if planned:
            block, base = self._map(0, planned)
            self._pages = [
                Page(i, group, block, (i * page_bytes, base + i * page_bytes))
                for i in range(planned)
            ]
            self._free = list(range(planned))

    # ---- figures ----

    @property
    def n_pages(self) -> int:
        """All pages: free, referenced and cached."""
        return self.planned + self._n_beyond

    @property
    def n_referenced(self) -> int:
        """Pages that caches refer to."""
        return self._n_beyond + sum(page.refs > 0 for page in self._pages)

    @property
    def n_cached(self) -> int:
        """Published pages that no cache refers to."""
        return len(self._cached)

    @property
    def n_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def is_full(self) -> bool:
        """Whether caches refer to all planned pages."""
        return not self._free and not self._cached

    @property
    def touched_bytes(self) -> int:
        """The most bytes that the pages ever took from the system at once."""
        return self._n_most * self.page_bytes

    @property
    def _n_beyond(self) -> int:
        """Pages beyond the planned ones."""
        return len(self._blocks) - bool(self._pages)

    # ---- pages ----

    def planned_page(self) -> Page | None:
        """A free planned page, else the least recently used cached one; None: all are in use."""
        if self.is_full:
            self._recover()
        if not self._free and self._cached:
            self._evict()
        if not self._free:
            return None
        page = self._pages[heapq.heappop(self._free)]
        self._n_touched = max(self._n_touched, page.number + 1)
        self._n_most = max(self._n_most, self._n_touched + self._n_beyond)
        return page

    def new_page(self) -> Page:
        """A page beyond the planned ones. Raises OSError, MemoryError."""
        number = self._next_number
        block, base = self._map(number, 1)
        self._next_number += 1
        self._n_most = max(self._n_most, self._n_touched + self._n_beyond)
        return Page(number, self._group, block, (0, base))

    def refer(self, page: Page) -> None:
        """Count one more table that has this published page."""
        self._cached.pop(page.number, None)
        page.refs += 1

    def retire(self, page: Page) -> None:
        """Free or cache a page that no table has any more."""
        if page.number >= len(self._pages):
            if page.key is not None:
                self._move(page)
            self._unmap(page.number)
        elif page.key is not None:
            self._cached[page.number] = page
        else:
            heapq.heappush(self._free, page.number)

    def unpublish(self, page: Page) -> None:
        """Remove the key of the page, so that nobody finds it any more."""
        if page.key is not None and self.published.get(page.key) is page:
            del self.published[page.key]
        page.key = None

    def close(self) -> None:
        """Give the memory back."""
        for number in list(self._blocks):
            self._unmap(number)
        self.published.clear()
        self._cached.clear()

    # ---- inside ----

    def _evict(self) -> None:
        """Free the least recently used cached page."""
        page = next(iter(self._cached.values()))
        self._spill(page)
        self.unpublish(page)
        del self._cached[page.number]
        heapq.heappush(self._free, page.number)

    def _recover(self) -> None:
        """List planned pages again that an interrupt left in no list."""
        for page in self._pages:
            if page.refs == 0:
                self.retire(page)

    def _move(self, page: Page) -> None:
        """Copy a published page beyond the planned ones to a planned page, or else spill it."""
        target, key = self.planned_page(), page.key
        if target is None or key is None:
            self._spill(page)
            self.unpublish(page)
            return
        ffi.memmove(target.pointer, page.pointer, self.page_bytes)
        target.used = True
        target.key = key
        self._cached[target.number] = target
        self.published[key], page.key = target, None

    def _map(self, number: int, n_pages: int) -> tuple[mmap.mmap, CData]:
        """A block for the pages from `number` on, and its address."""
        block = memory.anonymous(n_pages * self.page_bytes)
        base = ffi.from_buffer("uint8_t[]", block)
        self._blocks[number] = block, base
        return block, base

    def _unmap(self, number: int) -> None:
        block, base = self._blocks.pop(number)
        ffi.release(base)
        with contextlib.suppress(BufferError):  # a view of a page is alive: the block goes with it
            block.close()
