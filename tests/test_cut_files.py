"""A mapped file that is cut short while it is in use: what still works, and how a program ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_model import ROOT, edge_run

from edge.binding.library import BINDINGS

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(sys.platform == "win32", reason="mapped files cannot be cut there"),
]

#: Cut the model's file before each run of it; edge-run must have begun, to be told of the signal.
CUT_BEFORE_RUNS = """
import os, edge.cli; edge.cli._prepare()
from edge.engine.engine import Engine
run = Engine.run
def cut(self, *args, **options):
    os.truncate(self.path, 4096)
    return run(self, *args, **options)
Engine.run = cut"""


def test_small_things_are_read_at_load(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """Tokens, template, metadata: weights alone are looked at later, and those were packed."""
    path = shutil.copy(tiny_gguf(), tmp_path / "m.gguf")
    code = f"""
import os, edge
with edge.load({str(path)!r}, context=64, threads=1) as model:
    os.truncate(model.engine.path, 0)
    chat = model.chat(system="Hello")
    chat.send("Hello", max_tokens=2)
    chat.save({str(tmp_path / "a.session")!r})
    print(model.info()["name"])"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "tiny llama\n"), done.stderr


@pytest.mark.parametrize("binding", BINDINGS)
def test_weights_that_are_gone_are_one_line(
    tiny_gguf: Callable[..., Path], tmp_path: Path, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_BINDING", binding)
    path = tmp_path / "m.edge.gguf"
    assert edge_run("pack", tiny_gguf(), "-o", path).returncode == 0
    done = edge_run("complete", path, "-", "--quiet", stdin=b"Hello", code=CUT_BEFORE_RUNS)
    assert done.returncode == 1
    assert done.stderr == (
        b"edge-run: a file in use was cut short, or its disk failed: see that the model is whole, "
        b"and start again\n"
    )
