"""kill -9, at any moment: what survives goes on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from sessions import PROMPT, options, resumed, same_pages, unshared

import edge


def kill_and_resume(path: Path, n_kills: int, tmp_path: Path, n_tokens: int) -> int:
    """Kill a process that goes on with a session again and again; how many tokens were lost."""
    rng, every, lost, before = random.Random(5), 8, 0, 0
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with edge.load(path, threads=1, context=2048) as model:
        session = unshared(model).session(**options(model))
        session.generate(PROMPT, max_tokens=n_tokens)
        whole, file = session.tokens, tmp_path / "0"
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env
        ) as parent:
            assert parent.stdin and parent.stdout
            for i in range(n_kills):
                print(file, every, n_tokens, file=parent.stdin, flush=True)
                child, said, moment = int(parent.stdout.readline()), 0, rng.randrange(-3, 30)
                if moment < 0:  # while it loads, resumes, saves for the first time
                    time.sleep(rng.random() * 0.1)
                    with suppress(ProcessLookupError):  # it was quick
                        os.kill(child, signal.SIGKILL)
                delay = rng.random() * 2e-3
                for k, line in enumerate(iter(parent.stdout.readline, "\n")):
                    said = int(line)
                    if k == moment:
                        time.sleep(delay)  # within the next token, or an append
                        os.kill(child, signal.SIGKILL)
                if not file.exists():
                    continue
                again = resumed(file, model)
                n = len(again.tokens)
                assert again.tokens == whole[:n] and n >= max(before, said - every), (i, n, said)
                lost += max(0, said - n)
                assert i % 10 or same_pages(again, model)
                again.generate("", max_tokens=4)
                assert again.tokens == whole[: n + 4]
                again.close()
                before = n
                if n > n_tokens - 60:
                    file, before = tmp_path / str(i + 1), 0
    return lost


def test_killed_at_200_random_moments(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_gguf(context=2048)
    assert kill_and_resume(path, 200, tmp_path, 900) > 0


@pytest.mark.model
def test_a_real_model_killed_at_random_moments(smollm2: Path, tmp_path: Path) -> None:
    assert kill_and_resume(smollm2, 15, tmp_path, 300) > 0
