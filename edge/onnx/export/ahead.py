"""Compiles graphs ahead of time, on any x86 machine, for the SoC of a device.

Each SoC has a process of its own, because QNN's compiler keeps the first architecture of a process.
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

_PREFIX = "edge: "  # of the process's error message


def require_compiler(soc: str) -> None:
    """Raise InputError for an unknown SoC, UnsupportedError unless qnn works here."""
    providers.choose("qnn", "qnn", threads=1, soc=soc)


def compile_for(folder: str | os.PathLike[str], soc: str) -> Path:
    """Compile an exported model of dialect npu for a SoC, into `FOLDER/compiled/SOC`.

    Returns that folder. Both graphs are in one binary, and share their weights. An earlier folder
    is replaced at the end. Raises InputError for an unknown SoC, ModelFileError for a folder
    without a model, UnsupportedError if qnn does not work here or cannot run the whole model.
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
        messages = [line[len(_PREFIX) :] for line in lines if line.startswith(_PREFIX)]
        why = (
            messages[-1]
            if messages
            else f"the compiler left with code {child.returncode}: {lines[-1]}"
        )
        raise UnsupportedError(f"cannot be compiled for {soc}: {why}", what=soc)
    return Path(os.fsdecode(folder)) / compiled.AHEAD / soc


def _compile(path: str, soc: str) -> None:
    """Compile a folder's graphs in this process."""
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
    new = place.with_name(f"{soc}.new")
    shutil.rmtree(new, ignore_errors=True)
    compiled.compile_into(new, graphs, target, compiled.identity(graphs, target, key), share=True)
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)


if __name__ == "__main__":
    try:
        _compile(*sys.argv[1:])
    except EdgeError as error:
        sys.exit(f"{_PREFIX}{' '.join(str(error).split())}")
