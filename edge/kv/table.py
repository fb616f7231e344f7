"""The pages of one layer group that a cache has, by their place in the text."""

from __future__ import annotations

from typing import Any

from edge.kv.page_memory import Page
from edge.kv.pool import PagePool
from edge.native import ffi

__all__ = ["PageTable"]


class PageTable:
    """One group's pages, in the pool and as the native library sees them.

    index: of the group. pages: page i holds positions from i * PAGE on; None: it was given back,
    since no later token sees it. It may be longer than the tokens of its cache: an interrupt or an
    error left pages behind them, which hold nothing.
    """

    def __init__(self, pool: PagePool, index: int, native: Any, n_pages: int) -> None:
        """native: the edge_kv_group to fill. n_pages: that are expected."""
        self.index, self.group = index, pool.layout.groups[index]
        self.page_bytes = self.group.shape.page_bytes
        self.pages: list[Page | None] = []
        self._pool, self._native = pool, native
        self._pointers = ffi.new("void *[]", max(1, n_pages))
        native.shape = self.group.shape.native[0]
        native.pages = self._pointers

    def reserve(self, first: int, n_pages: int) -> None:
        """Have n_pages, of which those from `first` on may be written to. Raises MemoryBudgetError:
        some may be there then.
        """
        if first < len(self.pages):
            page = self.pages[first]
            assert page is not None
            if page.is_shared and (own := self._pool.own(page)) is not page:
                self.replace(first, own)
        while len(self.pages) < n_pages:
            self.push(self._pool.take(self.index))
        for i in range(first, n_pages):  # an interrupt may have come before one was entered
            page = self.pages[i]
            assert page is not None
            self._pointers[i] = page.pointer
        self._native.n_pages = n_pages

    def publish(self, i: int, key: bytes) -> None:
        """Page i is full: let others find it, or take the one that was there first."""
        page = self.pages[i]
        if page is not None:
            shared = self._pool.publish(self.index, key, page)
            if shared is not page:
                self.replace(i, shared)

    def fetch(self, i: int, key: bytes) -> bool:
        """Take page i, behind the last or one that was given back, from the pool; False: it is not
        to be had.
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
        """One more page, of ours."""
        n = len(self.pages)
        if n == len(self._pointers):
            longer = ffi.new("void *[]", 2 * n)
            longer[0:n] = self._pointers[0:n]
            self._pointers = self._native.pages = longer
        self._pointers[n] = page.pointer if page else ffi.NULL
        self.pages.append(page)

    def replace(self, i: int, page: Page) -> None:
        """Put a page of ours in the place of page i, which is given back."""
        old = self.pages[i]
        self._pointers[i] = page.pointer  # first: until the old one is given, either may be read
        self.pages[i] = page
        self._pool.give([old])

    def give_back(self, places: range) -> None:
        """No token sees these pages any more; there may be fewer."""
        end = min(places.stop, len(self.pages))
        start = end
        while start > places.start and self.pages[start - 1] is not None:
            start -= 1  # before it they were given back already
        for i in range(start, end):  # one by one: an interrupt loses no more than one
            page = self.pages[i]
            self.pages[i] = None  # first: what is in the table has its pointer
            self._pointers[i] = ffi.NULL
            self._pool.give([page])

    def drop(self, n_pages: int) -> None:
        """Give back all pages but the first n_pages."""
        while len(self.pages) > n_pages:  # one by one: an interrupt loses no more than one
            self._pool.give([self.pages.pop()])
