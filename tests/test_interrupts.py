"""Ctrl-C between any two steps of what must not be left in the middle: files, pages, sessions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from interrupts import interrupted
from toy_kv import ONE, TWO, check_content, check_published, run_all

import edge
from edge.kv import cache as kv_cache
from edge.kv import page_memory
from edge.kv import pool as kv_pool
from edge.kv import table as kv_table
from edge.kv.cache import KVCache
from edge.kv.pool import PagePool
from edge.kv.shape import PAGE, KVLayout
from edge.session import contents as session_contents
from edge.session import file as session_file
from edge.session import journal
from edge.session.contents import Kind, Part
from edge.session.file import SessionFile

FILES = [session_file, session_contents, journal]
PAGES = [kv_cache, kv_table, kv_pool, page_memory]
OTHER = [9, 8, 7] * 50


def state(n: int) -> Part:
    return Part.json(Kind.STATE, {"n": n})


def page(i: int, fill: int) -> Part:
    return Part(Kind.PAGE, i, PAGE, bytes([fill]) * 80)


def said(file: SessionFile) -> Any:
    c = file.contents
    return c.tokens.tolist(), c.state, {i: bytes(file.pages(2)[i] or b"") for i in c.pages}


def test_an_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the file whole or not at all, and the file goes on."""
    monkeypatch.setattr(session_file, "_DATASYNC", lambda handle: None)
    monkeypatch.setattr(session_file.os, "fsync", lambda handle: None)
    path, seen = tmp_path / "s", set()
    start = [Part.json(Kind.META, {}), state(0), Part.tokens(0, range(130)), page(0, 1), page(1, 2)]
    for at in count(1, 3):
        file = SessionFile.create(path, start)
        parts = [state(1), Part.tokens(70, range(500, 570)), page(1, 3)]
        hit = interrupted(partial(file.append, parts), at, FILES)
        before = said(file)
        seen.add(before[1]["n"])
        file.append([Part.tokens(len(before[0]), [5]), page(0, 4)])
        after = said(file)
        assert after == ([*before[0], 5], before[1], {**before[2], 0: bytes([4]) * 80}), at
        file.close()
        again = SessionFile.open(path)
        assert said(again) == after, at
        again.close()
        if not hit:
            break
    assert at > 100 and seen == {0, 1}


def scenario(layout: KVLayout) -> tuple[PagePool, list[KVCache]]:
    """Two caches that share two pages, one that slides, and a pool that is nearly full."""
    pool = PagePool(layout, [14] * len(layout.groups), most_bytes=14 * layout.page_bytes)
    caches = [KVCache(pool, 512) for _ in range(2)]
    caches.append(KVCache(pool, 256, when_full="slide", n_positions=2000))
    run_all(caches[0], range(170))
    caches[1].adopt(range(140))
    run_all(caches[1], range(128, 150))
    run_all(caches[2], range(300, 600))
    return pool, caches


STEPS: dict[str, Callable[[list[KVCache]], object]] = {
    "run": lambda caches: run_all(caches[0], OTHER[:60]),
    "run on a shared page": lambda caches: (caches[1].trim(100), run_all(caches[1], OTHER[:70])),
    "slide": lambda caches: run_all(caches[2], OTHER),
    "trim": lambda caches: (caches[0].trim(130), caches[2].trim(290)),
    "adopt": lambda caches: (caches[1].trim(70), caches[1].adopt([*range(170)])),
    "fork": lambda caches: caches[0].fork().close(),
    "close": lambda caches: (caches[0].close(), caches[1].close()),
}


@pytest.mark.parametrize("layout", [ONE, TWO], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", STEPS)
def test_pages(name: str, layout: KVLayout) -> None:
    """No cache holds what is not its own, whatever comes after; one page at most is lost."""
    for at in count(1, 11):
        pool, caches = scenario(layout)
        if not interrupted(partial(STEPS[name], caches), at, PAGES):
            break
        for cache in caches:
            if cache._handle is None:
                continue
            check_content(cache)
            cache.trim(max(0, cache.length - 5))
        for more in ([3, 4, 5], OTHER[:20], [6] * 3):
            for cache in caches:
                if cache._handle is not None:
                    run_all(cache, more)
                    check_content(cache)
        check_published(pool)
        for cache in caches:
            cache.close()
        assert pool.referenced <= 1
        with KVCache(pool, 1024) as large:
            run_all(large, range(1000, 1000 + PAGE * (14 - pool.referenced)))
            check_content(large)
    assert at > 50


def test_a_session_and_its_file(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on as if nothing had been, in the file too."""
    monkeypatch.setattr(session_file, "_DATASYNC", lambda handle: None)
    monkeypatch.setattr(session_file.os, "fsync", lambda handle: None)
    path = tmp_path / "s"
    with edge.load(tiny_gguf(context=512), threads=1) as model:
        bias = dict.fromkeys(model.tokenizer.eos_ids, float("-inf"))
        sampling = edge.SamplingOptions(seed=11, logit_bias=bias)
        whole = model.session(sampling=sampling)
        whole.generate([1, 2, 3], max_tokens=240)
        with model.session(sampling=sampling) as session:
            session.autosave(path, 2)
            session.generate([1, 2, 3], max_tokens=50)
            for at in count(1, 97):
                call = partial(session.generate, "", max_tokens=4)
                hit = interrupted(call, at, [*FILES, *PAGES])
                n = len(session.tokens)
                assert session.tokens == whole.tokens[:n], at
                session.generate("", max_tokens=1)
                again = edge.resume(path, model)
                assert isinstance(again, edge.Session) and again.tokens == session.tokens, at
                assert again.transcript.cache.length >= len(again.tokens) - PAGE - 1
                again.close()
                if not hit or n > 220:
                    break
            assert at > 1000
        again = edge.resume(path, model)
        assert isinstance(again, edge.Session)
        again.generate("", max_tokens=10)
        assert again.tokens == whole.tokens[: len(again.tokens)]
