"""What the emulated boards run: our programs and wheels, built and installed here for them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from machines import BOARDS, ROOT, Land

import edge

#: manylinux tags that the C libraries of the user lands satisfy.
_TAGS = ("2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34")


def build(*command: str | Path) -> None:
    """Run a build step with this environment's tools on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PATH": path}
    )
    assert run.returncode == 0, f"{command}:\n{run.stdout}{run.stderr}"


def wheel_for(platform: str) -> Path:
    """The wheel of this version whose platform tag this pattern matches."""
    found = list((ROOT / "dist").glob(f"edge_run-{edge.__version__}-py3-none-{platform}.whl"))
    assert len(found) == 1, f"{found or 'no wheel'} for {platform} in dist: run scripts/boards"
    return found[0]


def pip_install(folder: Path, python: str, platforms: Sequence[str], *what: str | Path) -> None:
    """Have this machine's pip install into a folder as if it were that of another."""
    build(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--target", folder, "--only-binary=:all:", "--implementation=cp"),
        *(f"--python-version={python}", *(f"--platform={p}" for p in platforms), *what),
    )


def site_packages(land: Land) -> Path:
    """A folder with our wheel and what it needs, kept as long as the wheel is the same."""
    wheel = wheel_for(f"manylinux*_{land.wheels}")
    key = hashlib.sha256(wheel.read_bytes()).hexdigest()[:16]
    folder = BOARDS / f"{land.name}-site-{key}"
    if folder.exists():
        return folder
    for old in BOARDS.glob(f"{land.name}-site-*"):
        shutil.rmtree(old)
    platforms = [f"manylinux_{tag}_{land.wheels}" for tag in _TAGS]
    platforms.append(f"manylinux2014_{land.wheels}")
    needs = ("--no-deps", "click>=8.1", "jinja2>=3.1.6", "markupsafe", "tokenizers>=0.20")
    new = folder.with_name(f"{land.name}-site-new")
    pip_install(new, land.python, platforms, wheel, *(needs if land.has_numpy else ()))
    new.rename(folder)
    return folder
