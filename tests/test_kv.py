"""The KV cache: pages as needed, trimmed from the end, apart from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge.engine import Engine
from edge.errors import ContextError, InputError
from edge.native import ffi, lib

pytestmark = pytest.mark.native

TOKENS = np.random.default_rng(0).integers(0, 288, 200).tolist()


@pytest.fixture(scope="module")
def engine(tiny_gguf: Callable[..., Path]) -> Iterator[Engine]:
    engine = Engine.load(tiny_gguf(type="Q8_0"), threads=2)
    yield engine
    engine.close()


def test_bytes_are_of_whole_pages(engine: Engine) -> None:
    c = engine.config
    per_token = 2 * c.n_layers * c.n_kv_heads * c.head_dim * 2  # keys and values, float16
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
    want = engine.run(engine.cache(), TOKENS, logits="all")
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
        *((0, 1, 1, dim) for dim in (0, -16, 8, 24, 272)),
    ],
)
def test_shapes_that_cannot_be_have_no_size(shape: tuple[int, int, int, int]) -> None:
    assert lib.edge_page_bytes(ffi.new("edge_kv_shape *", shape)) == -1
    assert lib.edge_page_bytes(ffi.NULL) == -1
