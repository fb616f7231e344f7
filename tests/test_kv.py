"""The KV cache: pages as needed, trimmed from the end, shared, and a window that slides; whatever
was done to them, the bits are those of a cache to which nothing was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine.describe import pack
from edge.engine.engine import Engine
from edge.errors import ContextError, InputError
from edge.kv.cache import KVCache
from edge.kv.shape import PAGE, kv_types
from edge.native import ffi, lib

pytestmark = pytest.mark.native

TOKENS = np.random.default_rng(0).integers(0, 288, 1000).tolist()
CONTEXT, POSITIONS = 4 * PAGE, 900
#: A model with more positions than that context, and heads that every type can keep.
LONG = {"arch": "phi3", "type": "Q8_0", "context": POSITIONS, "head_dim": 32}


@pytest.fixture(scope="module")
def engine(tiny_gguf: Callable[..., Path]) -> Iterator[Engine]:
    engine = Engine.load(tiny_gguf(type="Q8_0"), threads=2)
    yield engine
    engine.close()


def test_bytes_are_of_whole_pages(engine: Engine) -> None:
    c = engine.config
    heads = c.heads[0]
    per_token = 2 * c.n_layers * heads.n_kv_heads * heads.head_dim * 2  # keys, values, float16
    for tokens, pages in [(0, 0), (1, 1), (64, 1), (65, 2), (256, 4)]:
        assert engine.cache_bytes(tokens) == pages * 64 * per_token


def test_length_follows_the_tokens(engine: Engine) -> None:
    cache = engine.cache()
    assert cache.length == 0
    engine.run(cache, TOKENS[:3])
    engine.run(cache, TOKENS[3:4], logits="none")
    assert cache.length == 4
    cache.trim(2)
    assert cache.length == 2


@pytest.mark.parametrize("keep", [0, 1, 63, 64, 65, 127, 128, 150])
def test_trim_keeps_the_prefix(engine: Engine, keep: int) -> None:
    cache = engine.cache()
    engine.run(cache, TOKENS[:150], logits="none")
    cache.trim(keep)
    engine.run(cache, [9] * 40, logits="none")  # another turn, dropped again
    cache.trim(keep)
    got = engine.run(cache, TOKENS[keep:200], logits="all")
    want = engine.run(engine.cache(), TOKENS[:200], logits="all")
    np.testing.assert_array_equal(got, want[keep:])


@pytest.mark.parametrize("length", [-1, 4, 10**9])
def test_trim_to_more_than_there_is(engine: Engine, length: int) -> None:
    cache = engine.cache()
    engine.run(cache, [1, 2, 3])
    with pytest.raises(InputError, match="holds 3 tokens"):
        cache.trim(length)
    assert cache.length == 3


def test_caches_do_not_see_each_other(engine: Engine) -> None:
    prompts = [TOKENS[:70], TOKENS[70:110]]
    alone = [[engine.run(c, [t]) for t in p] for p in prompts for c in [engine.cache()]]
    caches, together = [engine.cache(), engine.cache()], [[], []]
    for i in range(70):
        for which, prompt in enumerate(prompts):
            if i < len(prompt):
                together[which].append(engine.run(caches[which], prompt[i : i + 1]))
    for want, got in zip(alone, together, strict=True):
        np.testing.assert_array_equal(np.concatenate(got), np.concatenate(want))


def test_context_is_the_limit(engine: Engine) -> None:
    cache = engine.cache()
    engine.run(cache, [1] * 250, logits="none")
    with pytest.raises(ContextError, match="257 tokens are 1 more than the context of 256") as e:
        engine.run(cache, [1] * 7)
    assert (e.value.needed, e.value.limit, cache.length) == (257, 256, 250)
    assert engine.run(cache, [1] * 6).shape == (1, engine.n_vocab)
    with pytest.raises(ContextError):
        engine.run(cache, [1])


def test_context_that_ends_within_a_page(tiny_gguf: Callable[..., Path]) -> None:
    engine = Engine.load(tiny_gguf(type="Q8_0"), context=70, threads=1)
    cache = engine.cache()
    engine.run(cache, TOKENS[:70], logits="none")
    with pytest.raises(ContextError):
        engine.run(cache, [1])
    engine.close()


def test_closed_cache_is_refused(engine: Engine) -> None:
    cache = engine.cache()
    engine.run(cache, [1])
    cache.close()
    cache.close()
    with pytest.raises(InputError, match="closed"):
        engine.run(cache, [2])


@pytest.mark.parametrize(
    "shape",
    [
        *((kind, 1, 1, 16) for kind in (-1, lib.EDGE_N_KV_TYPES)),
        *((0, layers, 1, 16) for layers in (0, -1, 4097)),
        *((0, 1, heads, 16) for heads in (0, -1, 4097)),
        *((0, 1, 1, dim) for dim in (0, -16, 8, 24, 528)),
    ],
)
def test_shapes_that_cannot_be_have_no_size(shape: tuple[int, int, int, int]) -> None:
    assert lib.edge_page_bytes(ffi.new("edge_kv_shape *", shape)) == -1
    assert lib.edge_page_bytes(ffi.NULL) == -1


# ---- the same bits, whatever was done to the pages ----


@pytest.fixture(scope="module", params=kv_types())
def long(tiny_gguf: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine whose model has more positions than its context."""
    path = tiny_gguf(**LONG)
    engine = Engine.load(path, context=CONTEXT, threads=2, sessions=2, kv=request.param)
    yield engine
    engine.close()


