"""A toy that fills pages: each position gets a hash of all tokens up to it, so that what a cache
holds can be checked against its tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from hashlib import blake2b

from edge.kv.cache import _FULL_PAGE, KVCache
from edge.kv.page_memory import Page
from edge.kv.pool import PagePool
from edge.kv.shape import PAGE, KVLayout, KVShape, LayerGroup
from edge.native import ffi

SHAPE = KVShape("f16", 1, 1, 16)
#: One group; one with a window; a window and none, in shapes that differ; three.
ONE = KVLayout((LayerGroup((0,), 0, SHAPE),))
WINDOW = KVLayout((LayerGroup((0,), 100, SHAPE),))
TWO = KVLayout(
    (
        LayerGroup((0, 2), 70, KVShape("f16", 2, 1, 16)),
        LayerGroup((1,), 0, KVShape("f16", 1, 2, 32)),
    )
)
THREE = KVLayout((*TWO.groups, LayerGroup((3,), 150, KVShape("f16", 1, 1, 16))))

_MARK = 8  # bytes of a position's mark
_PAGES: dict[bytes, list[bytes]] = {}  # key -> marks of a page that was filled


@cache
def _mark(before: bytes, token: int) -> bytes:
    return blake2b(before + token.to_bytes(4, "little"), digest_size=_MARK).digest()


@lru_cache(1000)  # tests say the same prompts again and again
def marks(tokens: tuple[int, ...]) -> list[bytes]:
    """What each position must hold."""
    out, mark = [], b""
    for token in tokens:
        mark = _mark(mark, token)
        out.append(mark)
    return out


def of_group(marks: Sequence[bytes], group: int) -> bytes:
    """What a group's page holds of these."""
    return b"".join(mark[group:] + mark[:group] for mark in marks)


def run(cache: KVCache, tokens: Sequence[int]) -> None:
    """As a run of the engine does: reserve, write, append."""
    cache.reserve(cache.length + len(tokens))
    history = [*cache.tokens, *tokens]
    want = marks(tuple(history))
    for g, group in enumerate(cache.pool.layout.groups):
        n_bytes, pages = group.shape.page_bytes, cache.handle.groups[g].pages
        for i in range(cache.length // PAGE, -(-len(want) // PAGE)):
            first = max(cache.length, i * PAGE)
            part, at = of_group(want[first : (i + 1) * PAGE], g), first % PAGE * _MARK
            ffi.buffer(pages[i], n_bytes)[at : at + len(part)] = part
    key = cache.pool.root
    for start in range(0, len(want) - PAGE + 1, PAGE):
        key = cache.pool.key_after(key, _FULL_PAGE.pack(*history[start : start + PAGE]))
        _PAGES[key] = want[start : start + PAGE]
    cache.append(tokens)


def run_all(cache: KVCache, tokens: Sequence[int]) -> None:
    """As a session does: as much at a time as there is room for."""
    done = 0
    while done < len(tokens):
        n = cache.room(len(tokens) - done)
        run(cache, tokens[done : done + n])
        done += n


def sees(cache: KVCache, group: int, i: int) -> bool:
    """Whether the next token sees something of a group's page i."""
    window, sliding = cache.pool.layout.groups[group].window, cache.window_pages
    in_window = not window or (i + 1) * PAGE > cache.length - window + 1
    return in_window and (not sliding or i == 0 or i > cache.length // PAGE - sliding)


def check_content(cache: KVCache) -> None:
    """Every page that the next token may see is there, and holds what its tokens demand."""
    want = marks(tuple(cache.tokens))
    for number in range(cache.n_pages):
        i, group = divmod(number, cache.n_groups)
        assert cache.has_page(number) or not sees(cache, group, i)
        if cache.has_page(number):
            part = want[i * PAGE : (i + 1) * PAGE]
            with cache.page(number) as page:
                assert bytes(page[: len(part) * _MARK]) == of_group(part, group)


def published(pool: PagePool) -> Iterator[tuple[bytes, Page]]:
    """Pages that others may find; what they must begin with."""
    for group, pages in enumerate(pool._memories):
        for key, page in pages.published.items():
            yield of_group(_PAGES[key], group), page


def check_published(pool: PagePool) -> None:
    """What others may find is what it is said to be."""
    for want, page in published(pool):
        with pool.view(page) as data:
            assert bytes(data[: PAGE * _MARK]) == want


def check_pool(pool: PagePool, caches: Sequence[KVCache]) -> None:
    """No page lost, in two places or miscounted; what is published is whole."""
    assert pool.free + pool.referenced + pool.cached == pool.pages
    for group, pages in enumerate(pool._memories):
        tables = [page for cache in caches for page in cache._tables[group].pages if page]
        counts: dict[Page, int] = {page: tables.count(page) for page in set(tables)}
        assert pages.n_referenced == len(counts)
        assert all(page.refs == n and page.group == group for page, n in counts.items())
        numbers = [page.number for page in counts]
        places = [*numbers, *pages._cached, *pages._free]
        assert len(set(places)) == len(places) == pages.n_pages
        n_beyond = sum(number >= pages.planned for number in numbers)  # those of live caches alone
        assert pages.n_pages == pages.planned + n_beyond
        assert pages.touched_bytes >= pages.n_referenced * pages.page_bytes
        public = set(pages.published.values())
        assert len(public) == len(pages.published)
        assert all(page.key is not None and pages.published[page.key] is page for page in public)
        assert public == {p for p in counts if p.key} | set(pages._cached.values())
    check_published(pool)
