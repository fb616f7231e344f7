"""The installed wheel in the Pythons of emulated boards: the same numbers as here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machines import (
    BOOKWORM,
    BOOKWORM_32,
    CPU,
    DIGESTS,
    PHONE,
    PI2,
    PI3,
    PI5,
    ROOT,
    TRIXIE,
    Land,
    output_of,
    run_python,
)

pytestmark = pytest.mark.board


@pytest.mark.parametrize(
    "cpu, land", [(PHONE, BOOKWORM), (PI3, TRIXIE), (PI2, BOOKWORM_32)], ids=str
)
def test_same_logits(
    site: Callable[[Land], Path], digests: dict[str, str], cpu: CPU, land: Land
) -> None:
    """Bit for bit, with each instruction set that the CPU has."""
    run = run_python(cpu, land, site(land), DIGESTS, *digests, env={"EDGE_CACHE_SIZE": "0"})
    assert json.loads(output_of(run)) == dict.fromkeys(cpu.isas, digests)


@pytest.mark.parametrize("isa", PI3.lacks)
def test_isa_that_the_cpu_lacks_is_one_line(site: Callable[[Land], Path], isa: str) -> None:
    command = ("-m", "edge.cli", "complete", "x.gguf", "-p", "x")
    run = run_python(PI3, TRIXIE, site(TRIXIE), *command, env={"EDGE_ISA": isa})
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert f"EDGE_ISA={isa}" in line and "this CPU cannot run it" in line


def test_default_model(site: Callable[[Land], Path], smollm2: Path, tmp_path: Path) -> None:
    """On a Raspberry Pi 5, with the weights that this machine packed: the same tokens."""
    command: list[Any] = ["-m", "edge.cli", "complete", smollm2, "-p", "The capital of France is"]
    command += ["--max-tokens", "4", "--temperature", "0", "--json"]
    env = {"EDGE_CACHE": str(tmp_path), "EDGE_CACHE_SIZE": "1GB"}
    here = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**env, "PYTHONPATH": str(ROOT)},
    )
    want = json.loads(output_of(here))
    (packed,) = (tmp_path / "packed").glob("*.gguf")
    made = packed.stat().st_ino
    run = run_python(PI5, BOOKWORM, site(BOOKWORM), *command, env=env)
    got = json.loads(output_of(run))
    assert got["tokens"] == want["tokens"] and len(got["tokens"]) == 4
    assert "Paris" in got["text"] and f"kernels {PI5.isas[-1]}" in run.stderr
    assert [path.stat().st_ino for path in (tmp_path / "packed").glob("*.gguf")] == [made]
