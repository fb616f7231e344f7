"""The memory of keys and values: pages of one model, shared by its sessions.

A page that is full is *published*: it gets a node in a tree, below the node of the page before it,
under its tokens. Who has the same tokens from the start finds it there and shares it. Pages count
who refers to them; a published page that nobody refers to any more stays, for the next to come,
until its memory is needed: least recently used first, and the last pages of a text before its
first ones. A node outlives its page while there are nodes below it. With a store, what leaves the
memory goes to disk and comes back from there.

    free        memory that holds nothing
    referenced  in the table of one cache or more; private, or published and never written again
    cached      published, in no table; in planned memory only

An interrupt may come between any two steps. So they are in an order that never lets two have a page
that one of them writes to: what is cut short may leave a planned page in no list, which is found
again when there is no other.
"""

from __future__ import annotations

import contextlib
import heapq
import mmap
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from edge import forked
from edge.device import memory
from edge.errors import InputError, MemoryBudgetError
from edge.native import ffi
from edge.sizes import show

if TYPE_CHECKING:
    from edge.kv.page_store import PageStore
    from edge.kv.shape import KVShape

__all__ = ["Page", "PagePool"]

_ZEROS = bytes(1 << 16)


class Node:
    """A place in the tree. key: hash of the root and all tokens up to here; page: None when it
    left the memory.
    """

    __slots__ = ("children", "key", "page", "parent", "tokens")

    def __init__(self, parent: Node | None, tokens: bytes, key: bytes) -> None:
        self.parent, self.tokens, self.key = parent, tokens, key
        self.children: dict[bytes, Node] = {}
        self.page: Page | None = None


class Page:
    """One page of memory. refs: how many tables it is in; node: where it is published, or None."""

    __slots__ = ("block", "node", "number", "offset", "pointer", "refs", "used")

    def __init__(self, number: int, block: mmap.mmap, offset: int, pointer: Any) -> None:
        self.number, self.block, self.offset, self.pointer = number, block, offset, pointer
        self.refs = 0
        self.node: Node | None = None
        self.used = False

    @property
    def is_shared(self) -> bool:
        """Whether others may read it: it must be copied before it is written to."""
        return self.refs > 1 or self.node is not None


