"""`edge-run quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import assert_one_line, run

from edge.cli.quantize import Quantizing
from edge.files.gguf import Tensor
from edge.quantizer import job

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

Tiny = Callable[..., Path]
"""The `tiny_gguf` fixture: options -> the path of a small model."""


def test_a_file_is_written(tiny_gguf: Tiny, tmp_path: Path) -> None:
    model, out = str(tiny_gguf("llama")), tmp_path / "out.gguf"
    result = run("quantize", model, "-o", str(out), "--type", "Q8_0", "-t", "1")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"{out}: {out.stat().st_size / 1024:.1f} KiB, 8.59 bits a weight"
    assert lines[1:] == ["tensors: Q8_0 15, F32 5", "took 0:00"]
    again = run("quantize", model, "-o", str(out), "--type", "Q8_0")
    assert_one_line(again.exit_code, again.stderr, f"{out} is there already: --force replaces it")
    forced = run("quantize", model, "-o", str(out), "--recipe", "Q5_K_M", "--force", "--json")
    facts = json.loads(forced.stdout)
    assert facts["path"] == str(out) and facts["bytes"] == out.stat().st_size
    assert facts["types"] == {"Q5_1": 12, "F32": 5, "Q8_0": 3}


def test_types_are_explained(tiny_gguf: Tiny, tmp_path: Path) -> None:
    model, file = str(tiny_gguf("llama")), tmp_path / "mine.toml"
    shown = run("quantize", model, "--recipe", "Q5_K_M", "--explain", "-").stdout
    assert shown.startswith('description = "The types of Q5_K_M for tiny llama: ')
    assert run("quantize", model, "--recipe", "Q5_K_M", "--explain", str(file)).exit_code == 0
    assert file.read_text(encoding="utf-8") == shown
    assert run("quantize", model, "--recipe", str(file), "--explain", "-").exit_code == 0


def test_output_or_explain(tiny_gguf: Tiny, tmp_path: Path) -> None:
    for more in ([], ["-o", str(tmp_path / "out.gguf"), "--explain", "-"]):
        result = run("quantize", str(tiny_gguf("llama")), "--type", "Q8_0", *more)
        assert result.exit_code == 2 and "say either --output or --explain" in result.stderr


def test_ctrl_c_says_how_to_go_on(
    tiny_gguf: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, tensors = job.read_floats, set()

    def cut(tensor: Tensor, *rest: Any) -> Any:
        tensors.add(tensor.name)
        if len(tensors) == 3:
            raise KeyboardInterrupt
        return read(tensor, *rest)

    monkeypatch.setattr(job, "read_floats", cut)
    out = tmp_path / "out.gguf"
    result = run("quantize", str(tiny_gguf("llama")), "-o", str(out), "--type", "Q8_0")
    assert result.exit_code == 130
    assert result.stderr.strip() == "cut: the same command goes on from here"
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == [
        ".out.gguf.journal",
        ".out.gguf.partial",
    ]


def test_nothing_stays_of_a_run_that_wrote_no_tensor(tiny_gguf: Tiny, tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    options = ["--type", "Q8_0", "--calibration", str(tmp_path / "text.txt")]
    result = run("quantize", str(tiny_gguf("llama")), "-o", str(tmp_path / "out.gguf"), *options)
    assert_one_line(result.exit_code, result.stderr, "0 tokens")
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_the_bar_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("edge.cli.quantize.time.monotonic", lambda: next(now))
    bar = Quantizing()
    assert bar.text(50, 100).endswith("]  50 %")
    assert bar.text(70, 100).endswith(" 70 %, 0:06 left")
    assert bar.text(0, 10).endswith("]   0 %")  # the damage is measured, the weights begin
    assert bar.text(2, 10).endswith(" 20 %, 0:04 left")
