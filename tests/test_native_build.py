"""The built library: what it exports, and what it needs. tests/boards: on ARM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "native" / "edge.h"
LIBRARY = ROOT / "edge" / "libedge.so"

elf = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("readelf") is None,
    reason="needs Linux and binutils",
)


def output_of(*command: str | Path) -> str:
    """The standard output of `command`; its error text is in the failure when it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path}  # cmake and ninja may be the environment's own
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert run.returncode == 0, f"{command}:\n{run.stdout}{run.stderr}"
    return run.stdout


def functions_in_header() -> set[str]:
    """The names of the functions that native/edge.h declares."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    return set(re.findall(r"\b(edge_\w+)\s*\(", text))


def exported_by(library: Path) -> set[str]:
    """The names of the symbols that `library` defines for others."""
    lines = output_of("readelf", "--dyn-syms", "--wide", library).splitlines()
    rows = [line.split() for line in lines if " GLOBAL " in line or " WEAK " in line]
    return {row[7].split("@")[0] for row in rows if len(row) > 7 and row[6] != "UND"}


def needed_by(library: Path) -> set[str]:
    """The shared libraries that `library` asks the loader for."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", library)))


def test_header_has_declarations_only() -> None:
    assert functions_in_header()
    assert not re.search(r"^\s*#", HEADER.read_text(encoding="utf-8"), re.MULTILINE)


def test_generated_modules_are_those_of_the_header(tmp_path: Path) -> None:
    output_of(sys.executable, ROOT / "native" / "generate_bindings.py", HEADER, tmp_path)
    for name in ("_cffi.py", "_declarations.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / "edge" / name).read_bytes()


@elf
def test_exports_are_those_of_the_header() -> None:
    assert exported_by(LIBRARY) == functions_in_header()


@elf
def test_needs_only_the_c_library() -> None:
    plain = re.compile(r"lib(c|m|pthread)\.so\.\d+|ld-linux.*")
    assert {name for name in needed_by(LIBRARY) if not plain.fullmatch(name)} == set()


@elf
def test_stack_is_not_executable() -> None:
    (stack,) = re.findall(
        r"GNU_STACK.*", output_of("readelf", "--program-headers", "--wide", LIBRARY)
    )
    assert "RWE" not in stack
