"""Every example runs as a script: those in Python on a small model, the others on fake programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tiny_gguf: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, str(example), str(tiny_gguf(context=4096))],
        input="Hello\nAgain\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert done.stdout.strip()


TERMUX = ROOT / "examples" / "termux.sh"
#: Programs of a phone: they write down how they were called. `pkg` makes python's import succeed.
FAKES = {
    "python": 'test -e "$LOG.installed"',
    "pkg": 'case "$*" in *tokenizers*) : >"$LOG.installed";; esac',
    "pip": 'cp "$HERE/pkg" "$HERE/edge-run"',
    "termux-wake-lock": ":",
    "termux-wake-unlock": ":",
}


@pytest.fixture
def termux(tmp_path: Path) -> Callable[..., list[str]]:
    """termux(*arguments, **environment): runs the script; the calls that it made."""
    here, log = tmp_path / "bin", tmp_path / "log"
    here.mkdir()
    for name, what in FAKES.items():
        (here / name).write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >>"$LOG"\n{what}\n')
        (here / name).chmod(0o755)
    for name in ("sh", "cp"):
        (here / name).symlink_to(str(shutil.which(name)))

    def run(*arguments: str, **environment: str) -> list[str]:
        log.unlink(missing_ok=True)
        env = {"PATH": str(here), "LOG": str(log), "HERE": str(here), **environment}
        command = [str(here / "sh"), str(TERMUX), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return log.read_text().splitlines()

    return run


def test_termux_installs_once(termux: Callable[..., list[str]]) -> None:
    ask = "edge-run chat --memory 2GB --max-tokens 256 -p Why is the sky blue?"
    lock = ["termux-wake-lock ", "edge-run pull", ask, "termux-wake-unlock "]
    check = "python -c import numpy, tokenizers"
    packages = ["pkg install -y python python-numpy tur-repo", "pkg install -y python-tokenizers"]
    wheel = "edge_run-0.1.0-py3-none-android_21_arm64_v8a.whl"
    assert termux(EDGE_WHEEL=wheel) == [check, *packages, f"pip install {wheel}", *lock]
    assert termux() == [check, *lock]


def test_termux_with_a_wheel_and_a_model(termux: Callable[..., list[str]]) -> None:
    calls = termux("Hi there", "my model.gguf", EDGE_WHEEL="./edge.whl", EDGE_MEMORY="3GB")
    assert "pip install ./edge.whl" in calls and "edge-run pull" not in calls
    assert "edge-run chat my model.gguf --memory 3GB --max-tokens 256 -p Hi there" in calls


def test_termux_options_are_those_of_the_program() -> None:
    from edge.cli.chat import chat

    known = {option for parameter in chat.params for option in parameter.opts}
    assert set(re.findall(r" (--?[a-z][a-z-]*)", TERMUX.read_text().splitlines()[-1])) <= known
