"""The engine: each op's values against the referee's, and every way in which a run is refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import refgraph
from fake_model import run
from native_plan import floats

from edge import native
from edge.device import memory
from edge.engine import plan
from edge.engine.engine import Engine
from edge.engine.ops import LOGITS
from edge.errors import (
    ContextError,
    InputError,
    MemoryBudgetError,
    ModelFileError,
    UnsupportedError,
)
from edge.native import ffi, lib

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def engine(tiny_gguf: Callable[..., Path]) -> Iterator[Engine]:
    engine = Engine.load(tiny_gguf(type="Q4_0"), threads=2)
    yield engine
    engine.close()


# ---- bisection: the first i ops, and what the last of them made ----------------------------------


def native_value(engine: Engine, tokens: list[int], n_ops: int, buffer: int) -> np.ndarray:
    """A float buffer after the first n_ops ops."""
    cache = engine.cache()
    cache.reserve(len(tokens))
    logits = np.empty((2, engine.n_vocab), np.float32)
    ids, error = ffi.new("int32_t[]", tokens), ffi.new("edge_error *")
    step = ffi.new("edge_step *", {"n_tokens": len(tokens), "n_logits": 2, "n_ops": n_ops})
    step.tokens, step.logits = ids, floats(logits)
    native.check(lib.edge_run(engine._plan, engine._threads, cache.handle, step, error), error)
    b = engine.lowered.buffers[buffer]
    if b.kind == LOGITS:
        return logits
    out = np.empty((2 if b.logit_rows else len(tokens), b.dim), np.float32)
    native.check(lib.edge_plan_read(engine._plan, buffer, len(out), floats(out)))
    return out


def referee_values(engine: Engine, tokens: list[int]) -> dict[str, np.ndarray]:
    """Every value of the graph, by numpy."""
    held = refgraph.load_weights(engine.gguf)
    # float64, so that it is the same with every BLAS
    weights = {name: np.float64(held[name]) for name in engine.graph.weights}
    state = refgraph.Run(np.asarray(tokens), weights, {}, np.float16)
    values: dict[str, np.ndarray] = {}
    for op in engine.graph.ops:
        values[op.output] = refgraph.evaluate(state, op, [values[name] for name in op.inputs])
    return values


@pytest.mark.parametrize("change", ["nothing", "layers"])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_every_op_gives_the_referees_value(
    tiny_gguf: Callable[..., Path], arch: str, change: str
) -> None:
    """change: layers: the second has no window, and scores have a scale of their own."""
    keys = (("sliding_window_pattern", (True, False)), ("scale", 0.4)) if change == "layers" else ()
    extra = tuple((f"{arch}.attention.{key}", value) for key, value in keys)
    engine = Engine.load(tiny_gguf(arch, n_rot=8, window=9, extra=extra), threads=1)
    assert [op.window for op in engine.graph.attentions] == [9, 0 if extra else 9]
    tokens = np.random.default_rng(0).integers(0, 288, 20).tolist()
    values = referee_values(engine, tokens)
    lowering = plan._Lowering(engine.graph, lambda name: False)
    lowering.run()
    made: dict[int, list[str]] = {}  # buffer -> its values, each made in the place of the last
    for (value, _, _), buffer in lowering.buffer_of.items():
        made.setdefault(buffer, []).append(value)
    compared = 0
    for i, op in enumerate(engine.lowered.ops):
        if op.kind == "angles":
            continue
        name = made[op.output][-1 if op.kind == "store" else 0]
        want = values[name]
        got = native_value(engine, tokens, i + 1, op.output)
        # a key or a value may round to the other float16 next to it
        atol = 5e-4 if i >= 4 else 2e-5
        what = f"op {i}, {op.kind}: {name}"
        np.testing.assert_allclose(got, want[-len(got) :], atol=atol, err_msg=what)
        compared += 1
    assert compared == len(engine.lowered.ops) - 1
    engine.close()


FEW_BITS = {"Q1_0": "c1h128", "Q2_0": "c2h64", "Q2_0_128": "c2h128", "NVFP4": "c4u16"}


@pytest.mark.parametrize(
    ("embedding", "head", "layers"),
    [("Q2_0", "NVFP4", "Q1_0"), ("NVFP4", "Q1_0", "Q2_0"), ("Q2_0_128", "Q1_0", "NVFP4")],
)
def test_types_of_few_bits_in_a_mix(
    tiny_gguf: Callable[..., Path], embedding: str, head: str, layers: str
) -> None:
    """The referee's logits, with weights that take no more memory than in the file."""
    of = {"token_embd.weight": embedding, "output.weight": head}
    path = tiny_gguf(type=lambda name: of.get(name, layers), tied=False, dim=256, ffn=512)
    engine = Engine.load(path, threads=1)
    for name, layout in engine.layouts.items():
        tensor = engine.gguf.tensors[name]
        if layout != "vector":
            assert (tensor.type, layout) == (of.get(name, layers), FEW_BITS[tensor.type])
            assert engine.weight_bytes(name) == tensor.n_bytes
    tokens = np.random.default_rng(0).integers(0, 288, 20).tolist()
    matrices = [name for name in engine.graph.weights if ".attn_" in name or ".ffn_" in name]
    want = refgraph.run(
        engine.graph,
        refgraph.load_weights(engine.gguf),
        tokens,
        dtype=np.float64,
        quantised=matrices,
        cache=np.float16,
    )
    got = engine.run(engine.cache(), tokens, logits="all")
    np.testing.assert_allclose(got, want, atol=1e-2)  # where an int8 is rounded the other way
    assert want.std() > 0.5
    engine.close()