class PagePool:
    """The pages of one model. Any thread may call any method.

    planned: pages that are set aside at once, as addresses: the system gives the memory when they
    are first used. most: pages that there may ever be; None: as many as the system has memory for.
    Beyond the planned ones memory is taken for caches that live, and given back with them. store:
    where pages go that leave the memory. root: what the store's pages depend on besides tokens.
    Raises MemoryBudgetError.
    """

    def __init__(
        self,
        shape: KVShape,
        planned: int,
        *,
        most: int | None = None,
        store: PageStore | None = None,
        root: bytes = b"",
    ) -> None:
        self.shape, self.planned, self.most, self.store = shape, planned, most, store
        self.page_bytes = shape.page_bytes
        self.lock: Any = threading.RLock()  # or forked.REFUSAL
        self.closed = False
        self._root = Node(None, b"", blake2b(root, digest_size=32).digest())
        self._orphans: deque[list[Page | None]] = deque()  # tables that nobody closed
        self._cached: OrderedDict[int, Page] = OrderedDict()  # least recently used first
        self._n_touched, self._n_most = 0, 0
        self._blocks: dict[int, tuple[mmap.mmap, Any]] = {}  # by their first page's number
        self._next_number = planned
        self._free: list[int] = []  # a heap of numbers: low ones first keeps memory together
        self._pages: list[Page] = []
        if planned:
            block, base = self._map(0, planned)
            size = self.page_bytes
            self._pages = [Page(i, block, i * size, base + i * size) for i in range(planned)]
            self._free = list(range(planned))
        forked.watch(self)

    # ---- figures ----

    @property
    def pages(self) -> int:
        """All pages: free, referenced and cached."""
        with self.lock:
            self._collect()
            return len(self._pages) + len(self._blocks) - bool(self._pages)

    @property
    def referenced(self) -> int:
        """Pages that caches refer to."""
        with self.lock:
            self._collect()
            extra = len(self._blocks) - bool(self._pages)
            return extra + sum(page.refs > 0 for page in self._pages)

    @property
    def cached(self) -> int:
        """Published pages that no cache refers to."""
        with self.lock:
            self._collect()
            return len(self._cached)

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        with self.lock:
            self._collect()
            return len(self._free)

    @property
    def touched_bytes(self) -> int:
        """The most memory that pages ever took from the system at once."""
        return self._n_most * self.page_bytes

    # ---- for caches ----

    def take(self) -> Page:
        """A page of zeros for one table. Raises MemoryBudgetError, InputError once closed."""
        with self.lock:
            page = self._take()
            if page.used:  # what another session wrote is nobody's business
                for start in range(0, self.page_bytes, len(_ZEROS)):
                    n = min(len(_ZEROS), self.page_bytes - start)
                    ffi.memmove(page.pointer + start, _ZEROS, n)
            page.used = True
            return page

    def share(self, page: Page) -> Page:
        """One more table has the page."""
        with self.lock:
            page.refs += 1
            return page

    def give(self, pages: Iterable[Page | None]) -> None:
        """A table has these pages no more. In the order of the text: its first pages are kept
        longest.
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
                        self._retire(page)

    def own(self, page: Page) -> Page:
        """A page with the same content that may be written to, for the table that has this one;
        which stays that table's until it gives it.

        It is the page itself, published no more, when nobody else has it and a copy would take
        more memory than was planned. Raises MemoryBudgetError.
        """
        with self.lock:
            self._collect()
            is_full = not self._free and not self._cached
            if page.refs == 1 and page.node is not None and is_full:
                self._spill(page)
                self._unpublish(page)
                return page
            copy = self._take()
            ffi.memmove(copy.pointer, page.pointer, self.page_bytes)
            copy.used = True
            return copy

    def publish(self, before: Page | None, tokens: bytes, page: Page) -> Page:
        """Let others find a full page, behind the published page `before` (None: it is the first).

        Returns the page that the table shall have in its place: with the same tokens, the one that
        was there first. The table gives its own then.
        """
        with self.lock:
            if self.closed:
                return page
            node = self._child(self._node_of(before), tokens)
            if node.page is None:
                page.node = node  # first: others may find it from the next step on
                node.page = page
            elif node.page is not page:
                self._refer(node.page)
            return node.page

    def find(self, before: Page | None, tokens: bytes) -> Page | None:
        """The published page with these tokens behind `before`, for one table; None: there is
        none, in memory or in the store.
        """
        with self.lock:
            if self.closed:
                return None
            parent = self._node_of(before)
            node = parent.children.get(tokens)
            if node is not None and node.page is not None:
                self._refer(node.page)
                return node.page
            key = self._key(parent, tokens)
            if self.store is None or not self.store.has(key):
                return None
            try:
                page = self._take()
            except MemoryBudgetError:
                return None
            page.used = True
            with self.view(page) as data:
                found = self.store.read(key, data)
            if not found:
                self.give([page])
                return None
            page.node = self._child(parent, tokens)
            page.node.page = page
            return page

    def keep(self, pages: Iterable[Page]) -> None:
        """Write published pages to the store. Raises InputError when there is none, or it cannot
        be written.
        """
        if self.store is None:
            raise InputError("nothing can be kept: load the model with prefix_cache=FOLDER")
        for page in pages:
            with self.lock:
                if page.node is None:
                    continue
                key, data = page.node.key, self.view(page)
            with data:  # nobody writes to it, and others need not wait for the disk
                self.store.write(key, data, durable=True)

    def view(self, page: Page) -> memoryview:
        """The bytes of a page. Raises InputError once closed."""
        with self.lock:
            if self.closed:
                raise InputError("the model was closed")
            return memoryview(page.block)[page.offset : page.offset + self.page_bytes]

    def abandon(self, table: list[Page | None]) -> None:
        """A table's owner is gone. Takes no lock: a garbage collector may call at any moment."""
        self._orphans.append(table)

    def close(self) -> None:
        """Give the memory back. Caches that live can be closed, and nothing else."""
        if self.lock is forked.REFUSAL:
            return
        with self.lock:
            self.closed = True
            for number in list(self._blocks):
                self._unmap(number)
            self._root.children = {}
            self._cached.clear()
            self._orphans.clear()
            if self.store is not None:
                self.store.close()

    def _forked(self) -> None:
        self.lock = forked.REFUSAL

    # ---- inside; all with the lock held ----

    def _collect(self) -> None:
        """Take back the pages of tables that nobody closed."""
        while self._orphans:
            table = self._orphans.popleft()
            self.give(table)
            table.clear()

    def _take(self) -> Page:
        """A page for one table, with whatever was in it."""
        if self.closed:
            raise InputError("the model was closed")
        self._collect()
        page = self._planned_page() or self._grow()
        page.refs = 1
        extra = len(self._blocks) - bool(self._pages)
        self._n_most = max(self._n_most, self._n_touched + extra)
        return page

    def _grow(self) -> Page:
        """A page beyond the planned ones."""
        n = len(self._pages) + len(self._blocks) - bool(self._pages)
        available = memory.available()
        if self.most is not None and n >= self.most:
            budget = self.most * self.page_bytes
        elif available is not None and self.page_bytes > available:
            budget = n * self.page_bytes + available
        else:
            number = self._next_number
            block, base = self._map(number, 1)
            self._next_number += 1
            return Page(number, block, 0, base)
        raise self._too_much((n + 1) * self.page_bytes, budget)

    def _planned_page(self) -> Page | None:
        """A planned page that is free, or the one that is missed least; None: all are in use."""
        if not self._free and not self._cached:
            self._recover()
        if not self._free and self._cached:
            self._evict()
        if not self._free:
            return None
        page = self._pages[heapq.heappop(self._free)]
        self._n_touched = max(self._n_touched, page.number + 1)
        return page

    def _retire(self, page: Page) -> None:
        """No table has the page any more."""
        if page.number >= len(self._pages):
            if page.node is not None:
                self._move(page)
            self._unmap(page.number)
        elif page.node is not None:
            self._cached[page.number] = page
        else:
            heapq.heappush(self._free, page.number)

    def _move(self, page: Page) -> None:
        """What was published beyond the planned memory goes to a planned page, or is lost."""
        there, node = self._planned_page(), page.node
        if there is None or node is None:
            self._spill(page)
            self._unpublish(page)
            return
        ffi.memmove(there.pointer, page.pointer, self.page_bytes)
        there.used = True
        there.node = node
        self._cached[there.number] = there
        node.page, page.node = there, None

    def _refer(self, page: Page) -> None:
        """One more table has a published page."""
        self._cached.pop(page.number, None)
        page.refs += 1

    def _evict(self) -> None:
        """Free the cached page that was not used for longest."""
        page = next(iter(self._cached.values()))
        self._spill(page)
        self._unpublish(page)
        del self._cached[page.number]
        heapq.heappush(self._free, page.number)

    def _recover(self) -> None:
        """Find planned pages that an interrupt left in no list."""
        for page in self._pages:
            if page.refs == 0:
                self._retire(page)

    def _spill(self, page: Page) -> None:
        """Write a page to the store: for later, so a disk that refuses hurts nobody now."""
        if self.store is not None and self.store.error is None and page.node is not None:
            with contextlib.suppress(InputError), self.view(page) as data:
                self.store.write(page.node.key, data)

    def _unpublish(self, page: Page) -> None:
        """The page leaves the tree, with the nodes that nothing needs any more."""
        node: Node | None = page.node
        if node is None:  # an interrupt came before it was freed
            return
        if node.page is page:
            node.page = None
        page.node = None
        while node and node.parent and not node.children and node.page is None:
            del node.parent.children[node.tokens]
            node = node.parent

    def _node_of(self, before: Page | None) -> Node:
        if before is None:
            return self._root
        assert before.node is not None
        return before.node

    def _child(self, parent: Node, tokens: bytes) -> Node:
        """The node below, made when it is missing."""
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(parent, tokens, self._key(parent, tokens))
        return node

    @staticmethod
    def _key(parent: Node, tokens: bytes) -> bytes:
        return blake2b(parent.key + tokens, digest_size=32).digest()

    def _map(self, number: int, n_pages: int) -> tuple[mmap.mmap, Any]:
        """A block of pages from `number` on, and its address."""
        size = n_pages * self.page_bytes
        try:
            block = memory.anonymous(size)
        except (OSError, MemoryError, OverflowError, ValueError) as error:
            raise self._too_much(size, memory.available() or 0) from error
        base = ffi.from_buffer("uint8_t[]", block)
        self._blocks[number] = block, base
        return block, base

    def _unmap(self, number: int) -> None:
        block, base = self._blocks.pop(number)
        ffi.release(base)
        with contextlib.suppress(BufferError):  # somebody looks at a page: it goes with the view
            block.close()

    def _too_much(self, needed: int, budget: int) -> MemoryBudgetError:
        return MemoryBudgetError(
            f"no memory for keys and values of {show(needed)} in all, there is "
            f"{show(budget)}: close a session, or load with a smaller context",
            needed=needed,
            budget=budget,
            parts={"keys and values": needed},
        )
