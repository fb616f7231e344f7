"""Engines open in two steps: what is described, and what is left of it when it is not started."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.device import memory
from edge.engine import describe, plan
from edge.engine.engine import DescribedFile, Engine
from edge.errors import InputError, MemoryBudgetError, UnsupportedError
from edge.loading import Loading, NativeOptions, OnnxOptions
from edge.native import ffi, lib
from edge.weights import packed

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

Tiny = Callable[..., Path]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is asked of Linux")


def is_mapped(path: Path) -> bool:
    """Whether this process has a file in its memory."""
    gc.collect()
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.fixture
def model(tiny_gguf: Tiny, tmp_path: Path) -> Path:
    """A file that nothing else has open."""
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_gguf(type="Q4_0").read_bytes())
    return path


@pytest.fixture(params=["raw", "packed"])
def either(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    """The same, and packed."""
    if request.param == "raw":
        return model
    describe.pack(model, tmp_path / "packed.gguf")
    return tmp_path / "packed.gguf"


def test_what_is_described_is_what_runs(either: Path) -> None:
    with DescribedFile.open(either, NativeOptions(context=100, threads=1)) as described:
        ledger, description = described.ledger, described.description
        assert described.path == str(either) and described.new_tokenizer().n_vocab == 288
        assert "<|im_start|>" in described.new_template().source
        engine = described.start()
    assert engine.ledger == ledger and engine.packed_bytes == ledger.weights
    assert engine.arena_bytes == description.lowered.arena_bytes == ledger.buffers
    assert engine.run(engine.cache(), [1, 2]) is not None  # the file is its own now
    engine.close()


def test_it_starts_once(model: Path) -> None:
    with DescribedFile.open(model) as described:
        engine = described.start()
        with pytest.raises(InputError, match="was started"):
            described.start()
    engine.close()


@on_linux
def test_one_that_is_not_started_leaves_no_file_open(either: Path) -> None:
    with DescribedFile.open(either) as described:
        assert is_mapped(either)
    assert not is_mapped(either)
    described.close()
    forgotten = DescribedFile.open(either)
    assert is_mapped(either)
    del described, forgotten
    assert not is_mapped(either)


@on_linux
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_one_that_fails_to_start_leaves_no_file_open(
    either: Path, error: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(error), DescribedFile.open(either) as described:
        described.start(stop)
    del described
    assert not is_mapped(either)


def test_too_much_is_described_and_not_started(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    with DescribedFile.open(model) as described:
        assert not described.ledger.fits
        with pytest.raises(MemoryBudgetError, match=r"the budget is|there is"):
            described.start()


@pytest.mark.parametrize("layout", ["fast", "compact"])
def test_a_model_is_lowered_once(
    tiny_gguf: Tiny, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    lower, calls = plan.lower, []

    def counted(*args: Any, **options: Any) -> plan.Lowered:
        calls.append(args)
        return lower(*args, **options)

    monkeypatch.setattr(plan, "lower", counted)
    path = tiny_gguf(type="IQ3_S", dim=256, n_heads=4, ffn=256)
    with DescribedFile.open(path, NativeOptions(layout=layout)) as described:
        assert described.description.weights.model.is_compact == (layout == "compact")
    assert len(calls) == 1


@pytest.mark.parametrize("kind", packed.supported_types())
def test_both_forms_take_the_same_activations(kind: str) -> None:
    """So that one plan is for both."""
    takes = set()
    for form in packed.FORMS:
        weight = ffi.new("edge_weight *")
        packed.describe_weight(kind, (32, 256), form, weight)
        takes.add(lib.edge_layout_takes_q8(weight.layout))
    assert len(takes) == 1


def test_a_short_way(model: Path) -> None:
    engine = Engine.load(model, threads=1, context=64)
    assert (engine.threads, engine.config.n_context) == (1, 64)
    engine.close()


# ---- options of one engine -----------------------------------------------------------------------

COMMON: dict[str, Any] = {"context": 64, "threads": 2, "memory": "1GiB", "sessions": 3}


def test_each_engine_takes_its_own() -> None:
    loading = Loading.of({**COMMON, "layout": "fast", "kv": "q8"})
    assert loading.for_native("m.gguf") == NativeOptions(**COMMON, layout="fast", kv="q8")
    loading = Loading.of({**COMMON, "ep": "auto", "fallback": True})
    assert loading.for_onnx() == OnnxOptions(**COMMON, ep="auto", fallback=True)


@pytest.mark.parametrize(
    "option",
    [{"ep": "cpu"}, {"fallback": True}, {"soc": "x"}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_graphs_alone(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(option))} is an option of ONNX models, m"):
        Loading.of(option).for_native("m.gguf")
    assert Loading.of(option).for_onnx() == OnnxOptions(**option)


@pytest.mark.parametrize(
    "option",
    [{"layout": "fast"}, {"kv": "q8"}, {"prefix_cache": "x"}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_files_alone(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(option))} is an option of GGUF models: "):
        Loading.of(option).for_onnx()
    assert Loading.of(option).for_native("m") == NativeOptions(**option)


def test_a_wrong_isa_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_ISA", "i9")
    with pytest.raises(UnsupportedError, match="EDGE_ISA=i9"):
        DescribedFile.open(tmp_path / "missing.gguf")