def read(engine: Engine, cache: KVCache, tokens: list[int], chunk: int = 256) -> np.ndarray:
    """Run tokens as a session does; the logits of all."""
    logits, done = [np.empty((0, engine.n_vocab), np.float32)], 0
    while done < len(tokens):
        part = tokens[done : done + cache.room(min(chunk, engine.chunk))]
        logits.append(engine.run(cache, part, logits="all"))
        done += len(part)
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def plain(long: Engine) -> np.ndarray:
    """Logits of a sliding session that runs on undisturbed; up to the context, of any."""
    with_none = Engine.load(long.gguf.path, context=CONTEXT, threads=1, kv=long.kv.type)
    out = read(with_none, with_none.cache("slide"), TOKENS[:POSITIONS])
    with_none.close()
    return out


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert want.std() > 0.01 and np.array_equal(got.view(np.uint32), want.view(np.uint32))


def test_a_window_is_as_all_until_the_context_is_full(long: Engine, plain: np.ndarray) -> None:
    same(read(long, long.cache(), TOKENS[:CONTEXT]), plain[:CONTEXT])


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_a_window_does_not_depend_on_chunks(long: Engine, plain: np.ndarray, chunk: int) -> None:
    n, cache = 450 if chunk == 1 else POSITIONS, long.cache("slide")
    same(read(long, cache, TOKENS[:n], chunk), plain[:n])
    cache.close()


def test_what_a_window_does_not_see_does_not_matter(long: Engine) -> None:
    """Page 8 sees pages 6 and 7, they see pages 4 and 5 one layer below: page 1 is out of sight."""
    other = [*TOKENS[:PAGE], *([9] * 64), *TOKENS[2 * PAGE : POSITIONS]]
    logits = []
    for tokens in (TOKENS[:POSITIONS], other):
        with long.cache("slide") as cache:
            logits.append(read(long, cache, tokens))
    assert not np.array_equal(logits[0][4 * PAGE], logits[1][4 * PAGE])
    got, want = (rows[8 * PAGE :] for rows in logits)
    if long.kv.type == "q4":  # rounds a page relative to the one before, and so on back
        assert np.abs(got - want).max() < 0.2 * np.abs(want).max()
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.99
    else:
        same(got, want)


