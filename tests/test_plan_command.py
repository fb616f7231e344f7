"""`edge-run plan` and `--report`: what is predicted, and what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model import assert_one_line, run
from ggufbytes import BOOL, key

from edge.device import memory
from edge.engine import predict
from edge.engine.describe import describe, pack
from edge.engine.engine import DescribedFile, Engine
from edge.engine.predict import Product
from edge.errors import MemoryBudgetError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.kv.shape import KVLayout, kv_types
from edge.weights import packed
from edge.weights.model_file import open_model
from edge.weights.weights import RawWeights

Tiny = Callable[..., Path]

KEYS = {
    *("model", "file_bytes", "whole_bytes", "complete", "fits", "budget_bytes", "budget_stated"),
    *("needed_bytes", "parts", "context", "context_trained", "sessions", "kv", "kv_types"),
    "kv_groups",
    *("layouts", "compact", "options", "rotary", "threads", "reads_per_token", "speed"),
}
PARTS = ["weights", "keys_and_values", "buffers", "logits", "tokenizer", "prompt"]
PARTS += ["template", "history", "program", "packing"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that reads 10 GB/s, weights 9 GB/s, and a cache folder of its own."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))

    class Machine:
        def __init__(self, threads: int, small: bool) -> None:
            assert small

        def __enter__(self) -> Any:
            return SimpleNamespace(read=lambda: 1e10)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(predict, "Machine", Machine)
    monkeypatch.setattr(predict, "_matmuls", lambda _, kinds: (1e-6, dict.fromkeys(kinds, 9e9)))


def plan(*args: str | Path) -> dict[str, Any]:
    result = run("plan", *map(str, args), "--json")
    facts: dict[str, Any] = json.loads(result.stdout)
    assert set(facts) == KEYS
    if facts["fits"]:
        assert (result.exit_code, result.stderr) == (0, "")
    else:
        assert_one_line(result.exit_code, result.stderr, "needs")
    return facts


def test_facts(tiny_gguf: Tiny) -> None:
    path = tiny_gguf("llama", context=8192, head_dim=32)
    facts = plan(path, "--threads", "1")
    assert facts["fits"] and facts["complete"] and facts["options"] == []
    assert facts["whole_bytes"] == facts["file_bytes"] == path.stat().st_size
    assert list(facts["parts"]) == [*PARTS, "margin"]
    assert facts["needed_bytes"] == sum(facts["parts"].values())
    assert (facts["context"], facts["context_trained"], facts["sessions"]) == (4096, 8192, 1)
    assert list(facts["kv_types"]) == kv_types()
    assert facts["kv_types"]["f16"] == {"bytes_per_token": 512, "largest_context": 8192}
    assert facts["rotary"] is None
    assert facts["threads"] == {"threads": 1, "cpus": [], "why": "as asked", "ignored": None}
    speed = facts["speed"]
    assert (speed["threads"], speed["read_bytes_per_second"], speed["stored"]) == (1, 1e10, True)
    assert list(speed["tokens_per_second"]) == ["0", "4096"]
    assert speed["tokens_per_second"]["0"] > speed["tokens_per_second"]["4096"] > 0


def test_text(tiny_gguf: Tiny) -> None:
    result = run("plan", str(tiny_gguf("llama")))
    assert result.exit_code == 0
    for word in (
        "weights",
        "256 tokens in f16",
        "in all",
        "available",
        "fits",
        "10.0 GB/s",
        "threads: ",
    ):
        assert word in result.stdout


def test_experts(tiny_gguf: Tiny) -> None:
    """What a token reads of them is told apart from what they take."""
    path = tiny_gguf("ernie4_5-moe", type="Q4_0")
    reads = plan(path)["reads_per_token"]
    assert 0 < reads["expert_bytes"] == reads["all_expert_bytes"] * 3 // 8
    assert reads["expert_bytes"] < reads["weight_bytes"] < reads["all_expert_bytes"] * 2
    assert "each token reads " in run("plan", str(path)).stdout
    dense = tiny_gguf("llama")
    assert plan(dense)["reads_per_token"]["expert_bytes"] == 0
    assert "each token reads " not in run("plan", str(dense)).stdout


def test_layer_groups(tiny_gguf: Tiny) -> None:
    half = (("llama.attention.sliding_window_pattern", (True, False)),)
    path = tiny_gguf("llama", window=100, context=8192, extra=half)
    facts = plan(path, "--context", "8192")
    windowed, whole = facts["kv_groups"]
    assert (windowed["layers"], windowed["window"], whole["layers"], whole["window"]) == (
        *([0], 100),
        *([1], 0),
    )
    assert windowed["bytes_per_token"] == whole["bytes_per_token"] == 2 * 2 * 16 * 2
    assert windowed["bytes"] < whole["bytes"] == 8192 * whole["bytes_per_token"]
    assert facts["parts"]["keys_and_values"] == windowed["bytes"] + whole["bytes"]
    lines = run("plan", str(path), "--context", "8192").stdout.splitlines()
    table = [line.split() for line in lines]
    at = table.index(["layers", "window", "bytes/token", "in", "all"])
    assert [row[:3] for row in table[at + 1 : at + 3]] == [
        ["1", "100", "128"],
        ["1", "none", "128"],
    ]
    assert "layers" not in run("plan", str(tiny_gguf())).stdout


def test_it_agrees_with_loading(tiny_gguf: Tiny) -> None:
    path = tiny_gguf("llama")
    facts = plan(path, "--context", "100")
    engine = Engine.load(path, context=100)
    assert facts["parts"]["weights"] == engine.packed_bytes
    assert facts["parts"]["keys_and_values"] == engine.cache_bytes(100)
    assert facts["parts"]["buffers"] == engine.arena_bytes
    engine.close()


def test_what_does_not_fit(tiny_gguf: Tiny) -> None:
    path = tiny_gguf("llama", context=4096, n_heads=16, n_kv_heads=16, head_dim=128)
    half = plan(path, "--context", "2048")["needed_bytes"]
    facts = plan(path, "--memory", str(half))
    assert not facts["fits"] and facts["budget_stated"] and facts["budget_bytes"] == half
    flags = facts["options"][0]["flags"].split()
    assert flags[0] == "--context" and abs(int(flags[1]) - 2048) <= 320
    assert facts["options"][0]["needed_bytes"] <= half
    result = run("plan", str(path), "--memory", f" {half / 1e6:.3f}MB")
    assert result.exit_code == 1 and "What would fit" in result.stdout
    assert f"MiB   {half / 1e6:.3f}MB, too little" in result.stdout.replace("  MiB", " MiB")
    typed = round(half / 1e6, 3) * 1e6  # not half: it may be on the other side of a digit
    assert f"the budget is {half / 1e6:.3f}MB ({typed / 2**20:.1f} MiB)" in result.stderr
    assert plan(path, "--memory", "1MB")["options"][0]["needed_bytes"] > 10**6


@pytest.mark.parametrize("value", ["0", "-1", "2GG", "", "900TB"])
def test_bad_budget(tiny_gguf: Tiny, value: str) -> None:
    result = run("plan", str(tiny_gguf("llama")), f"--memory={value}")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("context", [64, 65])
def test_rotary_factors(tiny_gguf: Tiny, context: int) -> None:
    path = tiny_gguf("phi3", original_context=64)
    chosen = "short" if context == 64 else "long"
    facts = plan(path, "--context", str(context))
    assert facts["rotary"] == {"factors": chosen, "long_from_context": 65}
    text = run("plan", str(path), "--context", str(context)).stdout
    assert f"rotary factors: {chosen}" in text and "edge-run perplexity" in text


# ---- the header alone ----------------------------------------------------------------------------


def cut(path: Path, folder: Path, n_bytes: int) -> Path:
    copy = folder / f"{path.stem}-part.gguf"
    copy.write_bytes(path.read_bytes()[:n_bytes])
    return copy


def header_bytes(path: Path) -> int:
    with GGUF.open(path) as gguf:
        return len(gguf.headers()[0])


def test_header_is_enough(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf("llama")
    part = cut(path, tmp_path, header_bytes(path))
    facts, whole = plan(part), plan(path)
    assert not facts["complete"] and facts["file_bytes"] == header_bytes(path)
    for name in ("whole_bytes", "kv_types", "layouts"):
        assert facts[name] == whole[name]
    assert facts["parts"]["weights"] == whole["parts"]["weights"]
    assert "the header is there" in run("plan", str(part)).stdout


def test_less_than_the_header_is_refused(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf("llama")
    result = run("plan", str(cut(path, tmp_path, header_bytes(path) - 100)))
    assert result.exit_code == 1 and "truncated" in result.stderr


def test_data_cannot_be_reached(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf("llama")
    for file in (path, cut(path, tmp_path, header_bytes(path) + 100)):
        with open_model(file, header_only=True) as gguf:
            weights = describe(gguf).weights.model
            assert isinstance(gguf, GGUF) and isinstance(weights, RawWeights)
            with pytest.raises(ModelFileError, match="header alone"):
                gguf.data()
            with pytest.raises(ModelFileError, match="header alone"):
                weights.load(None)
            with pytest.raises(ModelFileError, match="header alone"):
                next(weights.pieces(None))
            gguf.forget()
            weights.close()
    with pytest.raises(ModelFileError, match="truncated"):
        Engine.load(tmp_path / f"{path.stem}-part.gguf")


def test_header_of_a_packed_file(tiny_gguf: Tiny, tmp_path: Path) -> None:
    target = tmp_path / "packed.gguf"
    pack(tiny_gguf("llama"), target)
    part = cut(target, tmp_path, header_bytes(target))
    assert plan(part)["parts"]["weights"] == plan(target)["parts"]["weights"]
    with open_model(part, header_only=True) as file:
        assert isinstance(file, packed.PackedFile)
        with pytest.raises(ModelFileError, match="header alone"):
            file.verify(None)
        with pytest.raises(ModelFileError, match="not there"):
            describe(file).weights.model.use(file)


def test_a_tensor_of_absurd_size(tmp_path: Path) -> None:
    import ggufbytes

    content = ggufbytes.gguf(
        [key("yes", BOOL, True)], [ggufbytes.tensor("t", (1 << 40, 1 << 40), 0, 0)]
    )
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match="do not fit"):
        GGUF.open(tmp_path / "x.gguf", header_only=True)


# ---- speed, predicted and real -------------------------------------------------------------------


def test_no_memory_to_measure(tiny_gguf: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(threads: int, small: bool) -> None:
        raise MemoryBudgetError("too little to measure", needed=2, budget=1)

    monkeypatch.setattr(predict, "Machine", refuse)
    assert plan(tiny_gguf("llama"))["speed"] == "too little to measure"
    assert "not predicted" in run("plan", str(tiny_gguf("llama"))).stdout


def test_a_cache_that_cannot_be_written(
    tiny_gguf: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "file"))
    assert plan(tiny_gguf("llama"))["speed"]["stored"] is False


def test_measurements_are_kept_by_threads(tmp_path: Path) -> None:
    fast, slow = Product("c4h32"), Product("c6b16", 2)
    predict.Bandwidth(1, 5e9, 1e-6, {fast: 4e9}).store()
    predict.Bandwidth(2, 9e9, 2e-6, {fast: 8e9}).store()
    predict.Bandwidth(2, 9e9, 3e-6, {slow: 7e9}).store()
    assert predict.Bandwidth.load(1) == predict.Bandwidth(1, 5e9, 1e-6, {fast: 4e9})
    assert predict.Bandwidth.load(2) == predict.Bandwidth(2, 9e9, 3e-6, {fast: 8e9, slow: 7e9})
    assert predict.Bandwidth.load(3) is None
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["machine.json"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "7", '{"version": 3}', '{"version": 2, "machine": "another"}'),
        '{"version": 1, "cpu": "x", "read": {"2": 9e9}}',
        '{"version": 2, "machine": MACHINE, "threads": 1}',
        '{"version": 2, "machine": MACHINE, "threads": {"2": "x"}}',
        '{"version": 2, "machine": MACHINE, "threads": {"2": {"read": 1}}}',
        '{"version": 2, "machine": MACHINE, "threads": {"2": {"read": -1, "start": 0}}}',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_measurement(tmp_path: Path, content: str) -> None:
    (tmp_path / "cache").mkdir()
    content = content.replace("MACHINE", json.dumps(predict._machine()))
    (tmp_path / "cache" / "machine.json").write_text(content)
    assert predict.Bandwidth.load(2) is None
    predict.Bandwidth(2, 9e9).store()
    assert predict.Bandwidth.load(2) is not None


def test_prediction_is_made_of_bytes(tiny_gguf: Tiny) -> None:
    with DescribedFile.open(tiny_gguf("llama")) as described:
        demand = predict.demand_of(described.description)
    assert set(kv_types()) <= set(predict.CACHE_SHARES)
    engine = Engine.load(tiny_gguf("llama"))
    assert predict.demand_of(engine) == demand
    engine.close()
    slow, fast = (
        predict.Bandwidth(1, read, 1 / read, dict.fromkeys(demand.products, read))
        for read in (1e6, 2e6)
    )
    ratio = predict.tokens_per_second(demand, 99, fast) / predict.tokens_per_second(
        demand, 99, slow
    )
    assert ratio == pytest.approx(2, rel=0.01)
    windowed = (replace(group, window=64) for group in demand.kv.groups)
    with_window = replace(demand, kv=KVLayout(tuple(windowed)))
    assert with_window.cache_bytes(5000) == demand.cache_bytes(63)
    half = (("llama.attention.sliding_window_pattern", (True, False)),)
    with DescribedFile.open(tiny_gguf("llama", window=64, extra=half)) as described:
        n_bytes = predict.demand_of(described.description).cache_bytes(5000)
    assert 2 * n_bytes == demand.cache_bytes(63) + demand.cache_bytes(5000)


def test_products_of_a_model(tiny_gguf: Tiny) -> None:
    """The head multiplies two columns; all else one."""
    with DescribedFile.open(tiny_gguf(type="Q4_0")) as described:
        demand = predict.demand_of(described.description)
    assert Product("c4h32") in demand.products
    assert sum(product.columns == 2 for product in demand.products) == 1
    assert demand.weights == sum(demand.products.values()) > 0
    assert predict.Bandwidth(1, 1e9).covers(demand) is False
    assert predict.Bandwidth(1, 1e9, 0, dict.fromkeys(demand.products, 1e9)).covers(demand)


def test_seconds_of_a_matrix() -> None:
    """What an allocation of types asks."""
    rates = {predict.product_of("IQ3_S"): 1e9, predict.product_of("IQ3_S", "compact"): 1e8}
    measured = predict.Bandwidth(2, 1e10, 1e-5, rates)
    fast, compact = (
        measured.matrix_seconds("IQ3_S", (512, 2048), form) for form in ("fast", "compact")
    )
    more = 1e-5 + predict.OP_SECONDS
    assert fast == pytest.approx(512 * 2048 * 4.3125 / 8 / 1e9 + more, rel=0.01)
    assert compact == pytest.approx(512 * 2048 * 3.4375 / 8 / 1e8 + more, rel=0.01)
    with pytest.raises(UnsupportedError):
        measured.matrix_seconds("Q8_K", (512, 256))


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_report(tiny_gguf: Tiny, command: str) -> None:
    args = (command, str(tiny_gguf("llama")), "-n", "6", "--report", "--quiet")
    first = run(*args, stdin="Hello the world")
    assert first.exit_code == 0, first.stderr
    assert "`edge-run plan` measures this machine" in first.stderr
    plan(tiny_gguf("llama"))
    lines = run(*args, stdin="Hello the world").stderr.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("memory", "weights", "keys", "buffers", "everything", "peak", "speed:", "threads:")
    ]
    assert "predicted" in lines[-2] and lines[-2].endswith(("too high", "too low"))


def test_report_where_the_system_is_silent(
    tiny_gguf: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "peak", lambda: None)
    monkeypatch.setattr("edge.weights.weights.resident_of", lambda address, n_bytes: None)
    report = run("complete", str(tiny_gguf("llama")), "-p", "Hello", "-n", "1", "--report").stderr
    lines = {line.split()[0]: line for line in report.splitlines()}
    assert all(
        lines[name].split("iB", 1)[1].strip().startswith("?") for name in ("weights", "peak")
    )
    assert "nothing was decoded" in lines["speed:"]
