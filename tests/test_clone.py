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
