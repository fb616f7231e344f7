"""The pool of pages: shared by content, counted, evicted, never lost; on a toy that fills them."""

from __future__ import annotations

import gc
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from toy_kv import ONE, SHAPE, THREE, TWO, WINDOW, check_content, check_pool, run, run_all

from edge.device import memory
from edge.errors import ContextError, InputError, MemoryBudgetError
from edge.kv.cache import KVCache
from edge.kv.page_store import PageStore
from edge.kv.pool import PagePool
from edge.kv.shape import PAGE, KVLayout

pytestmark = [pytest.mark.native, pytest.mark.any_isa]  # pages, which kernels only read

CONTEXT = 6 * PAGE
LENGTHS = [1, 63, 64, 65, 128, 200, 300]


def pool_of(
    planned: int = 8, *, layout: KVLayout = ONE, most: int | None = None, **options: object
) -> PagePool:
    """planned, most: pages of each group."""
    most_bytes = None if most is None else most * layout.page_bytes
    n_pages = [planned] * len(layout.groups)
    return PagePool(layout, n_pages, most_bytes=most_bytes, **options)  # type: ignore[arg-type]


def filled(pool: PagePool, tokens: list[int]) -> KVCache:
    cache = KVCache(pool, CONTEXT)
    cache.adopt(tokens[:-1])
    run_all(cache, tokens[cache.length :])
    return cache


def text(n: int, seed: int = 0) -> list[int]:
    return [(i * (7 + seed) + i // 64 + seed) % 50 for i in range(n)]


# ---- sharing ----


def test_the_same_start_is_found_and_shared() -> None:
    pool = pool_of()
    first, second = filled(pool, text(150)), KVCache(pool, CONTEXT)
    assert second.adopt(text(149)) == 128
    assert (pool.referenced, first._tables[0].pages[:2]) == (3, second._tables[0].pages)
    run_all(second, text(150)[128:])
    for cache in (first, second):
        check_content(cache)
    check_pool(pool, [first, second])


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 129, 200])
def test_adoption_takes_whole_pages(n: int) -> None:
    pool = pool_of()
    other = filled(pool, text(200))
    cache = KVCache(pool, CONTEXT)
    assert cache.adopt(text(n)) == n // PAGE * PAGE == cache.length
    check_content(cache)
    check_pool(pool, [other, cache])


def test_a_page_that_is_full_in_part_is_replaced_by_a_whole_one() -> None:
    pool = pool_of()
    other, cache = filled(pool, text(200)), KVCache(pool, CONTEXT)
    run(cache, text(30))
    assert cache.adopt(text(200)) == 192 and cache.adopt(text(10)) == 192
    check_pool(pool, [other, cache])
    assert pool.referenced == 4


def test_other_tokens_are_not_taken() -> None:
    pool = pool_of()
    other, cache = filled(pool, text(200)), KVCache(pool, CONTEXT)
    assert cache.adopt([1, *text(200)]) == 0
    assert cache.adopt(text(70) + [9] * 70) == 64
    run(cache, [3])
    assert cache.adopt(text(200)) == 65  # they go on otherwise than the cache does
    check_pool(pool, [other, cache])


def test_what_was_computed_twice_is_kept_once() -> None:
    pool, caches = pool_of(), []
    for _ in range(3):
        caches.append(KVCache(pool, CONTEXT))
        run(caches[-1], text(140))
    assert pool.referenced == 2 + 3
    for cache in caches:
        check_content(cache)
    check_pool(pool, caches)


def test_a_fork_writes_into_its_own() -> None:
    pool = pool_of()
    one = filled(pool, text(100))
    two = one.fork()
    assert pool.referenced == 2
    run(one, [1] * 20)
    run(two, [2] * 40)
    assert pool.referenced == 4  # 64 of both, 20 and 36 of each, 4 more
    for cache in (one, two):
        check_content(cache)
    check_pool(pool, [one, two])


def test_trim_leaves_what_is_published() -> None:
    pool = pool_of()
    cache = filled(pool, text(130))
    cache.trim(100)
    run(cache, [1] * 10)
    check_content(cache)
    check_pool(pool, [cache])
    assert KVCache(pool, CONTEXT).adopt(text(130)) == 128


