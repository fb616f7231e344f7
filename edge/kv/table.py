"""The pages of one layer group in one cache, in the order of the text."""

from __future__ import annotations

from edge.kv.page_memory import Page
from edge.kv.pool import PagePool
from edge.native import CData, ffi

__all__ = ["PageTable"]


class PageTable:
    """The pages of one group: as pages of the pool, and as pointers for the native library.

    index: the index of the group. pages: page i holds the positions from i * PAGE on; None: it was
    given back, since no later token sees it. After an interrupt or an error there may be more
    pages than the tokens take; these hold nothing.
    """

    def __init__(self, pool: PagePool, index: int, native: CData, n_pages: int) -> None:
        """native: the edge_kv_group to fill. n_pages: how many pages are expected."""
        self.index, self.group = index, pool.layout.groups[index]
        self.page_bytes = self.group.shape.page_bytes
        self.pages: list[Page | None] = []
        self._pool, self._native = pool, native
        self._pointers = ffi.new("void *[]", max(1, n_pages))
        native.shape = self.group.shape.native[0]
        native.pages = self._pointers

    def reserve(self, first: int, n_pages: int) -> None:
        """Make the table n_pages long, and pages from `first` on writable. Raises
        MemoryBudgetError; some of the pages may have been added then.
        """
        if first < len(self.pages):
            page = self.pages[first]
            assert page is not None
            if page.is_shared and (own := self._pool.own(page)) is not page:
                self.replace(first, own)
        while len(self.pages) < n_pages:
            self.push(self._pool.take(self.index))
        for i in range(first, n_pages):  # an interrupt may have left a pointer unset
            page = self.pages[i]
            assert page is not None
            self._pointers[i] = page.pointer
        self._native.n_pages = n_pages

    def publish(self, i: int, key: bytes) -> None:
        """Publish page i, which is full, or take the page that others published before."""
        page = self.pages[i]
        if page is not None:
            shared = self._pool.publish(self.index, key, page)
            if shared is not page:
                self.replace(i, shared)

    def fetch(self, i: int, key: bytes) -> bool:
        """Take page i from the pool: a new last page, or one that was given back. False: the pool
        does not have it.
        """
        page = self._pool.find(self.index, key)
        if page is None:
            return False
        if i == len(self.pages):
            self.push(page)
        else:
            self.replace(i, page)
        return True

    def push(self, page: Page | None) -> None:
        """Append a page that the pool counts for this table; None: a page that was given back."""
        n = len(self.pages)
        if n == len(self._pointers):
            longer = ffi.new("void *[]", 2 * n)
            longer[0:n] = self._pointers[0:n]
            self._pointers = self._native.pages = longer
        self._pointers[n] = page.pointer if page else ffi.NULL
        self.pages.append(page)

    def replace(self, i: int, page: Page) -> None:
        """Replace page i by a page that the pool counts for this table; give the old one back."""
        old = self.pages[i]
        self._pointers[i] = page.pointer  # first: both may be read until the old one is given back
        self.pages[i] = page
        self._pool.give([old])

    def give_back(self, places: range) -> None:
        """Give back these pages, which no later token sees; the table may be shorter."""
        end = min(places.stop, len(self.pages))
        start = end
        while start > places.start and self.pages[start - 1] is not None:
            start -= 1  # pages before a None were given back already
        for i in range(start, end):  # one by one: an interrupt loses no more than one
            page = self.pages[i]
            self.pages[i] = None  # first: every page in the table must have its pointer
            self._pointers[i] = ffi.NULL
            self._pool.give([page])

    def drop(self, n_pages: int) -> None:
        """Give back all pages but the first n_pages."""
        while len(self.pages) > n_pages:  # one by one: an interrupt loses no more than one
            self._pool.give([self.pages.pop()])
