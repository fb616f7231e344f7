"""A toy that fills pages: each position gets a hash of all tokens up to it, so that what a cache
holds can be checked against its tokens alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b

from edge.kv.cache import KVCache
from edge.kv.pool import Node, Page, PagePool
from edge.kv.shape import PAGE, KVShape
from edge.native import ffi

SHAPE = KVShape("f16", 1, 1, 16)
_MARK = 8  # bytes of a position's mark


@cache
def _mark(before: bytes, token: int) -> bytes:
    return blake2b(before + token.to_bytes(4, "little"), digest_size=_MARK).digest()


def marks(tokens: Sequence[int]) -> list[bytes]:
    """What each position must hold."""
    out, mark = [], b""
    for token in tokens:
        mark = _mark(mark, token)
        out.append(mark)
    return out


def run(cache: KVCache, tokens: Sequence[int]) -> None:
    """As a run of the engine does: reserve, write, append."""
    cache.reserve(cache.length + len(tokens))
    for i, mark in enumerate(marks([*cache.tokens, *tokens])[cache.length :], cache.length):
        page = ffi.buffer(cache.handle.pages[i // PAGE], cache.pool.page_bytes)
        page[i % PAGE * _MARK : (i % PAGE + 1) * _MARK] = mark
    cache.append(tokens)


def run_all(cache: KVCache, tokens: Sequence[int]) -> None:
    """As a session does: as much at a time as there is room for."""
    done = 0
    while done < len(tokens):
        n = cache.room(len(tokens) - done)
        run(cache, tokens[done : done + n])
        done += n


def check_content(cache: KVCache) -> None:
    """Every page that the next token may see is there, and holds what its tokens demand."""
    want, window = marks(cache.tokens), cache.window_pages
    for i in range(cache.n_pages):
        seen = not window or i == 0 or i > cache.length // PAGE - window
        assert cache.has_page(i) or not seen
        if cache.has_page(i):
            n = min(PAGE, cache.length - i * PAGE)
            with cache.page(i) as page:
                assert bytes(page[: n * _MARK]) == b"".join(want[i * PAGE : i * PAGE + n])


def published(pool: PagePool) -> Iterator[tuple[list[bytes], Node]]:
    """Each node of the tree, with the tokens of its page and those before."""
    waiting: list[tuple[list[bytes], Node]] = [([], pool._root)]
    while waiting:
        above, node = waiting.pop()
        for tokens, child in node.children.items():
            assert child.tokens == tokens and child.parent is node
            path = [*above, tokens]
            yield path, child
            waiting.append((path, child))


def check_pool(pool: PagePool, caches: Sequence[KVCache]) -> None:
    """No page lost, in two places or miscounted; what is published is whole."""
    tables = [page for cache in caches for page in cache._pages if page is not None]
    counts: dict[Page, int] = {page: tables.count(page) for page in set(tables)}
    assert pool.free + pool.referenced + pool.cached == pool.pages
    assert pool.referenced == len(counts)
    assert all(page.refs == n for page, n in counts.items())
    numbers = [page.number for page in counts]
    places = [*numbers, *pool._cached, *pool._free]
    assert len(set(places)) == len(places) == pool.pages
    n_beyond = sum(number >= pool.planned for number in numbers)  # those of live caches alone
    assert pool.pages == pool.planned + n_beyond
    assert pool.touched_bytes >= pool.referenced * pool.page_bytes
    in_tree = set[Page]()
    for path, node in published(pool):
        assert node.page is not None or node.children
        if node.page is not None:
            assert node.page.node is node and node.page not in in_tree
            in_tree.add(node.page)
            tokens = struct.unpack(f"<{len(path) * PAGE}i", b"".join(path))
            with pool.view(node.page) as page:
                assert bytes(page[: PAGE * _MARK]) == b"".join(marks(tokens)[-PAGE:])
    assert in_tree == {p for p in counts if p.node} | set(pool._cached.values())
