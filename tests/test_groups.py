"""Models whose layers do not all see the same positions: the bits are those of a cache that gives
nothing back, and the memory is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge
from edge.engine.engine import DescribedFile, Engine
from edge.engine.plan import CHUNK
from edge.errors import MemoryBudgetError
from edge.kv.cache import KVCache
from edge.kv.shape import PAGE, KVLayout, KVShape, LayerGroup, kv_types, pages_of
from edge.loading import NativeOptions

pytestmark = pytest.mark.native

CONTEXT, WINDOW = 1000, 100
TOKENS = np.random.default_rng(0).integers(0, 288, CONTEXT).tolist()
MIXED: dict[str, Any] = {
    "arch": "llama",
    "n_layers": 3,
    "window": WINDOW,
    "extra": (("llama.attention.sliding_window_pattern", (True, False, True)),),
}
ALL: dict[str, Any] = {"arch": "phi3", "window": WINDOW}
MODELS = {"mixed": MIXED, "all": ALL}
SHAPE: dict[str, Any] = {"type": "Q8_0", "context": CONTEXT, "head_dim": 32}

Tiny = Callable[..., Path]


@pytest.fixture(scope="module", params=[f"{model}, {kv}" for model in MODELS for kv in kv_types()])
def engine(tiny_gguf: Tiny, request: pytest.FixtureRequest) -> Iterator[Engine]:
    model, kv = request.param.split(", ")
    path = tiny_gguf(**MODELS[model], **SHAPE)
    engine = Engine.load(path, context=CONTEXT, threads=2, sessions=2, kv=kv)
    yield engine
    engine.close()


def read(engine: Engine, cache: KVCache, tokens: list[int], chunk: int = CHUNK) -> np.ndarray:
    """Run tokens as a session does; the logits of all."""
    logits, done = [np.empty((0, engine.n_vocab), np.float32)], 0
    while done < len(tokens):
        part = tokens[done : done + cache.room(chunk)]
        logits.append(engine.run(cache, part, logits="all"))
        done += len(part)
    return np.concatenate(logits)


def in_one_group(layout: KVLayout) -> KVLayout:
    """All layers together, which then give nothing back."""
    layers = sum(len(group.layers) for group in layout.groups)
    shape = dataclasses.replace(layout.groups[0].shape, n_layers=layers)
    return KVLayout((LayerGroup(tuple(range(layers)), 0, shape),))


@pytest.fixture(scope="module")
def plain(engine: Engine) -> np.ndarray:
    """Logits of a cache that keeps everything."""
    with pytest.MonkeyPatch.context() as patch:
        of = KVLayout.of
        patch.setattr(KVLayout, "of", lambda *args, **more: in_one_group(of(*args, **more)))
        whole = Engine.load(engine.path, context=CONTEXT, threads=1, kv=engine.kv.type)
    with whole.cache() as cache:
        out = read(whole, cache, TOKENS)
        assert all(cache.has_page(i) for i in range(pages_of(CONTEXT)))
    whole.close()
    return out


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert want.std() > 0.01 and np.array_equal(got.view(np.uint32), want.view(np.uint32))


# ---- which groups there are ----


def test_groups_are_layers_that_see_the_same(tiny_gguf: Tiny) -> None:
    def groups(**options: Any) -> list[tuple[tuple[int, ...], int]]:
        loaded = Engine.load(tiny_gguf(**options), context=256, threads=1)
        try:
            places = loaded.kv.places
            assert sorted(places) == list(range(loaded.config.n_layers))
            return [(group.layers, group.window) for group in loaded.kv.groups]
        finally:
            loaded.close()

    assert groups(**MIXED, **SHAPE) == [((0, 2), WINDOW), ((1,), 0)]
    assert groups(**ALL, **SHAPE) == [((0, 1), WINDOW)]
    assert groups() == [((0, 1), 0)]
    narrow = {**SHAPE, "context": 512}
    assert groups(**MIXED | {"window": 511}, **narrow) == [((0, 2), 511), ((1,), 0)]
    assert groups(**MIXED | {"window": 512}, **narrow) == [((0, 1, 2), 0)]  # it hides nothing


def test_what_one_group_is_in_files_stays(tiny_gguf: Tiny) -> None:
    for options in ({}, ALL | SHAPE):
        loaded = Engine.load(tiny_gguf(**options), threads=1)
        c = loaded.config
        heads = c.heads[0]
        shape = {
            "n_layers": c.n_layers,
            "n_kv_heads": heads.n_kv_heads,
            "head_dim": heads.head_dim,
        }
        assert loaded.facts()["kv"] == {"type": "f16", **shape}
        loaded.close()


@pytest.mark.parametrize("window", [1, 2, 64, 65, 66, 100, 128, 500])
def test_a_group_needs_what_its_tokens_see(window: int) -> None:
    group = LayerGroup((0,), window, KVShape("f16", 1, 1, 16))
    for chunk in (1, 7, 64, CHUNK):
        most = 0
        for position in range(700):
            seen = max(0, position - window + 1) // PAGE
            first = group.first_page(position)
            assert first == min(seen, max(0, position // PAGE - 1))
            most = max(most, pages_of(position + chunk) - first)
        assert group.most_pages(10_000, chunk) == most
    assert group.most_pages(PAGE, CHUNK) == 1


# ---- the same bits ----


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 256])
def test_bits_do_not_depend_on_chunks(engine: Engine, plain: np.ndarray, chunk: int) -> None:
    n = 300 if chunk == 1 else CONTEXT
    with engine.cache() as cache:
        same(read(engine, cache, TOKENS[:n], chunk), plain[:n])


@pytest.mark.parametrize("length", [300, 320, 383, 384, 385])
@pytest.mark.parametrize("back", [0, 1, 30, 64, 150, 300])
def test_trimmed(engine: Engine, plain: np.ndarray, length: int, back: int) -> None:
    with engine.cache() as cache:
        read(engine, cache, TOKENS[:length], 50)
        cache.trim(length - back)
        assert cache.length == length - back  # what was given back is still in the pool
        start, end = length - back, length + 70
        same(read(engine, cache, TOKENS[start:end]), plain[start:end])


def test_trimmed_to_what_is_gone(engine: Engine, plain: np.ndarray) -> None:
    """Other sessions have taken the memory: the text is run again, from where it must be."""
    with engine.cache() as cache:
        read(engine, cache, TOKENS[:700])
        others = [engine.cache() for _ in range(3)]
        for i, other in enumerate(others):
            read(engine, other, [i + 1] * CONTEXT)
        assert cache.holds(690) and not cache.holds(300)
        cache.trim(690)
        assert cache.length == 690
        cache.trim(300)
        assert cache.length == 0
        for other in others:
            other.close()
        done = cache.adopt(TOKENS[:699])
        same(read(engine, cache, TOKENS[done:720]), plain[done:720])


@pytest.mark.parametrize("n", [64, 100, 320, 700])
def test_forks_that_part(engine: Engine, plain: np.ndarray, n: int) -> None:
    with engine.cache() as one:
        read(engine, one, TOKENS[:n])
        with one.fork() as two:
            read(engine, two, [5] * 40)
            same(read(engine, one, TOKENS[n : n + 70]), plain[n : n + 70])
            two.trim(n)
            same(read(engine, two, TOKENS[n : n + 70]), plain[n : n + 70])


@pytest.mark.parametrize("n", [64, 100, 320, 700])
def test_shared(engine: Engine, plain: np.ndarray, n: int) -> None:
    with engine.cache() as first, engine.cache() as second:
        read(engine, first, TOKENS[:n])
        read(engine, second, TOKENS[:30])
        done = second.adopt(TOKENS[: n + 20])  # that of other tests may go on longer
        assert done >= n // PAGE * PAGE
        same(read(engine, second, TOKENS[done : n + 70]), plain[done : n + 70])


@pytest.mark.parametrize("n", [1, 64, 300, 320, 700])
def test_restored(engine: Engine, plain: np.ndarray, n: int) -> None:
    with engine.cache() as cache, engine.cache() as twin:
        read(engine, cache, TOKENS[:n])
        gone = {number for gap in cache.unseen(n) for number in gap}
        pages = [None if i in gone else bytes(cache.page(i)) for i in range(cache.n_pages)]
        assert bool(gone) == (n > 2 * PAGE + WINDOW)
        twin.restore(TOKENS[:n], pages)
        same(read(engine, twin, TOKENS[n : n + 70]), plain[n : n + 70])


def test_spilled_kept_and_brought_back(engine: Engine, plain: np.ndarray, tmp_path: Path) -> None:
    options: Any = {"context": CONTEXT, "kv": engine.kv.type, "prefix_cache": tmp_path}
    for turn, wanted in enumerate((0, 640, 704)):  # a process each
        again = Engine.load(engine.path, threads=turn + 1, **options)
        with again.cache() as cache:
            done = cache.adopt(TOKENS[:750])
            assert done == wanted
            same(read(again, cache, TOKENS[done:760]), plain[done:760])
            if turn == 0:
                assert cache.keep(650) == 640
        if turn == 1:  # what it had goes to disk
            with again.cache() as cache:
                read(again, cache, [7] * CONTEXT)
        again.close()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_is_done_the_bits_are_the_same(
    engine: Engine, plain: np.ndarray, data: st.DataObject
) -> None:
    """Caches of the same text are read on, trimmed, forked, saved; beside them others run."""
    caches = [engine.cache(), engine.cache()]
    try:
        for _ in range(data.draw(st.integers(1, 8))):
            i = data.draw(st.integers(0, len(caches) - 1))
            cache = caches[i]
            what = ["read", "read", "trim", "fork", "renew", "aside", "save"]
            match data.draw(st.sampled_from(what)):
                case "read":
                    done = cache.adopt(TOKENS) if data.draw(st.booleans()) else cache.length
                    more = data.draw(st.sampled_from([1, 60, 64, 200, 400]))
                    end = min(done + more, CONTEXT)
                    same_or_none(read(engine, cache, TOKENS[done:end]), plain[done:end])
                case "trim":
                    cache.trim(int(data.draw(st.floats(0, 1)) * cache.length))
                case "fork":
                    caches.append(cache.fork())
                case "renew":
                    cache.close()
                    caches[i] = engine.cache()
                case "aside":
                    with engine.cache() as other:
                        read(engine, other, [*TOKENS[:100], *[i] * 300])
                case "save":
                    pages = [
                        bytes(cache.page(j)) if cache.has_page(j) else None
                        for j in range(cache.n_pages)
                    ]
                    caches.append(engine.cache())
                    caches[-1].restore(cache.tokens, pages)
    finally:
        for cache in caches:
            cache.close()
    assert engine.pool.referenced == 0


def same_or_none(got: np.ndarray, want: np.ndarray) -> None:
    if len(want):
        same(got, want)


def test_sliding_with_windows(engine: Engine) -> None:
    """Sinks and the window of the context for all layers, and a layer's own where it has one."""
    small = Engine.load(engine.path, context=4 * PAGE, threads=1, kv=engine.kv.type)
    with small.cache("slide") as one, small.cache("slide") as two:
        want = read(small, one, TOKENS[:900])
        same(np.concatenate([read(small, two, [t]) for t in TOKENS[:900]]), want)
        held = [[i for i, page in enumerate(t.pages) if page] for t in one._tables]
        for pages, group in zip(held, small.kv.groups, strict=True):
            assert pages[0] == (0 if not group.window else pages[-1] - len(pages) + 1)
    small.close()


