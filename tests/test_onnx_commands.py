"""`edge-run plan`, `bench` and `devices` on folders of ONNX graphs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onnxfolders import write_cpu, write_static

from edge.cli import cli
from edge.errors import UnsupportedError
from edge.loading import OnnxOptions
from edge.onnx.providers.providers import PROVIDERS, Availability
from edge.onnx.run.engine import DescribedFolder, OnnxEngine


@pytest.fixture(scope="module", params=[write_cpu, write_static])
def folder(
    request: pytest.FixtureRequest,
    tiny_gguf: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return request.param(tiny_gguf(type="Q8_0"), tmp_path_factory.mktemp("onnx") / "m")


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process itself takes changes by pages between two looks."""
    monkeypatch.setattr("edge.onnx.run.budget.program_bytes", lambda parts: 1 << 26)


def run(*arguments: str, code: int | None = 0) -> str:
    done = CliRunner().invoke(cli, arguments)
    assert code is None or done.exit_code == code, done.output
    return done.stdout if code is None else done.output


def test_plan_is_what_the_engine_is_held_to(folder: Path) -> None:
    facts = json.loads(run("plan", str(folder), "--context", "100", "--json"))
    engine = OnnxEngine.load(folder, context=100, threads=1)
    try:
        assert facts["context"] == engine.config.n_context == 100
        planned = {name.replace(" ", "_"): n for name, n in engine.ledger.parts.items()}
        assert facts["parts"] == planned and facts["needed_bytes"] == engine.ledger.needed
        assert facts["kv"] == engine.folder.dtype
    finally:
        engine.close()
    assert facts["file_bytes"] == sum(f.stat().st_size for f in engine.folder.files)
    assert facts["kv_types"]["float32"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert "edge-run bench" in facts["speed"]


def test_plan_for_people(folder: Path) -> None:
    lines = run("plan", str(folder), "--memory", "8GB").splitlines()
    assert lines[0].startswith(str(folder)) and "the header is there" not in lines[0]
    assert any(line.startswith("in all") for line in lines)
    assert any("fits" in line for line in lines if line.startswith("budget"))
    assert not any(line != line.rstrip() for line in lines)


def test_largest_context_is_the_largest(folder: Path) -> None:
    """What fits is planned; with one token more it would not be."""
    whole = json.loads(run("plan", str(folder), "--json"))
    most = next(iter(whole["kv_types"].values()))["largest_context"]
    assert most == whole["context_trained"]  # memory is no limit here
    budget = whole["needed_bytes"] - 1
    facts = json.loads(run("plan", str(folder), "--memory", str(budget), "--json", code=None))
    assert not facts["fits"]
    largest = facts["kv_types"]["float32"]["largest_context"]
    assert facts["options"][0]["flags"] == f"--context {largest}"
    for n, fits in ((largest, True), (largest + 1, False)):
        arguments = ("--memory", str(budget), "--context", str(n), "--json")
        found = json.loads(run("plan", str(folder), *arguments, code=None))
        assert found["fits"] is fits


def test_plan_takes_no_option_of_gguf(folder: Path) -> None:
    assert "kv is an option of GGUF models" in run("plan", str(folder), "--kv", "q8", code=1)


def test_bench(folder: Path) -> None:
    flags = ("--prompt", "9", "--decode", "2", "--repeat", "1", "--threads", "1")
    found = json.loads(run("bench", str(folder), *flags, "--json"))
    assert found["isa"] == "onnxruntime cpu" and found["kv"] == "float32"
    assert [row["test"] for row in found["results"]] == ["prompt", "decode"]
    assert all(row["median"] > 0 and "peak_share" not in row for row in found["results"])
    lines = run("bench", str(folder), *flags).splitlines()
    assert "kernels onnxruntime cpu, weights" in lines[0]
    assert lines[-1].startswith("decode 2") and "%" not in lines[-1]


def test_bench_says_what_cannot_be_run(folder: Path) -> None:
    assert "hailo is not here" in run(
        "bench", str(folder), "--prompt", "8", "--ep", "hailo", code=1
    )
    assert "is an option of GGUF models" in run("bench", str(folder), "--kv", "q8", code=1)
    assert "the model was made for" in run("bench", str(folder), "--prompt", "999", code=1)


@pytest.mark.parametrize("is_here", [True, False])
def test_devices_say_that_qnn_is_simulated_where_it_is(
    is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    availability = (
        Availability("1", "2", ("the HTP simulator",))
        if is_here
        else Availability(missing="install it")
    )
    row = dataclasses.replace(PROVIDERS["qnn"], look=lambda: availability)
    monkeypatch.setitem(PROVIDERS, "qnn", row)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert ("qnn is simulated on this machine" in run("devices")) == is_here
    facts: dict[str, Any] = json.loads(run("devices", "--json"))
    assert facts["simulated"] == is_here


def test_graphs_are_described_without_a_provider(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise UnsupportedError("it is not here", what="onnxruntime")

    monkeypatch.setattr("edge.onnx.providers.providers.choose", refuse)
    with DescribedFolder.open(folder, OnnxOptions(context=100)) as described:
        assert described.ledger.needed == sum(described.ledger.parts.values())
        assert described.new_tokenizer().n_vocab == described.folder.n_vocab
        with pytest.raises(UnsupportedError, match="not here"):
            described.start()