def test_trim_without_memory_for_a_copy_writes_in_place() -> None:
    pool = pool_of(2, most=2)
    cache = filled(pool, text(128))
    cache.trim(100)
    run(cache, [1] * 10)
    check_content(cache)
    check_pool(pool, [cache])
    assert pool.pages == 2 and KVCache(pool, CONTEXT).adopt(text(128)) == 64


# ---- memory ----


def test_least_recently_used_texts_go_first_and_their_ends_before_their_starts() -> None:
    pool = pool_of(6)
    for seed in range(3):
        filled(pool, text(128, seed)).close()
    assert pool.cached == 6
    again = filled(pool, text(129, seed=0))  # two pages used once more, one new
    assert KVCache(pool, CONTEXT).adopt(text(128, seed=1)) == 64
    assert KVCache(pool, CONTEXT).adopt(text(128, seed=2)) == 128
    check_pool(pool, [again])


def test_live_caches_grow_beyond_the_plan_and_give_it_back() -> None:
    pool = pool_of(2)
    caches = [filled(pool, text(130, seed)) for seed in range(3)]
    assert (pool.pages, pool.referenced, pool.cached) == (9, 9, 0)
    check_pool(pool, caches)
    for cache in caches:
        cache.close()
    assert (pool.pages, pool.referenced, pool.cached) == (2, 0, 2)
    assert pool.touched_bytes == 9 * SHAPE.page_bytes


def test_no_more_than_the_most() -> None:
    pool = pool_of(2, most=3)
    cache, other = filled(pool, text(100)), KVCache(pool, CONTEXT)
    run(other, [1] * 64)
    with pytest.raises(MemoryBudgetError, match="close a session") as e:
        run(other, [2] * 10)
    assert e.value.needed == 4 * SHAPE.page_bytes and e.value.budget == 3 * SHAPE.page_bytes
    check_content(other)
    cache.close()
    run(other, [2] * 10)
    check_pool(pool, [other])


def test_no_more_than_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(1)
    monkeypatch.setattr(memory, "available", lambda: SHAPE.page_bytes - 1)
    cache = KVCache(pool, CONTEXT)
    with pytest.raises(MemoryBudgetError):
        run(cache, [1] * 65)
    assert (cache.length, pool.referenced) == (0, 0)


def test_planned_memory_that_cannot_be_is_refused() -> None:
    with pytest.raises(MemoryBudgetError):
        pool_of(1 << 50)


def test_pages_used_again_are_empty() -> None:
    pool = pool_of(1)
    run(cache := KVCache(pool, CONTEXT), [1] * 10)
    cache.close()
    cache = KVCache(pool, CONTEXT)
    cache.reserve(1)
    cache.append([5])
    with cache.page(0) as page:
        assert not any(page) and page.readonly


def test_a_cache_that_nobody_closed_gives_its_pages_back() -> None:
    pool = pool_of(4)
    cache = filled(pool, text(100))
    del cache
    gc.collect()
    assert (pool.referenced, pool.cached, pool.free) == (0, 1, 3)
    check_pool(pool, [])


def test_a_failed_run_leaves_the_length() -> None:
    pool = pool_of()
    cache = filled(pool, text(100))
    cache.reserve(200)
    assert cache.length == 100
    twin = cache.fork()
    check_pool(pool, [cache, twin])
    run(cache, [1] * 100)
    run(twin, [2] * 100)
    for each in (cache, twin):
        check_content(each)
    check_pool(pool, [cache, twin])


def test_closing_the_pool_while_caches_live() -> None:
    pool = pool_of(2)
    cache = filled(pool, text(300))
    page = cache.page(0)
    pool.close()
    assert len(bytes(page)) == SHAPE.page_bytes  # not unmapped under a view
    for call in (lambda: cache.reserve(350), lambda: cache.page(1)):
        with pytest.raises(InputError, match="closed"):
            call()
    assert KVCache(pool, CONTEXT).adopt(text(300)) == 0
    cache.close()
    pool.close()


def test_many_threads() -> None:
    pool, failed = pool_of(12), list[BaseException]()

    def work(seed: int) -> None:
        try:
            for step in range(30):
                cache = filled(pool, text(100 + 40 * (step % 5), seed=step % 3))
                twin = cache.fork()
                run(twin, [seed] * 30)
                check_content(cache)
                check_content(twin)
                if step % 2:
                    cache.close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    check_pool(pool, [])


# ---- disk ----


