"""The numerics contract: the same bits of logits on every instruction set, any number of threads,
any chunking, after a trim, beside other sessions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arches import CASES
from native_plan import COMPACT_TYPES, ISAS, TYPES
from test_refmath import SIZES

from edge.engine import describe
from edge.engine.engine import Engine
from edge.kv.shape import kv_types

pytestmark = pytest.mark.all_isas

N_TOKENS = 150
FEW_BITS = {"token_embd.weight": "Q2_0", "output.weight": "NVFP4"}
MIXED = {
    "floats and codes": lambda name: ("Q8_0", "F32")[len(name) % 2],
    "mixed": lambda name: ("Q4_0", "F32", "Q8_0", "F16", "Q4_1")[len(name) % 5],
    "K and IQ": lambda name: ("Q4_K", "IQ3_S", "Q6_K", "IQ2_XS", "Q5_0", "BF16")[len(name) % 6],
    "few bits": lambda name: FEW_BITS.get(name, "Q1_0"),
}
#: Widths for types whose blocks are larger than 32.
WIDE = {"dim": 256, "ffn": 256}
#: (threads, chunk) such that every number of threads and every chunk is there.
RUNS = [(1, 256), (2, 64), (3, 7), (4, 64), (2, 1)]
#: Scalar is some 40 times slower than the others, and has run once already, to compare with.
RUNS_OF = dict.fromkeys(ISAS, RUNS[1:3]) | {"scalar": RUNS[2:3]} | {ISAS[-1]: RUNS}


class Loader:
    """Engines of one model on the instruction set and threads of choice."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.path, self.monkeypatch, self.options = path, monkeypatch, options
        self.engines: dict[tuple[str, int], Engine] = {}

    def __call__(self, isa: str = ISAS[-1], threads: int = 1) -> Engine:
        """The engine, loaded once."""
        if (isa, threads) not in self.engines:
            self.monkeypatch.setenv("EDGE_ISA", isa)
            engine = Engine.load(self.path, threads=threads, **self.options)
            assert (engine.isa, engine.threads) == (isa, threads)
            self.engines[isa, threads] = engine
        return self.engines[isa, threads]

    def close(self) -> None:
        """All of them."""
        for engine in self.engines.values():
            engine.close()


@pytest.fixture
def loader(tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """loader(arch, **options) -> Loader."""
    made: list[Loader] = []

    def load(arch: str, context: int = N_TOKENS, kv: str = "f16", **options: Any) -> Loader:
        path = tiny_gguf(arch, context=max(256, context), **options)
        made.append(Loader(path, monkeypatch, context=context, kv=kv))
        return made[-1]

    yield load
    for each in made:
        each.close()


def tokens_of(engine: Engine, n: int) -> list[int]:
    """The same n random tokens each time."""
    return np.random.default_rng(n).integers(0, engine.n_vocab, n).tolist()


def run(engine: Engine, tokens: list[int], chunk: int, cache: Any = None) -> np.ndarray:
    """Logits of all tokens, `chunk` in one call."""
    cache = cache or engine.cache()
    chunk = min(chunk, engine.chunk)
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return np.concatenate([engine.run(cache, part, logits="all") for part in parts])


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: object) -> None:
    """Bit for bit, and no trivial result."""
    assert np.isfinite(want).all() and want.std() > 0.01
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), what


@pytest.mark.native
@pytest.mark.parametrize("type_name", [*TYPES, *MIXED])
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_same_bits_everywhere(loader: Any, arch: str, type_name: str) -> None:
    options = {"n_rot": 12, "window": 50} if arch == "phi3" else {"tied": False}
    if type_name in ("K and IQ", "few bits") or SIZES.get(type_name, SIZES["Q4_0"]).block > 32:
        options |= WIDE
    load = loader(arch, type=MIXED.get(type_name, type_name), **options)
    want = run(load("scalar"), tokens_of(load("scalar"), N_TOKENS), 256)
    for isa in ISAS:
        for threads, chunk in RUNS_OF[isa]:
            engine = load(isa, threads)
            n = N_TOKENS if chunk > 1 else 70
            got = run(engine, tokens_of(engine, N_TOKENS)[:n], chunk)
            assert_same_bits(got, want[:n], (isa, threads, chunk))


@pytest.mark.native
@pytest.mark.parametrize("kv", kv_types())
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_same_bits_of_keys_and_values(loader: Any, arch: str, kv: str) -> None:
    load = loader(arch, kv=kv, type="Q4_0", head_dim=32)
    tokens = tokens_of(load("scalar"), N_TOKENS)
    want = run(load("scalar"), tokens, 256)
    for isa in ISAS:
        for threads, chunk in RUNS[1:]:
            n = N_TOKENS if chunk > 1 else 70
            assert_same_bits(run(load(isa, threads), tokens[:n], chunk), want[:n], (isa, threads))


@pytest.mark.native
@pytest.mark.parametrize("type_name", COMPACT_TYPES)
def test_same_bits_of_both_forms(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, type_name: str
) -> None:
    path = tiny_gguf(type=type_name, **WIDE)
    fast, compact = (Loader(path, monkeypatch, layout=layout) for layout in ("fast", "compact"))
    tokens = tokens_of(fast(), 40)
    for isa in ISAS:
        assert_same_bits(run(compact(isa), tokens, 40), run(fast(isa), tokens, 40), isa)
    fast.close()
    compact.close()