# ---- memory ----


def test_a_window_takes_a_bounded_number_of_pages(engine: Engine) -> None:
    planned = engine.ledger.planned_pages
    for chunk in (1, 60, CHUNK):
        with engine.cache() as cache:
            for start in range(0, CONTEXT, chunk):
                engine.run(cache, TOKENS[start : start + chunk], logits="none")
                for table in cache._tables:
                    n = sum(page is not None for page in table.pages)
                    window = table.group.window
                    most = pages_of(max(window, PAGE + 1) + chunk - 2) + 1
                    assert n == pages_of(cache.length) if not window else n <= most
                    assert 2 * n <= planned[table.index]
    assert engine.pool.pages == engine.pool.planned == sum(planned)


def test_the_ledger_counts_groups(tiny_gguf: Tiny) -> None:
    path = tiny_gguf(**MIXED, **SHAPE | {"context": 8192})

    def bytes_of(context: int, **options: Any) -> int:
        loaded = Engine.load(path, context=context, threads=1, **options)
        parts = loaded.ledger.parts["keys and values"]
        assert (
            sum(
                n * group.shape.page_bytes
                for n, group in zip(loaded.ledger.planned_pages, loaded.kv.groups, strict=True)
            )
            == parts
        )
        loaded.close()
        return parts

    page = 2 * 2 * PAGE * 32 * 2  # of a layer: keys and values, 2 heads of 32, float16
    most = pages_of(WINDOW - 1 + CHUNK - 1) + 1
    assert bytes_of(128) == 3 * page * 2
    assert bytes_of(8192) == page * (8192 // PAGE) + 2 * page * most
    assert bytes_of(4096, sessions=3) == 3 * (page * (4096 // PAGE) + 2 * page * most)


def test_a_stated_budget_is_for_all_groups_together(tiny_gguf: Tiny) -> None:
    path = tiny_gguf(**MIXED, **SHAPE)
    with DescribedFile.open(path, NativeOptions(context=256)) as described:
        budget = described.ledger.needed + (1 << 20)  # the process may grow in between
    loaded = Engine.load(path, context=256, threads=1, memory=budget)
    caches = [loaded.cache() for _ in range(30)]
    with pytest.raises(MemoryBudgetError):
        for i, cache in enumerate(caches):
            read(loaded, cache, [i] * 256)
    most, planned = loaded.ledger.most_kv_bytes, loaded.ledger.parts["keys and values"]
    assert most == planned + budget - loaded.ledger.needed
    assert planned <= loaded.pool.touched_bytes <= most
    loaded.close()


# ---- sessions ----


@pytest.fixture(params=list(MODELS))
def model(tiny_gguf: Tiny, request: pytest.FixtureRequest) -> Iterator[edge.Model]:
    path = tiny_gguf(**MODELS[request.param], **SHAPE)
    with edge.load(path, threads=1, context=CONTEXT) as loaded:
        yield loaded


def options(model: edge.Model) -> Any:
    """Nothing ends the text."""
    bias = dict.fromkeys(model.tokenizer.eos_ids, float("-inf"))
    return {"sampling": edge.SamplingOptions(seed=11, logit_bias=bias)}


def test_saved_and_resumed(model: edge.Model, tmp_path: Path) -> None:
    whole = model.session(**options(model))
    whole.generate([1, 2, 3], max_tokens=600)
    want = whole.tokens
    with model.session(**options(model)) as session:
        session.autosave(tmp_path / "auto", 16)
        session.generate([1, 2, 3], max_tokens=500)
        session.save(tmp_path / "s")
        n_pages = sum(
            session.transcript.cache.has_page(i) for i in range(session.transcript.cache.n_pages)
        )
        n_groups = session.transcript.cache.n_groups
    whole.close()
    assert n_pages <= 8 * (n_groups - 1) + 4
    for name in ("s", "auto"):
        again = edge.resume(tmp_path / name, model)
        assert isinstance(again, edge.Session)
        assert again.tokens == want[:503] and again.transcript.cache.length == 502
        again.generate("", max_tokens=100)
        assert again.tokens == want
        again.close()


def test_a_file_with_pages_that_nobody_sees(
    model: edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the versions before wrote them for models with one group."""
    monkeypatch.setattr(LayerGroup, "first_page", lambda group, position: 0)
    with model.session(**options(model)) as session:
        session.generate([1, 2, 3], max_tokens=500)
        session.save(tmp_path / "s")
        assert all(
            session.transcript.cache.has_page(i) for i in range(session.transcript.cache.n_pages)
        )
        session.generate("", max_tokens=20)
        want = session.tokens
    monkeypatch.undo()
    again = edge.resume(tmp_path / "s", model)
    assert isinstance(again, edge.Session) and again.transcript.cache.length == 502
    again.generate("", max_tokens=20)
    assert again.tokens == want
    again.close()


def test_a_turn_does_not_begin_from_nothing(model: edge.Model) -> None:
    """A prompt that parts from the session a little before its end, as a template's next does."""
    with model.session(**options(model)) as session:
        session.generate(TOKENS[:600], max_tokens=150)
        done = session.generate([*session.tokens[:700], 1, 2, 3], max_tokens=20, reuse=True)
        assert done.usage.cached_tokens == 700
        again = session.tokens
    with model.session(**options(model)) as other:
        other.generate(again[:703], max_tokens=20)
        assert other.tokens == again


def test_facts_tell_of_groups(model: edge.Model) -> None:
    facts = model.engine.facts()["kv"]
    if model.engine.config.architecture == "phi3":
        assert "groups" not in facts
    else:
        assert [group["layers"] for group in facts["groups"]] == [[0, 2], [1]]