def test_evicted_pages_come_back_from_disk(tmp_path: Path) -> None:
    pool = pool_of(3, store=PageStore(tmp_path))
    filled(pool, text(192)).close()
    other = filled(pool, text(192, seed=1))
    assert pool.cached == 0
    other.close()
    cache = KVCache(pool, CONTEXT)
    assert cache.adopt(text(192)) == 192
    check_content(cache)
    check_pool(pool, [cache])


def test_kept_pages_are_there_after_a_restart(tmp_path: Path) -> None:
    pool = pool_of(store=PageStore(tmp_path), root=b"model")
    cache = filled(pool, text(200))
    assert cache.keep(150) == 128 and cache.keep(0) == 0
    pool.close()
    for root, n in ((b"model", 128), (b"another", 0)):
        again = KVCache(pool_of(store=PageStore(tmp_path), root=root), CONTEXT)
        assert again.adopt(text(200)) == n
        check_content(again)


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    pool = pool_of(store=PageStore(tmp_path))
    filled(pool, text(200)).keep(192)
    for path in tmp_path.glob("*.page"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    pool = pool_of(store=PageStore(tmp_path))
    cache = filled(pool, text(200))
    check_content(cache)
    check_pool(pool, [cache])


def test_a_disk_that_refuses_hurts_only_who_asks(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    pool = pool_of(2, store=PageStore(folder))
    shutil.rmtree(folder)
    folder.write_text("in the way")
    filled(pool, text(128)).close()
    cache = filled(pool, text(128, seed=1))  # spills
    check_content(cache)
    assert pool.store is not None and pool.store.error is not None
    with pytest.raises(InputError, match="cannot be kept"):
        cache.keep(128)
    check_content(cache)
    check_pool(pool, [cache])


def test_nothing_is_kept_without_a_store() -> None:
    with pytest.raises(InputError, match="prefix_cache"):
        filled(pool_of(), text(100)).keep(64)


# ---- save and restore ----


@pytest.mark.parametrize("when_full", ["stop", "slide"])
@pytest.mark.parametrize("n", [0, 1, 64, 100, 384, 385, 447, 448, 600])
def test_restored_caches_hold_the_same(when_full: str, n: int) -> None:
    def new(pool: PagePool) -> KVCache:
        return KVCache(pool, CONTEXT, when_full=when_full, n_positions=5000)  # type: ignore[arg-type]

    n = min(n, CONTEXT) if when_full == "stop" else n
    cache = new(pool_of())
    run_all(cache, text(n))
    pages = [bytes(cache.page(i)) if cache.has_page(i) else None for i in range(cache.n_pages)]
    pool = pool_of()
    twin = new(pool)
    twin.restore(text(n), pages)
    check_content(twin)
    run_all(twin, [1] * (min(70, twin.limit - n)))
    check_content(twin)
    check_pool(pool, [twin])


def test_pages_that_cannot_be_are_not_restored() -> None:
    pool, page = pool_of(), bytes(SHAPE.page_bytes)
    cache = KVCache(pool, CONTEXT)
    for tokens, pages in (([1], []), ([1], [page[1:]]), ([1], [None]), ([1] * 65, [page, None])):
        with pytest.raises(InputError):
            cache.restore(tokens, pages)
        check_pool(pool, [cache])
    with pytest.raises(ContextError):
        cache.restore([1] * 7 * PAGE, [page] * 7)
    run(cache, [1])
    with pytest.raises(InputError):
        cache.restore([1], [page])
    assert pool.referenced == 1


# ---- all of it, in any order ----


class Machine(RuleBasedStateMachine):
    """Caches that do anything; after each step all is where it should be."""

    layout = ONE
    pools = st.sampled_from([(0, None), (3, None), (5, None), (4, 8), (8, 8)])
    lengths = st.sampled_from(LENGTHS)
    values = st.integers(0, 1)
    which = st.integers(0, 100)

    @initialize(pool=pools, spills=st.booleans())
    def begin(self, pool: tuple[int, int | None], spills: bool) -> None:
        self.folder = tempfile.mkdtemp() if spills else None
        self.plan = pool
        self.start()

    def start(self) -> None:
        store = None
        if self.folder:
            store = PageStore(self.folder, limit=40 * (self.layout.page_bytes + 104))
        self.pool = pool_of(self.plan[0], layout=self.layout, most=self.plan[1], store=store)
        self.caches = [self.new("stop"), self.new("slide")]

    def new(self, when_full: str) -> KVCache:
        context = 4 * PAGE if when_full == "slide" else 5 * PAGE
        return KVCache(self.pool, context, when_full=when_full, n_positions=9 * PAGE)  # type: ignore[arg-type]

    def pick(self, i: int) -> KVCache:
        return self.caches[i % len(self.caches)]

    @rule(i=which, n=lengths, value=values, adopts=st.booleans(), fails=st.booleans())
    def read(self, i: int, n: int, value: int, adopts: bool, fails: bool) -> None:
        cache = self.pick(i)
        tokens = [*cache.tokens, *[value] * min(n, cache.limit - cache.length)]
        length = cache.adopt(tokens) if adopts else cache.length
        assert length == cache.length >= 0 and list(cache.tokens) == tokens[:length]
        try:
            if fails and length < len(tokens):
                cache.reserve(length + cache.room(len(tokens) - length))
            else:
                run_all(cache, tokens[length:])
                assert list(cache.tokens) == tokens
        except MemoryBudgetError:
            assert self.plan[1] is not None
        for table in cache._tables if length < len(tokens) else ():
            n_pages = sum(page is not None for page in table.pages)
            assert not cache.window_pages or n_pages <= 4
            assert n_pages <= table.group.most_pages(cache.limit, max(LENGTHS))

    @rule(i=which, share=st.floats(0, 1))
    def trim(self, i: int, share: float) -> None:
        cache = self.pick(i)
        before, n = list(cache.tokens), int(share * cache.length)
        holds = cache.holds(n)
        cache.trim(n)
        assert list(cache.tokens) == before[: cache.length] and cache.length <= n
        assert cache.length == n or (cache.length % PAGE == 0 and self.has_gaps(cache))
        if holds and self.folder is None:
            assert cache.length == n

    @staticmethod
    def has_gaps(cache: KVCache) -> bool:
        return bool(cache.window_pages or any(t.group.window for t in cache._tables))

    @rule(i=which)
    def fork(self, i: int) -> None:
        if len(self.caches) < 5:
            self.caches.append(self.pick(i).fork())

    @rule(i=which, politely=st.booleans())
    def end_and_begin(self, i: int, politely: bool) -> None:
        cache = self.caches.pop(i % len(self.caches))
        if politely:
            cache.close()
        self.caches.append(self.new(cache.when_full))

    @rule(i=which, all_of_them=st.booleans())
    def save_and_restore(self, i: int, all_of_them: bool) -> None:
        """all_of_them: pages that nobody sees, too, where they are there."""
        cache = self.caches.pop(i % len(self.caches))
        n, tokens, twin = cache.n_pages, cache.tokens, self.new(cache.when_full)
        gone = {number for gap in cache.unseen(cache.length) for number in gap}
        pages = [
            bytes(cache.page(j)) if cache.has_page(j) and (all_of_them or j not in gone) else None
            for j in range(n)
        ]
        cache.close()
        self.caches.append(twin)
        try:
            twin.restore(tokens, pages)
        except MemoryBudgetError:  # what was shared is not any more
            assert self.plan[1] is not None and twin.length == 0

    @rule(i=which)
    def keep(self, i: int) -> None:
        cache = self.pick(i)
        if self.folder:
            n_kept = cache.keep(cache.length)
            assert n_kept % PAGE == 0 and n_kept <= cache.length

    @rule(one_in=st.integers(0, 9))
    def restart(self, one_in: int) -> None:
        if one_in == 9:
            self.pool.close()
            self.start()

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "pool"):
            check_pool(self.pool, self.caches)
            for cache in self.caches:
                check_content(cache)

    def teardown(self) -> None:
        if getattr(self, "folder", None):
            shutil.rmtree(self.folder)


class WindowMachine(Machine):
    """Of one group with a window."""

    layout = WINDOW


class GroupMachine(Machine):
    """Of a group with a window and one without, in shapes that differ."""

    layout = TWO


class ManyGroupsMachine(Machine):
    """Of three."""

    layout = THREE


TestMachine = Machine.TestCase
TestWindowMachine = WindowMachine.TestCase
TestGroupMachine = GroupMachine.TestCase
TestManyGroupsMachine = ManyGroupsMachine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
for test in (TestWindowMachine, TestGroupMachine, TestManyGroupsMachine):
    test.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