@pytest.mark.native
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_same_bits_of_long_prompts(loader: Any, arch: str) -> None:
    """512 tokens: two of the engine's chunks, eight pages."""
    load = loader(arch, type="Q4_0", context=512)
    tokens = tokens_of(load(), 512)
    want = run(load(), tokens, 512)
    for isa, threads, chunk in [
        (ISAS[0], 2, 512),
        (ISAS[-1], 2, 100),
        (ISAS[len(ISAS) // 2], 1, 64),
    ]:
        assert_same_bits(run(load(isa, threads), tokens, chunk), want, (isa, threads, chunk))


@pytest.mark.native
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_same_bits_in_calls_of_512(loader: Any, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's chunk is a choice of its own, not of the numbers."""
    load = loader(arch, type="Q8_0", context=512)
    tokens = tokens_of(load(), 512)
    want = run(load(), tokens, 512)
    monkeypatch.setattr(describe, "CHUNK", 512)
    for isa, threads in [(ISAS[0], 2), (ISAS[-1], 3)]:
        engine = load(isa, threads)
        assert_same_bits(engine.run(engine.cache(), tokens, logits="all"), want, (isa, threads))


@pytest.mark.native
@pytest.mark.parametrize("name", CASES)
def test_same_bits_of_every_architecture(loader: Any, name: str) -> None:
    """Alternate types, so that ops read what matmuls of both kinds make."""
    options = vars(CASES[name].model) | {"type": MIXED["floats and codes"]}
    load = loader(**options)
    want = run(load("scalar"), tokens_of(load("scalar"), 70), 70)
    for isa in ISAS[1:]:
        for threads, chunk in ((1, 1), (2, 9), (3, 70)):
            got = run(load(isa, threads), tokens_of(load(isa, threads), 70), chunk)
            assert_same_bits(got, want, (isa, threads, chunk))


@pytest.mark.native
def test_uneven_chunks(loader: Any) -> None:
    load = loader("llama", type="Q4_1")
    tokens = tokens_of(load(), N_TOKENS)
    want = run(load(), tokens, 256)
    rng = np.random.default_rng(0)
    for isa in ISAS:
        cache, engine, got = load(isa).cache(), load(isa), []
        while cache.length < N_TOKENS:
            n = int(rng.integers(1, min(20, N_TOKENS - cache.length) + 1))
            got.append(engine.run(cache, tokens[cache.length : cache.length + n], logits="all"))
        assert_same_bits(np.concatenate(got), want, isa)


@pytest.mark.native
@pytest.mark.parametrize("type_name", ["Q4_0", "F16"])
def test_last_logits_are_those_of_all(loader: Any, type_name: str) -> None:
    engine = loader("llama", type=type_name)()
    tokens = tokens_of(engine, 40)
    want = engine.run(engine.cache(), tokens, logits="all")
    assert_same_bits(engine.run(engine.cache(), tokens), want[-1:], "last")
    assert engine.run(engine.cache(), tokens, logits="none") is None


@pytest.mark.native
@pytest.mark.parametrize("type_name", ["Q4_0", "F32"])
def test_trimmed_and_run_again(loader: Any, type_name: str) -> None:
    engine = loader("phi3", type=type_name)(threads=2)
    tokens = tokens_of(engine, 100)
    cache = engine.cache()
    want = run(engine, tokens, 100, cache)
    for keep in (99, 64, 30, 0):
        cache.trim(keep)
        assert_same_bits(run(engine, tokens[keep:], 7, cache), want[keep:], keep)


@pytest.mark.native
def test_sessions_side_by_side(loader: Any) -> None:
    engine = loader("llama", type="Q4_0")(threads=2)
    prompts = [tokens_of(engine, 90), tokens_of(engine, 91)]
    alone = [run(engine, prompt, 256) for prompt in prompts]
    caches, got = [engine.cache(), engine.cache()], [[], []]
    for start in range(0, 91, 13):
        for i, prompt in enumerate(prompts):
            part = prompt[start : start + 13 - i]
            part = prompt[caches[i].length : caches[i].length + 13]
            if part:
                got[i].append(engine.run(caches[i], part, logits="all"))
    for i in range(2):
        assert_same_bits(np.concatenate(got[i]), alone[i], i)


@pytest.mark.native
def test_loaded_again(loader: Any) -> None:
    first, second = loader("llama", type="IQ4_NL")(), loader("llama", type="IQ4_NL")()
    tokens = tokens_of(first, 30)
    assert_same_bits(run(second, tokens, 256), run(first, tokens, 256), "second")


@pytest.mark.model
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_on_the_default_model(
    smollm2: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the best instruction set on one thread, in one call."""
    load = Loader(smollm2, monkeypatch, context=512)
    tokens = tokens_of(load(), 300)[: 24 if isa == "scalar" else 300]
    want = run(load(), tokens, 256)
    for threads, chunk in [(2, 7), (4, 64)] if isa != "scalar" else [(2, 11)]:
        assert_same_bits(run(load(isa, threads), tokens, chunk), want, (isa, threads, chunk))
    load.close()