def test_a_window_takes_the_memory_of_the_context(long: Engine) -> None:
    cache, most = long.cache("slide"), 0
    for start in range(0, POSITIONS, 30):
        read(long, cache, TOKENS[start : min(start + 30, POSITIONS)])
        most = max(most, sum(cache.has_page(i) for i in range(cache.n_pages)))
    assert most == CONTEXT // PAGE and long.pool.pages == long.pool.planned
    with pytest.raises(ContextError, match="901 tokens are 1 more"):
        long.run(cache, [1])
    cache.close()


@pytest.mark.parametrize("length", [300, 257, 511, 512, 513])
@pytest.mark.parametrize("back", [0, 1, 30, 64, 150, 256])
def test_a_window_that_was_trimmed(long: Engine, plain: np.ndarray, length: int, back: int) -> None:
    with long.cache("slide") as cache:
        read(long, cache, TOKENS[:length])
        cache.trim(length - back)
        n = cache.length  # what was given back may be found again where all caches have the same
        assert n == length - back or (n < length - back and n in range(PAGE, CONTEXT + 1, PAGE))
        done = cache.adopt(TOKENS[:length])
        same(read(long, cache, TOKENS[done : length + 70]), plain[done : length + 70])


def test_a_context_too_small_to_slide(tiny_gguf: Callable[..., Path]) -> None:
    engine = Engine.load(tiny_gguf(), context=255)
    with pytest.raises(InputError, match="255 tokens cannot slide"):
        engine.cache("slide")
    with pytest.raises(InputError, match="when_full 'roll': one of stop, slide"):
        engine.cache("roll")  # type: ignore[arg-type]
    engine.close()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 192, 199])
def test_adopted_pages(long: Engine, plain: np.ndarray, n: int) -> None:
    with long.cache() as first, long.cache() as second:
        read(long, first, TOKENS[:n])
        done = second.adopt(TOKENS[:199])
        assert done >= n // PAGE * PAGE
        same(read(long, second, TOKENS[done:200]), plain[done:200])


@pytest.mark.parametrize("n", [1, 64, 100, 128, 300, 450])
def test_forks_that_part(long: Engine, plain: np.ndarray, n: int) -> None:
    with long.cache("slide") as one:
        read(long, one, TOKENS[:n])
        with one.fork() as two:
            read(long, two, [5] * 40)
            same(read(long, one, TOKENS[n : n + 70]), plain[n : n + 70])
            two.trim(n)
            done = two.length
            same(read(long, two, TOKENS[done : n + 70]), plain[done : n + 70])


def test_evicted_and_computed_again(long: Engine, plain: np.ndarray) -> None:
    engine = Engine.load(long.gguf.path, context=CONTEXT, threads=2, kv=long.kv.type)
    for tokens in (TOKENS[:200], [7] * CONTEXT, TOKENS[:200]):
        with engine.cache() as cache:
            done = cache.adopt(tokens[:-1])
            assert done == 0
            got = read(engine, cache, tokens)
    same(got, plain[:200])
    engine.close()


def test_spilled_kept_and_brought_back(
    tiny_gguf: Callable[..., Path], plain: np.ndarray, long: Engine, tmp_path: Path
) -> None:
    path = tiny_gguf(**LONG)
    for turn in range(3):  # a process each
        engine = Engine.load(
            path, context=CONTEXT, threads=turn + 1, kv=long.kv.type, prefix_cache=tmp_path
        )
        with engine.cache() as cache:
            done = cache.adopt(TOKENS[:199])
            assert done == (0, 128, 192)[turn]
            same(read(engine, cache, TOKENS[done:200]), plain[done:200])
            if turn == 0:
                cache.keep(150)
        if turn == 1:  # what it had goes to disk
            with engine.cache() as cache:
                read(engine, cache, [7] * CONTEXT)
        engine.close()


