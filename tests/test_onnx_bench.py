"""tests/bench/exported.py: an exported folder beside the native kernels; its table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.onnx.export.export import Recipe, export


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    import exported

    return exported


def test_runtimes_are_measured(
    exported: Any, tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny_gguf(type="Q4_0"), tmp_path / "folder"
    export(model, folder, Recipe("cpu"))
    cases = (exported.Case("prompt", 20), exported.Case("decode", 3, 40))
    monkeypatch.setattr(exported, "CASES", cases)
    monkeypatch.setattr(exported, "CONTEXT", 64)
    for name, build in (("edge", "onnxruntime cpu"), ("native", "edge ")):
        got = exported.run(name, str(model), str(folder))
        assert build in got["build"] and len(got["speeds"]) == 2 and min(got["speeds"]) > 0


def test_ratios_are_taken_inside_a_round(exported: Any) -> None:
    n = len(exported.CASES)
    speeds = {"edge": [[10.0] * n, [40.0] * n], "genai": [[5.0] * n, [10.0] * n]}
    lines = exported.markdown(speeds).splitlines()
    assert lines[0] == "| test | edge | genai | to genai |" and len(lines) == 2 + n
    assert lines[2] == "| prompt 66 | 25.0 | 7.5 | **3.00** (2.00 to 4.00) |"
