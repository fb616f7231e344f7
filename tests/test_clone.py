"""What scripts/setup makes of a clone: edge is the tree as it stands, in its root and elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from test_native_build import ROOT
from tiny import write_tiny

#: Tools of the extra `wheels`: pip is not to fetch the build back end.
pytestmark = pytest.mark.wheels


def output_of(*command: str | Path, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "EDGE_"))}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_edge_is_the_tree(tmp_path: Path) -> None:
    clone, env = tmp_path / "clone", tmp_path / "env"
    clone.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, clone)
    for name in ("edge", "native"):
        shutil.copytree(ROOT / name, clone / name)
    venv.create(env)
    python = env / "bin" / "python"
    (packages,) = (env / "lib").glob("python*/site-packages")
    (packages / "tools.pth").write_text(sysconfig.get_path("purelib"))
    # As in scripts/setup; the back end is there already.
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    output_of(*pip, "--no-build-isolation", "--ignore-installed", "-e", ".", cwd=clone)
    model = write_tiny(tmp_path / "tiny.gguf", "llama")
    code = "import edge, sys; edge.load(sys.argv[1]).session().generate('a', max_tokens=3);"
    for folder in (clone, tmp_path):
        said = output_of(python, "-c", f"{code} print(edge.__file__)", model, cwd=folder)
        assert Path(said.strip()) == clone / "edge" / "__init__.py"
    assert not (clone / "build").exists()  # nothing was compiled
    (clone / "edge" / "later.py").write_text("there = True")
    assert output_of(python, "-c", "import edge.later", cwd=tmp_path) == ""
    assert "edge" in output_of(env / "bin" / "edge-run", "--version", cwd=clone)


def test_this_environment_is_of_this_tree(tmp_path: Path) -> None:
    """As scripts/setup has made it."""
    model = write_tiny(tmp_path / "tiny.gguf", "llama")
    code = "import edge, sys; edge.load(sys.argv[1]); print(edge.__file__)"
    for folder in (ROOT, tmp_path):
        said = output_of(sys.executable, "-c", code, model, cwd=folder)
        assert Path(said.strip()) == ROOT / "edge" / "__init__.py"


STUB = """#!/bin/sh
# Stands for Python: makes what venv and pip would, and writes down what pip was asked for.
case "$*" in
*venv*) mkdir -p .venv/bin .venv/lib/python3/site-packages && cp "$0" .venv/bin/python ;;
*"pip install"*)
    echo "$*" >>asked
    cd .venv/lib/python3/site-packages
    printf 'import hook\\n/the/clone\\n' >_editable_skbc_edge_run.pth ;;
esac
"""


def set_up(tree: Path, stderr: int) -> None:
    env = {**os.environ, "PYTHON": str(tree / "stub")}
    subprocess.run(["sh", "scripts/setup"], cwd=tree, env=env, stderr=stderr, check=True)


@pytest.mark.parametrize("on_terminal", [False, True])
def test_setup_says_what_it_does(tmp_path: Path, on_terminal: bool) -> None:
    """Its phases; on a terminal pip is not silent. The second time there is nothing to do."""
    for name in ("scripts", "edge", "native"):
        (tmp_path / name).mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "CMakePresets.json"):
        (tmp_path / name).touch()
    (tmp_path / "edge" / "version.py").touch()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    (tmp_path / "scripts" / "build").write_text("touch edge/_cffi.py edge/libedge.so\n")
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    source, target = os.openpty() if on_terminal else os.pipe()
    set_up(tmp_path, target)
    said = os.read(source, 10_000).decode().split("\n")
    phases = [line.partition(" (")[0] for line in said if line.startswith("setup: ")]
    assert phases == ["setup: packages into .venv", "setup: compiling the native library"]
    assert ("--quiet" in (tmp_path / "asked").read_text()) is not on_terminal
    (path,) = (tmp_path / ".venv").glob("lib/*/site-packages/*.pth")
    assert path.read_text() == "/the/clone\n"  # a hook would come before PYTHONPATH
    set_up(tmp_path, target)
    os.write(target, b"end")
    assert os.read(source, 10_000) == b"end"
    os.close(source)
    os.close(target)