@pytest.mark.parametrize("file", ["q4", "other seed"])
def test_pages_of_another_model_are_not_taken(
    tiny_gguf: Callable[..., Path], tmp_path: Path, file: str
) -> None:
    paths = [tiny_gguf(type="Q8_0"), tiny_gguf(type="Q4_0") if file == "q4" else tiny_gguf(seed=1)]
    for path in paths:
        engine = Engine.load(path, prefix_cache=tmp_path)
        cache = engine.cache()
        assert cache.adopt(TOKENS[:200]) == 0
        read(engine, cache, TOKENS[:200])
        cache.keep(200)
        engine.close()
    assert len(list(tmp_path.glob("*.page"))) == 6


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_is_done_the_bits_are_the_same(
    long: Engine, plain: np.ndarray, data: st.DataObject
) -> None:
    """Caches of the same text are read on, trimmed, forked, closed; beside them others run."""
    caches = [long.cache("slide"), long.cache("stop")]
    try:
        for _ in range(data.draw(st.integers(1, 8))):
            i = data.draw(st.integers(0, len(caches) - 1))
            cache = caches[i]
            match data.draw(st.sampled_from(["read", "read", "trim", "fork", "renew", "aside"])):
                case "read":
                    done = cache.adopt(TOKENS[: cache.limit])
                    end = min(done + data.draw(st.sampled_from([1, 60, 64, 200])), cache.limit)
                    end = min(end, POSITIONS)
                    if end > done:
                        same(read(long, cache, TOKENS[done:end]), plain[done:end])
                case "trim":
                    cache.trim(int(data.draw(st.floats(0, 1)) * cache.length))
                case "fork":
                    caches.append(cache.fork())
                case "renew":
                    cache.close()
                    caches[i] = long.cache("slide")
                case "aside":
                    with long.cache() as other:
                        read(long, other, [*TOKENS[:100], *[i] * 100])
    finally:
        for cache in caches:
            cache.close()
    assert long.pool.referenced == 0


# ---- fingerprints ----


def test_fingerprints_tell_models_apart_and_nothing_else(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    def of(path: Path, **options: object) -> bytes:
        engine = Engine.load(path, **options)  # type: ignore[arg-type]
        out = engine.fingerprint
        engine.close()
        with pytest.raises(InputError, match="closed"):
            _ = engine.pool
        return out

    wide = {"dim": 256, "ffn": 256, "type": "IQ2_XS"}
    path, packed = tiny_gguf(**wide), tmp_path / "packed.gguf"
    pack(path, packed)
    ours = of(path)
    assert of(packed) == of(path, layout="compact", context=100, threads=1) == ours
    phi = tiny_gguf("phi3", context=256, original_context=128)
    others = [tiny_gguf(**wide, seed=1), tiny_gguf(**wide, freq_base=5000.0), tiny_gguf(), phi]
    assert len({ours, *(of(other) for other in others), of(phi, context=128)}) == 6
    # what is on disks of prompts and sessions names it
    assert of(phi).hex() == "79c65d2a6b263c118f4f4d10e0b6ab443fb3ab81f827d27e2bc8da207f186e4a"


def test_fingerprints_tell_windows_apart(tiny_gguf: Callable[..., Path]) -> None:
    found = set[bytes]()
    for pattern in ((True, True), (True, False), (False, True)):
        extra = (("llama.attention.sliding_window_pattern", pattern),)
        engine = Engine.load(tiny_gguf(window=24, extra=extra))
        found.add(engine.fingerprint)
        engine.close()
    assert len(found) == 3


def test_positions_are_those_of_the_rotary_factors(tiny_gguf: Callable[..., Path]) -> None:
    path = tiny_gguf("phi3", context=1024, original_context=512)
    for context, positions in ((512, 512), (513, 1024)):
        engine = Engine.load(path, context=context)
        assert engine.cache("slide").limit == engine.config.n_positions == positions
        engine.close()