# ---- what an engine says of itself ---------------------------------------------------------------


def test_describes_itself(engine: Engine) -> None:
    assert (engine.threads, engine.isa) == (2, native.text(lib.edge_isa_name(native.isa_index())))
    assert engine.n_vocab == 288 and engine.config.n_context == 256
    assert engine.layouts["blk.0.attn_q.weight"] == "c4h32"
    assert engine.layouts["blk.0.attn_norm.weight"] == "vector"
    assert engine.layouts.keys() == engine.gguf.tensors.keys()
    assert 0 < engine.packed_bytes < 10**6 and 0 < engine.arena_bytes < 10**7


def test_progress_rises_to_all(tiny_gguf: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    engine = Engine.load(tiny_gguf(), threads=1, progress=lambda *now: seen.append(now))
    assert len(seen) == len(engine.gguf.tensors)
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {engine.packed_bytes}
    assert 0.9 < seen[-1][0] / engine.packed_bytes <= 1
    engine.close()


def test_progress_may_stop_a_load(tiny_gguf: Callable[..., Path]) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine.load(tiny_gguf(), progress=stop)


# ---- refused runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 288, 2**31 - 1, -(2**31), 2**31, 2**70])
def test_token_outside_the_vocabulary(engine: Engine, token: int) -> None:
    cache = engine.cache()
    with pytest.raises(InputError, match=str(token)):
        engine.run(cache, [1, 2, token])
    assert cache.length == 0


@pytest.mark.parametrize("n", [0, 257])
def test_number_of_tokens_out_of_range(engine: Engine, n: int) -> None:
    with pytest.raises(InputError, match=f"{n} tokens in one run: from 1 to 256"):
        engine.run(engine.cache(), [1] * n)


def test_more_tokens_than_the_context(engine: Engine) -> None:
    cache = engine.cache()
    engine.run(cache, [1] * 200, logits="none")
    with pytest.raises(ContextError):
        engine.run(cache, [1] * 57)
    assert cache.length == 200


def test_closed_engine(tiny_gguf: Callable[..., Path]) -> None:
    engine = Engine.load(tiny_gguf(), threads=1)
    cache = engine.cache()
    engine.close()
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.run(cache, [1])


def test_cache_of_another_engine(engine: Engine, tiny_gguf: Callable[..., Path]) -> None:
    other = Engine.load(tiny_gguf(n_layers=1), threads=1)
    with pytest.raises(Exception, match="another model"):
        engine.run(other.cache(), [1])
    other.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_engine_of_the_parent_process(engine: Engine) -> None:
    """A forked child has the engine but not its threads: an error, and no hang at its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine.run(engine.cache(), [1])
        except InputError as error:
            code = 0 if "fork" in str(error) else 2
        finally:
            engine.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert engine.run(engine.cache(), [1]) is not None


def damaged(source: Path, path: Path, name: str, value: float) -> Path:
    """A copy of a model with every number of a float tensor set to value."""
    path.write_bytes(source.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    (tensor,) = (t for t in reader.tensors if t.name == name)
    tensor.data[:] = value
    reader.data.flush()
    return path


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.ffn_down.weight"])
def test_weights_that_overflow(tiny_gguf: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = damaged(tiny_gguf(), tmp_path / "m.gguf", name, 3e38)
    engine = Engine.load(path, threads=1)
    cache = engine.cache()
    with pytest.raises(ModelFileError, match="logits came out NaN or infinite"):
        for _ in range(3):
            engine.run(cache, [1, 2, 3])
    assert engine.run(cache, [4], logits="none") is None
    engine.close()


def scaled(source: Path, path: Path, name: str, factor: float) -> Path:
    """A copy of a model with a float tensor multiplied by factor."""
    path.write_bytes(source.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    (tensor,) = (t for t in reader.tensors if t.name == name)
    tensor.data[:] *= factor
    reader.data.flush()
    return path


@pytest.mark.parametrize("which", ["k", "v"])
def test_keys_and_values_beyond_f16(
    tiny_gguf: Callable[..., Path], tmp_path: Path, which: str
) -> None:
    """The weights are right: another type holds them, in a session of several pages too."""
    name = f"blk.1.attn_{which}.weight"
    path = scaled(tiny_gguf(head_dim=32), tmp_path / "m.gguf", name, 1e6)
    tokens = [i % 200 for i in range(70)]
    engine = Engine.load(path, threads=1)
    cache = engine.cache()
    with pytest.raises(UnsupportedError, match=r"layer 1 are beyond 65504.*--kv q8") as caught:
        engine.run(cache, tokens[:3], logits="none")
        engine.run(cache, tokens)
    assert caught.value.what == "kv f16" and cache.length in (0, 3)
    engine.close()
    engine = Engine.load(path, threads=1, kv="q8")
    assert np.isfinite(engine.run(engine.cache(), tokens)).all()
    engine.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.ffn_down.weight"])
def test_weights_that_are_not_finite(
    tiny_gguf: Callable[..., Path], tmp_path: Path, name: str, value: float
) -> None:
    path = damaged(tiny_gguf(), tmp_path / "m.gguf", name, value)
    with pytest.raises(ModelFileError, match="row 0, column 0 is NaN or infinite") as caught:
        Engine.load(path)
    assert caught.value.field == f"tensor {name}" and caught.value.offset


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30])
def test_rotary_factors_out_of_range(
    tiny_gguf: Callable[..., Path], tmp_path: Path, value: float
) -> None:
    source = tiny_gguf(rope_freqs=True)
    path = damaged(source, tmp_path / "m.gguf", "rope_freqs.weight", value)
    with pytest.raises(ModelFileError, match="rope_freqs"):
        Engine.load(path)


def test_head_size_that_the_kernels_do_not_know(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match="heads of 24: multiples of 16 up to 512"):
        Engine.load(tiny_gguf(dim=96, n_heads=4, n_kv_heads=2))


def test_type_without_a_layout(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    content, name = tiny_gguf(type="F32").read_bytes(), b"blk.1.ffn_up.weight"
    path = tmp_path / "m.gguf"
    at = content.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(content[:at] + bytes([26]) + content[at + 1 :])
    with pytest.raises(UnsupportedError, match="is I32, which is not built") as caught:
        Engine.load(path)
    assert caught.value.what == "I32" and "Q4_0" in caught.value.supported


# ---- the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["nonsense", "AVX2", "scalar ", "neon"])
def test_isa_that_is_not_there(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setenv("EDGE_ISA", isa)
    with pytest.raises(UnsupportedError, match=f"EDGE_ISA={isa}") as caught:
        Engine.load(tiny_gguf())
    assert list(caught.value.supported) == native.isas() and "scalar" in str(caught.value)


@pytest.mark.parametrize("isa", native.isas())
def test_isa_that_is_asked_for(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    monkeypatch.setenv("EDGE_ISA", isa)
    engine = Engine.load(tiny_gguf(), threads=1)
    assert engine.isa == isa
    engine.close()


@pytest.mark.parametrize("threads", ["0", "257", "-1", "two", "1.5", "99999999999"])
def test_bad_thread_setting(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    monkeypatch.setenv("EDGE_THREADS", threads)
    with pytest.raises(InputError, match=threads):
        Engine.load(tiny_gguf())


def test_thread_setting_wins_over_the_argument(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_THREADS", "3")
    for argument, want in [(None, 3), (1, 3)]:
        engine = Engine.load(tiny_gguf(), threads=argument)
        assert engine.threads == want
        engine.close()
    with pytest.raises(InputError, match="threads is 0"):
        Engine.load(tiny_gguf(), threads=0)


@pytest.mark.parametrize("isa", native.isas())
def test_native_bf16_is_asked_for(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    """It runs, near the exact numbers, or says that the CPU cannot."""
    path, logits = tiny_gguf(type="BF16"), []
    monkeypatch.setenv("EDGE_ISA", isa)
    has = bool(native.lib.edge_isa_has_bf16(native.isa_index()))
    for setting in ("0", "1"):
        monkeypatch.setenv("EDGE_NATIVE_BF16", setting)
        if setting == "1" and not has:
            with pytest.raises(UnsupportedError, match="EDGE_NATIVE_BF16"):
                Engine.load(path)
            return
        engine = Engine.load(path)
        assert engine.isa == isa + "+bf16" * int(setting)
        logits.append(engine.run(engine.cache(), list(range(20)), logits="all"))
        engine.close()
    np.testing.assert_allclose(logits[1], logits[0], atol=0.05)


@pytest.mark.parametrize("value", ["2", "yes", ""])
def test_bad_native_bf16_setting(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("EDGE_NATIVE_BF16", value)
    with pytest.raises(InputError, match="EDGE_NATIVE_BF16"):
        Engine.load(tiny_gguf())


def test_trace_logs_a_line_per_op(
    tiny_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("EDGE_TRACE", "1")
    engine = Engine.load(tiny_gguf(type="Q4_0"), threads=2)
    engine.run(engine.cache(), [1, 2, 3])
    (record,) = caplog.records
    assert record.name == "edge.trace"
    head, *lines = record.getMessage().splitlines()
    assert head == f"3 tokens, 2 threads, {engine.isa}"
    assert [line.split()[2] for line in lines] == [op.kind for op in engine.lowered.ops]
    assert all(float(line.split()[0]) >= 0 for line in lines)
    assert lines[-1].split()[3:] == ["c4h32", "token_embd"]
    engine.close()


def test_trace_is_seen_where_nobody_set_up_logging(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_TRACE", "1")
    path, log = str(tiny_gguf()), logging.getLogger("edge.trace")
    code = (
        "import sys; from edge.engine.engine import Engine; "
        "e = Engine.load(sys.argv[1], threads=1); "
        "e.run(e.cache(), [1, 2])"
    )
    library = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert library.stderr.splitlines()[0].startswith("2 tokens, 1 threads, ")
    with monkeypatch.context() as patch:  # pytest looks at the root of all loggers
        patch.setattr(log, "handlers", [])
        patch.setattr(log, "propagate", True)
        result = run("complete", path, "-p", "x", "-n", "1", "-q", "-t", "1")
    assert "tokens, 1 threads, " in result.stderr and "us  embed" in result.stderr
    assert "tokens, 1 threads, " not in result.stdout


@pytest.mark.parametrize("value", ["2", "yes", ""])
def test_bad_trace_setting(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("EDGE_TRACE", value)
    with pytest.raises(InputError, match="EDGE_TRACE"):
        Engine.load(tiny_gguf())


def test_memory_that_is_not_there(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    with pytest.raises(MemoryBudgetError, match="keys and values of 256 tokens") as caught:
        Engine.load(tiny_gguf())
    error: Any = caught.value
    assert 10_000 < error.budget < error.needed == sum(error.parts.values())
    assert {"weights", "keys and values", "buffers"} <= error.parts.keys()
