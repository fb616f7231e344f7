"""The self-test of the kernels as a program, on this CPU; docs/boards.md: on others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge import native

ROOT = Path(__file__).resolve().parent.parent
BUILD = next((p for name in ("ci", "dev") if (p := ROOT / "build" / name).exists()), None)


@pytest.fixture(scope="module")
def selftest() -> Path:
    """The program, built where scripts/build has built the rest."""
    if BUILD is None:
        pytest.skip("run scripts/build first")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = ("cmake", "--build", BUILD, "--target", "selftest")
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert run.returncode == 0, run.stdout + run.stderr
    return BUILD / "selftest"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A program's end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_kernels_equal_scalar(selftest: Path) -> None:
    done = run(selftest)
    assert done.returncode == 0, done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == native.isas()
    assert all(line.endswith(" cases equal scalar") for line in done.stdout.splitlines())


def test_usable(selftest: Path) -> None:
    assert run(selftest, "--usable").stdout.split() == native.isas()


def test_wrong_use_is_refused(selftest: Path) -> None:
    assert run(selftest, "--force", "mmx").returncode == 2
    assert run(selftest, "--all").returncode == 2
