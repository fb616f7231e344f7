"""Compiling ahead of time: on any x86 machine, for the SoC of a device.

In a process of its own for each SoC: QNN's compiler keeps the first architecture of a process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from edge.errors import EdgeError, UnsupportedError
from edge.onnx.files.folder import Static, open_folder
from edge.onnx.providers import compiled, providers
from edge.onnx.run.engine import fingerprint_of

__all__ = ["compile_for", "require_compiler"]

_SAID = "edge: "


def require_compiler(soc: str) -> None:
    """Raise InputError for a SoC that is not known, UnsupportedError unless qnn is here."""
    providers.choose("qnn", "qnn", threads=1, soc=soc)


def compile_for(folder: str | os.PathLike[str], soc: str) -> Path:
    """Compile an exported model of dialect npu for a SoC, into `FOLDER/compiled/SOC`: returns it.

    Both graphs come into one binary and share their weights. What was there before is replaced
    when all has gone well. Raises InputError for a SoC that is not known, ModelFileError for a
    folder that is no such model, UnsupportedError where qnn is not here or does not take all of it.
    """
    require_compiler(soc)
    source = os.fspath(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        [sys.executable, "-m", __name__, os.fsdecode(folder), soc],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    if child.returncode:
        lines = child.stderr.decode("utf-8", "replace").splitlines() or [""]
        said = [line[len(_SAID) :] for line in lines if line.startswith(_SAID)]
        why = said[-1] if said else f"the compiler left with code {child.returncode}: {lines[-1]}"
        raise UnsupportedError(f"cannot be compiled for {soc}: {why}", what=soc)
    return Path(os.fsdecode(folder)) / compiled.AHEAD / soc


def _compile(path: str, soc: str) -> None:
    """What the process does."""
    folder = open_folder(path)
    if not isinstance(folder, Static):
        raise UnsupportedError(
            f"{path} has graphs of any length, which no NPU takes: export it with --dialect npu",
            what="dialect",
        )
    target = providers.choose("qnn", folder.made_for, threads=1, soc=soc)
    key = fingerprint_of(folder)
    graphs = {name: folder.graphs[name] for name in ("chunk", "token")}
    place = folder.path / compiled.AHEAD / soc
    made = place.with_name(f"{soc}.new")
    shutil.rmtree(made, ignore_errors=True)
    compiled.compile_into(made, graphs, target, compiled.identity(graphs, target, key), share=True)
    shutil.rmtree(place, ignore_errors=True)
    made.rename(place)


if __name__ == "__main__":
    try:
        _compile(*sys.argv[1:])
    except EdgeError as error:
        sys.exit(f"{_SAID}{' '.join(str(error).split())}")
