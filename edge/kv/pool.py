"""The memory of keys and values: pages of one model, shared by its sessions.

A full page is *published* under a key: a hash of the model and of all tokens up to the page's last.
Sessions with the same tokens from the start have the same keys, so they find these pages and share
them. Each layer group has its own pages; one key stands for one page of each group, and any of
these may be missing.

Each page counts the tables that have it. A published page that no table has stays for later
sessions until its memory is needed: the least recently used page goes first, and the last pages of
a text go before its first ones. With a store, pages that leave the memory go to disk and are read
from there again.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from edge import forked
from edge.device import memory
from edge.errors import InputError, MemoryBudgetError
from edge.kv.page_memory import Page, PageMemory
from edge.kv.shape import KVLayout
from edge.native import ffi
from edge.sizes import show

if TYPE_CHECKING:
    from edge.kv.page_store import PageStore

__all__ = ["PagePool"]

_ZEROS = bytes(1 << 16)


class PagePool:
    """The pages of one model. Any thread may call any method.

    planned: pages of each layer group that are reserved at once. Pages beyond these are taken while
    caches need them, and given back with the caches. most_bytes: the most bytes that all pages may
    take; None: as many as the system has memory for. store: pages that leave the memory go there.
    root: everything besides tokens that pages depend on.
    Raises MemoryBudgetError.
    """

    def __init__(
        self,
        layout: KVLayout,
        planned: Sequence[int],
        *,
        most_bytes: int | None = None,
        store: PageStore | None = None,
        root: bytes = b"",
    ) -> None:
        self.layout, self.most_bytes, self.store = layout, most_bytes, store
        self.root = blake2b(root, digest_size=32).digest()
        self.lock: Any = threading.RLock()  # or forked.REFUSAL
        self.closed = False
        self._orphans: deque[Sequence[list[Page | None]]] = deque()  # tables that nobody closed
        self._memories: list[PageMemory] = []
        for group, n_pages in zip(layout.groups, planned, strict=True):
            size = group.shape.page_bytes
            try:
                self._memories.append(PageMemory(len(self._memories), size, n_pages, self._spill))
            except (OSError, MemoryError, OverflowError, ValueError) as error:
                raise self._too_much(size * n_pages, memory.available() or 0) from error
        forked.watch(self)

    # ---- figures ----

    @property
    def planned(self) -> int:
        """Pages that were reserved at first."""
        return sum(each.planned for each in self._memories)

    @property
    def pages(self) -> int:
        """All pages: free, referenced and cached."""
        with self.lock:
            self._collect()
            return sum(each.n_pages for each in self._memories)

    @property
    def referenced(self) -> int:
        """Pages that caches refer to."""
        with self.lock:
            self._collect()
            return sum(each.n_referenced for each in self._memories)

    @property
    def cached(self) -> int:
        """Published pages that no cache refers to."""
        with self.lock:
            self._collect()
            return sum(each.n_cached for each in self._memories)

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        with self.lock:
            self._collect()
            return sum(each.n_free for each in self._memories)

    @property
    def touched_bytes(self) -> int:
        """The most memory that the pages of each group ever took from the system at once."""
        return sum(each.touched_bytes for each in self._memories)

    # ---- for caches; group: the index of a layer group ----

    @staticmethod
    def key_after(key: bytes, tokens: bytes) -> bytes:
        """The key of a page with these tokens. key: of the page before, `root` for the first."""
        return blake2b(key + tokens, digest_size=32).digest()

    def take(self, group: int) -> Page:
        """A page of zeros for one table. Raises MemoryBudgetError, InputError once closed."""
        with self.lock:
            page = self._take(group)
            if page.used:  # no session may see what another one wrote
                size = self._memories[group].page_bytes
                for start in range(0, size, len(_ZEROS)):
                    n = min(len(_ZEROS), size - start)
                    ffi.memmove(page.pointer + start, _ZEROS, n)
            page.used = True
            return page

    def share(self, page: Page) -> Page:
        """Count one more table that has the page."""
        with self.lock:
            page.refs += 1
            return page

    def give(self, pages: Iterable[Page | None]) -> None:
        """Take back pages that a table had. pages: in the order of the text, whose first pages
        stay longest.
        """
        if self.lock is forked.REFUSAL:
            return
        with self.lock:
            if self.closed:
                return
            for page in reversed(list(pages)):
                if page is not None:
                    page.refs -= 1
                    if page.refs == 0:
                        self._memories[page.group].retire(page)

    def own(self, page: Page) -> Page:
        """A page with the same content that the table may write to. The table still has the old
        page, too, until it gives it back.

        The result is the page itself, no longer published, when no other table has it and a copy
        would take more memory than was planned. Raises MemoryBudgetError.
        """
        with self.lock:
            self._collect()
            pages = self._memories[page.group]
            if page.refs == 1 and page.key is not None and pages.is_full:
                self._spill(page)
                pages.unpublish(page)
                return page
            copy = self._take(page.group)
            ffi.memmove(copy.pointer, page.pointer, pages.page_bytes)
            copy.used = True
            return copy

    def publish(self, group: int, key: bytes, page: Page) -> Page:
        """Let others find a full page.

        Returns the page that the table must use from now on: the page that was published under
        this key before, if any. The table gives its own page back then.
        """
        with self.lock:
            if self.closed:
                return page
            pages = self._memories[group]
            first = pages.published.get(key)
            if first is None:
                page.key = key  # first: after the next line others may find the page
                pages.published[key] = page
            elif first is not page:
                pages.refer(first)
                return first
            return page

    def has(self, group: int, key: bytes) -> bool:
        """Whether a page is published or stored; a stored page may still turn out damaged."""
        with self.lock:
            if self.closed:
                return False
            if key in self._memories[group].published:
                return True
            return self.store is not None and self.store.has(self._store_key(group, key))

    def find(self, group: int, key: bytes) -> Page | None:
        """The page that is published under this key, for one table; None: neither the memory nor
        the store has it.
        """
        with self.lock:
            if self.closed:
                return None
            pages = self._memories[group]
            page = pages.published.get(key)
            if page is not None:
                pages.refer(page)
                return page
            name = self._store_key(group, key)
            if self.store is None or not self.store.has(name):
                return None
            try:
                page = self._take(group)
            except MemoryBudgetError:
                return None
            page.used = True
            with self.view(page) as data:
                is_read = self.store.read(name, data)
            if not is_read:
                self.give([page])
                return None
            page.key = key
            pages.published[key] = page
            return page

    def keep(self, group: int, key: bytes) -> bool:
        """Write a published page to the store. False: neither the memory nor the store has it.

        Raises InputError when there is no store, or it cannot be written.
        """
        if self.store is None:
            raise InputError("nothing can be kept: load the model with prefix_cache=FOLDER")
        name = self._store_key(group, key)
        with self.lock:
            pages = self._memories[group]
            page = None if self.closed else pages.published.get(key)
            if page is None:
                return self.store.has(name)
            pages.refer(page)
        try:
            with self.view(page) as data:  # without the lock: a published page does not change
                self.store.write(name, data, durable=True)
        finally:
            self.give([page])
        return True

    def view(self, page: Page) -> memoryview:
        """The bytes of a page. Raises InputError once closed."""
        with self.lock:
            if self.closed:
                raise InputError("the model was closed")
            end = page.offset + self._memories[page.group].page_bytes
            return memoryview(page.block)[page.offset : end]

    def abandon(self, tables: Sequence[list[Page | None]]) -> None:
        """Note the tables of an owner that was never closed. Takes no lock: the garbage collector
        may call this at any moment.
        """
        self._orphans.append(tables)

    def close(self) -> None:
        """Give the memory back. Caches that still exist can only be closed."""
        if self.lock is forked.REFUSAL:
            return
        with self.lock:
            self.closed = True
            for pages in self._memories:
                pages.close()
            self._orphans.clear()
            if self.store is not None:
                self.store.close()

    def _forked(self) -> None:
        self.lock = forked.REFUSAL

    # ---- inside; the caller holds the lock ----

    def _collect(self) -> None:
        """Take back the pages of tables that nobody closed."""
        while self._orphans:
            for table in self._orphans.popleft():
                self.give(table)
                table.clear()

    def _take(self, group: int) -> Page:
        """A page for one table; it may hold the bytes of its last use."""
        if self.closed:
            raise InputError("the model was closed")
        self._collect()
        page = self._memories[group].planned_page() or self._grow(self._memories[group])
        page.refs = 1
        return page

    def _grow(self, pages: PageMemory) -> Page:
        """A page beyond the planned ones."""
        size = pages.page_bytes
        n_bytes = sum(each.n_pages * each.page_bytes for each in self._memories)
        available = memory.available()
        if self.most_bytes is not None and n_bytes + size > self.most_bytes:
            raise self._too_much(n_bytes + size, self.most_bytes)
        if available is not None and size > available:
            raise self._too_much(n_bytes + size, n_bytes + available)
        try:
            return pages.new_page()
        except (OSError, MemoryError, OverflowError, ValueError) as error:
            raise self._too_much(size, memory.available() or 0) from error

    def _spill(self, page: Page) -> None:
        """Write a published page to the store, if that works; nothing depends on it."""
        if self.store is not None and self.store.error is None and page.key is not None:
            with contextlib.suppress(InputError), self.view(page) as data:
                self.store.write(self._store_key(page.group, page.key), data)

    def _store_key(self, group: int, key: bytes) -> bytes:
        """The key of a page in the store: with one group, the key itself."""
        if len(self._memories) == 1:
            return key
        return blake2b(key + group.to_bytes(4, "little"), digest_size=32).digest()

    def _too_much(self, needed: int, budget: int) -> MemoryBudgetError:
        return MemoryBudgetError(
            f"no memory for keys and values of {show(needed)} in all, there is "
            f"{show(budget)}: close a session, or load with a smaller context",
            needed=needed,
            budget=budget,
            parts={"keys and values": needed},
        )
