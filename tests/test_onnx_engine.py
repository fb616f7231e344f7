"""Runs of graphs of every layout against the numpy referee, and against each other."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import refgraph
from children import held, in_child
from onnxfolders import write_cpu, write_static
from optimum import edit, to_external, write_optimum

import edge
from edge import models
from edge.device import memory
from edge.errors import (
    CancelledError,
    ContextError,
    InputError,
    MemoryBudgetError,
    ModelFileError,
    UnsupportedError,
)
from edge.files.gguf import GGUF
from edge.kv.shape import PAGE
from edge.native.cancel import Cancel
from edge.onnx.run.engine import OnnxEngine

Tiny = Callable[..., Path]
Array = np.ndarray[Any, np.dtype[Any]]

CONTEXT = 128
TOKENS = np.random.default_rng(3).integers(0, 280, CONTEXT).tolist()

#: How a folder of each layout is made, and how far its logits may be from the referee's.
LAYOUTS: dict[str, tuple[Callable[..., Path], dict[str, Any], float]] = {
    "optimum": (write_optimum, {}, 2e-5),
    "optimum-fp16": (write_optimum, {"half": True}, 8e-3),
    "optimum-bare": (write_optimum, {"positions": False}, 2e-5),
    "optimum-rows": (write_optimum, {"rows": True}, 2e-5),
    "optimum-merged": (write_optimum, {"merged": True}, 2e-5),
    "genai": (write_cpu, {}, 2e-5),
    "genai-apart": (write_cpu, {"shared": False}, 2e-5),
    "static": (write_static, {}, 2e-5),
    "static-fp16": (write_static, {"weights": "float16"}, 1.6e-2),
}


@pytest.fixture(scope="module")
def folder_of(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """folder_of(layout, arch="llama", **model) -> a folder. Do not change it."""
    root, made = tmp_path_factory.mktemp("layouts"), dict[str, Path]()

    def make(layout: str, arch: str = "llama", **model: Any) -> Path:
        write, options, _ = LAYOUTS[layout]
        key = f"{layout}-{arch}-{sorted(model.items())}"
        if key not in made:
            made[key] = write(tiny_gguf(arch, **model), root / str(len(made)), **options)
        return made[key]

    return make


@pytest.fixture
def engine_of(folder_of: Callable[..., Path]) -> Any:
    """engine_of(layout, **options): a loaded engine, closed at the end."""
    made: list[OnnxEngine] = []

    def make(layout: str, **options: Any) -> OnnxEngine:
        made.append(OnnxEngine.load(folder_of(layout), **{"threads": 1, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def referee(path: Path, tokens: list[int]) -> Array:
    """Logits (tokens, vocab) in float32."""
    with GGUF.open(path) as model:
        shapes = {t.name: t.shape for t in model.tensors.values()}
        graph, _ = models.build(model.metadata, shapes, context=None, path=str(path))
        return refgraph.run(graph, refgraph.load_weights(model), tokens)


def feed(engine: OnnxEngine, cache: Any, tokens: list[int], **options: Any) -> Array | None:
    """Run tokens in chunks; what the last one gives."""
    for i in range(0, len(tokens), engine.chunk):
        out = engine.run(cache, tokens[i : i + engine.chunk], **options)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("arch", "model"), [("llama", {}), ("phi3", {"window": 24}), ("llama", {"n_rot": 8})]
)
def test_logits_are_the_referees(
    layout: str, arch: str, model: dict[str, Any], tiny_gguf: Tiny, folder_of: Callable[..., Path]
) -> None:
    """However the tokens are divided into runs."""
    want = referee(tiny_gguf(arch, **model), TOKENS)
    engine = OnnxEngine.load(folder_of(layout, arch, **model), threads=1, context=CONTEXT)
    for sizes in ([100, 1, 1], [1, 33, 64], [8, 7, 9, 2, 30]):
        cache, at = engine.cache(), 0
        for n in sizes:
            got = feed(engine, cache, TOKENS[at : at + n])
            at += n
            assert got is not None and got.shape == (1, 288) and got.dtype == np.float32
            assert abs(got[0] - want[at - 1]).max() < LAYOUTS[layout][2]
    engine.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_all_tokens(layout: str, tiny_gguf: Tiny, engine_of: Any) -> None:
    engine = engine_of(layout)
    cache, n = engine.cache(), min(engine.chunk, 20)
    want = referee(tiny_gguf(), TOKENS)
    for first in (0, n):
        got = engine.run(cache, TOKENS[first : first + n], logits="all")
        assert got.shape == (n, 288)
        assert abs(got - want[first : first + n]).max() < LAYOUTS[layout][2]
    assert engine.run(cache, TOKENS[:3], logits="none") is None
    assert cache.length == 2 * n + 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trim_and_fork(layout: str, engine_of: Any) -> None:
    """What follows a cut, and both sides of a fork, are as if nothing else had been."""
    engine = engine_of(layout, context=CONTEXT)
    cache, clean = engine.cache(), engine.cache()
    feed(engine, cache, TOKENS[:90])
    twin = cache.fork()
    cache.trim(72)
    feed(engine, twin, TOKENS[::-1][:20])
    feed(engine, clean, TOKENS[:72])
    same = feed(engine, cache, TOKENS[72:80]), feed(engine, clean, TOKENS[72:80])
    assert np.array_equal(*same)
    twin.trim(90)
    cache.trim(80)
    feed(engine, cache, TOKENS[80:90])
    again = feed(engine, twin, TOKENS[90:95]), feed(engine, cache, TOKENS[90:95])
    assert abs(again[0] - again[1]).max() < 1e-4 + LAYOUTS[layout][2]
    assert list(twin.tokens) == list(cache.tokens) == TOKENS[:95]
    with pytest.raises(InputError, match="holds 95 tokens, cannot keep 96"):
        cache.trim(96)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, PAGE, PAGE + 9])
def test_pages_hold_all(layout: str, n: int, engine_of: Any) -> None:
    engine = engine_of(layout, context=CONTEXT)
    cache, other = engine.cache(), engine.cache()
    feed(engine, cache, TOKENS[:n])
    pages = [bytes(cache.page(i)) for i in range(cache.n_pages)]
    assert {len(page) for page in pages} == {cache.page_bytes}
    other.restore(TOKENS[:n], pages)
    assert [bytes(other.page(i)) for i in range(other.n_pages)] == pages
    both = engine.run(cache, TOKENS[n : n + 1]), engine.run(other, TOKENS[n : n + 1])
    assert np.array_equal(*both)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupt_at_any_place(layout: str, engine_of: Any) -> None:
    """Ctrl-C raises between any two lines: what was in the cache is in it still."""
    files = "runners.py", "kv.py"  # not where a lock is let go: a signal does not come there
    engine = engine_of(layout, context=CONTEXT)
    cache, clean = engine.cache(), engine.cache()
    for each in (cache, clean):
        feed(engine, each, TOKENS[:29])
        feed(engine, each, TOKENS[29:30])
    want = engine.run(clean, TOKENS[30:31])
    for at in range(0, 120, 3):
        left = iter(range(at))

        def trace(frame: Any, event: str, arg: Any, left: Any = left) -> Any:
            if Path(frame.f_code.co_filename).name in files and next(left, None) is None:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        with contextlib.suppress(KeyboardInterrupt):
            engine.run(cache, TOKENS[30:31])
        sys.settrace(None)
        cache.trim(min(cache.length, 30))
        assert np.array_equal(engine.run(cache, TOKENS[30:31]), want)
        cache.trim(29)
        feed(engine, cache, TOKENS[29:30])


def test_pages_that_do_not_fit(engine_of: Any) -> None:
    engine = engine_of("genai", context=CONTEXT)
    cache = engine.cache()
    page = bytes(cache.page_bytes)
    for tokens, pages in (([1], []), ([1], [None]), ([1], [page[1:]]), ([1] * 65, [page])):
        with pytest.raises(InputError):
            cache.restore(tokens, pages)
    with pytest.raises(ContextError):
        cache.restore([1] * 129, [page] * 3)
    assert cache.length == 0 and not cache.has_page(0)
    cache.restore([1], [page])
    with pytest.raises(InputError, match="do not fill the cache"):
        cache.restore([1], [page])
    with pytest.raises(InputError, match="no page 1"):
        cache.page(1)


def test_what_caches_do_not_do(engine_of: Any) -> None:
    engine = engine_of("static")
    cache = engine.cache()
    assert not engine.keeps_prompts and cache.adopt([1, 2]) == 0
    assert [list(gap) for gap in cache.unseen(100)] == [[]] and cache.room(50) == 50
    assert cache.holds(0)
    with pytest.raises(InputError, match="keeps no prompts"):
        cache.keep(0)
    with pytest.raises(UnsupportedError, match="cannot slide"):
        engine.cache("slide")
    with pytest.raises(InputError, match="when_full 'roll'"):
        engine.cache("roll")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cancel_leaves_the_cache_as_it_was(layout: str, engine_of: Any) -> None:
    """Between two runs, too: the second of several that one call takes."""
    engine, cancel = engine_of(layout), Cancel()
    cache, clean = engine.cache(), engine.cache()
    for c in (cache, clean):
        feed(engine, c, TOKENS[:10])
    run = engine._runner.run
    engine._runner.run = lambda *args: (run(*args), cancel.set())[0]
    many = {"logits": "all"} if "fp16" not in layout else {}
    if next(iter(engine._runner.pieces(10, 8, many.get("logits", "last")))) == 8:
        cancel.set()
    with pytest.raises(CancelledError):
        engine.run(cache, TOKENS[20:28], cancel=cancel, **many)
    engine._runner.run = run
    assert list(cache.tokens) == TOKENS[:10]
    same = engine.run(cache, TOKENS[10:11]), engine.run(clean, TOKENS[10:11])
    assert np.array_equal(*same)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_context(layout: str, engine_of: Any) -> None:
    engine = engine_of(layout, context=20)
    cache = engine.cache()
    feed(engine, cache, TOKENS[:20])
    for _ in range(2):
        with pytest.raises(ContextError, match="1 more than the context of 20"):
            engine.run(cache, [1])
    assert engine.config.n_context == cache.limit == 20 and cache.length == 20


def test_tokens_that_cannot_be(engine_of: Any) -> None:
    engine = engine_of("genai")
    cache = engine.cache()
    for tokens in ([], [0] * 257):
        with pytest.raises(InputError, match="in one run: from 1 to 256"):
            engine.run(cache, tokens)
    for token in (-1, 288):
        with pytest.raises(InputError, match="0 to 287"):
            engine.run(cache, [5, token])
    assert cache.length == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_once_closed(layout: str, engine_of: Any) -> None:
    engine = engine_of(layout)
    cache, shut = engine.cache(), engine.cache()
    shut.close()
    with pytest.raises(InputError, match="the session was closed"):
        engine.run(shut, [1])
    engine.close()
    engine.close()
    for call in (lambda: engine.run(cache, [1]), engine.cache, engine.facts, engine.explain):
        with pytest.raises(InputError, match="the model was closed"):
            call()


def test_not_behind_a_fork_of_the_process(engine_of: Any) -> None:
    engine = engine_of("genai")
    with held(engine._lock):  # as while another thread computes
        said = in_child(engine.cache, lambda: engine.run(engine.cache(), [1]), engine.close)
    before = "InputError: the model was loaded before a fork: load it in the child"
    assert said == [before, before, "None"]
    assert engine.run(engine.cache(), [1]) is not None


def test_many_threads(engine_of: Any) -> None:
    """They take turns: each gets what it would alone."""
    engine = engine_of("static")
    want = [feed(engine, engine.cache(), TOKENS[i : i + 30]) for i in range(4)]
    got: list[Any] = [None] * 4

    def work(i: int) -> None:
        cache = engine.cache()
        for token in TOKENS[i : i + 30]:
            got[i] = engine.run(cache, [token])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, alone in zip(got, want, strict=True):
        assert abs(mine - alone).max() < 2e-5


@pytest.mark.parametrize("layout", ["optimum", "genai", "static"])
def test_no_copy_of_the_cache_for_a_token(layout: str, engine_of: Any) -> None:
    """All arrays that a run reads and writes stay where they are."""
    engine = engine_of(layout)
    cache = engine.cache()

    def places() -> set[int]:
        arrays = getattr(cache, "arrays", None) or [*cache._held[0], *cache._held[1]]
        return {array.ctypes.data for array in arrays}

    feed(engine, cache, TOKENS[:20])
    before, bindings = places(), dict(cache.bindings)
    feed(engine, cache, TOKENS[:9])
    assert places() == before
    assert all(cache.bindings[name] is io for name, io in bindings.items())


def test_weights_in_another_file(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((folder_of("optimum") / "onnx" / "model.onnx").read_bytes())
    engine = OnnxEngine.load(to_external(path), threads=1)
    whole = OnnxEngine.load(folder_of("optimum"), threads=1)
    assert np.array_equal(*(e.run(e.cache(), TOKENS[:5]) for e in (engine, whole)))
    before = engine.fingerprint
    with (tmp_path / "model.onnx_data").open("r+b") as data:
        data.seek(100)
        data.write(b"\x01\x02\x03\x04")
    assert OnnxEngine.load(path, threads=1).fingerprint != before != whole.fingerprint


@pytest.mark.parametrize("layout", ["optimum", "genai"])
def test_damaged_weights(
    layout: str, folder_of: Callable[..., Path], tmp_path: Path, tiny_gguf: Tiny
) -> None:
    folder = LAYOUTS[layout][0](tiny_gguf(), tmp_path / "model")
    graph = next(folder.rglob("model.onnx"))

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == 1 and list(tensor.dims) == [64]:
                array = np.full(64, np.nan, np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    edit(graph, change)
    engine = OnnxEngine.load(folder, threads=1)
    cache = engine.cache()
    with pytest.raises(ModelFileError, match="NaN or infinite: the weights are damaged"):
        engine.run(cache, [1, 2])
    assert cache.length == 0


def test_a_graph_that_lies_about_its_shapes(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """onnxruntime refuses to write beyond what was bound: one error, nothing is lost."""
    path = tmp_path / "model.onnx"
    path.write_bytes((folder_of("optimum") / "onnx" / "model.onnx").read_bytes())

    def change(model: Any) -> None:
        for node in model.graph.node:
            if node.op_type == "Concat" and node.output[0].startswith("Concat"):
                node.input.append(node.input[0])

    engine = OnnxEngine.load(edit(path, change), threads=1)
    cache = engine.cache()
    with pytest.raises(ModelFileError, match="onnxruntime cannot run it"):
        feed(engine, cache, TOKENS[:3])
    assert cache.length == 0


def test_what_it_says_of_itself(engine_of: Any, folder_of: Callable[..., Path]) -> None:
    engine = engine_of("genai", context=CONTEXT)
    facts, info = engine.facts(), engine.info()
    assert engine.isa == "onnxruntime cpu" and engine.threads == 1 and engine.refused is None
    assert facts["context"] == CONTEXT and facts["kv"]["type"] == "float32"
    assert len(engine.fingerprint) == 32 and facts["fingerprint"] == engine.fingerprint.hex()
    assert info["provider"] == "cpu" and info["context_trained"] == 256
    assert info["cache_bytes"] == CONTEXT * 2 * 2 * 2 * 16 * 4
    assert info["file_bytes"] > 100_000 and engine.path == str(folder_of("genai"))
    assert any("cpu" in line for line in engine.explain())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"context": 0}, InputError, "context is 0, it must be a whole number from 1"),
        ({"context": "9"}, InputError, "context is '9', it must be a whole number"),
        ({"context": 257}, ContextError, "the model was made for 256"),
        ({"layout": "compact"}, InputError, "layout is an option of GGUF models"),
        ({"kv": "q8"}, InputError, "kv is an option of GGUF models"),
        ({"prefix_cache": "x"}, InputError, "save the session instead"),
        ({"ep": "tpu"}, InputError, "ep 'tpu': one of auto, cpu"),
        ({"memory": 1 << 20}, MemoryBudgetError, r"weights .*the budget is 1.0 MiB|needs"),
        ({"speed": 1}, InputError, "no option 'speed'"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], kind: type, message: str, folder_of: Callable[..., Path]
) -> None:
    with pytest.raises(kind, match=message):
        edge.load(folder_of("optimum"), **options)


def test_a_static_context_is_what_was_exported(folder_of: Callable[..., Path]) -> None:
    with edge.load(folder_of("static")) as model:
        assert model.engine.config.n_context == 128
    with pytest.raises(ContextError, match="made for 128: export it anew with --context 200"):
        edge.load(folder_of("static"), context=200)


@pytest.mark.parametrize("option", [{"ep": "qnn"}, {"fallback": True}, {"soc": "sm8650"}])
def test_a_gguf_runs_on_no_provider(option: dict[str, Any], tiny_gguf: Tiny) -> None:
    with pytest.raises(InputError, match=r"edge-run export .*--dialect npu"):
        edge.load(tiny_gguf(), **option)


def test_the_budget_names_its_parts(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OnnxEngine.load(folder_of("optimum"), threads=1)
    parts = engine.ledger.parts
    assert sum(parts.values()) == engine.ledger.needed
    assert parts["keys and values"] == 2 * 256 * engine._runner.layout.position_bytes
    assert parts["weights"] == engine.folder.weight_bytes
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    monkeypatch.setattr(memory, "resident", lambda: 40 << 20)
    with pytest.raises(MemoryBudgetError, match=r"needs .*there is 41.0 MiB: weights"):
        OnnxEngine.load(folder_of("optimum"), threads=1)


def test_without_onnxruntime(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match='pip install "onnx>='):
        edge.load(folder_of("optimum"))


def _child(folder: Path, answers: Any) -> None:
    engine = OnnxEngine.load(folder, threads=1)
    answers.put(engine.fingerprint.hex())


def test_the_fingerprint_is_the_same_in_another_process(engine_of: Any) -> None:
    engine, context = engine_of("genai"), multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    child = context.Process(target=_child, args=(engine.folder.path, answers))
    child.start()
    child.join(60)
    assert answers.get() == engine.fingerprint.hex()
