"""Exports a GGUF file to a folder of ONNX graphs, in one of two dialects.

Both dialects read the graph that the native plan reads, so an architecture needs no code here. The
folder appears when it is complete: an export that fails or is interrupted leaves no files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from edge import check, models
from edge.disk.atomic import sync_folder
from edge.errors import InputError, ModelFileError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import Op
from edge.onnx.export import config as beside
from edge.onnx.export import cpu, npu
from edge.onnx.export.ahead import compile_for, require_compiler
from edge.onnx.export.writer import onnx
from edge.onnx.providers.compiled import AHEAD
from edge.progress import Progress
from edge.weights.model_file import open_model

__all__ = ["Dialect", "Recipe", "export"]

Dialect = Literal["cpu", "npu"]
#: All files of an export. A folder that has only these may be replaced.
_FILES = {
    *(cpu.GRAPH, cpu.DATA, beside.GENAI),
    *(*npu.GRAPHS, npu.DATA, npu.CONFIG),
    *beside.TOKENIZER_FILES,
    AHEAD,
}
#: A folder with one of these files is an export.
_MARKS = {beside.GENAI, npu.CONFIG}


@dataclass(frozen=True)
class Recipe:
    """The options of an export. None: the default of the dialect, or of the provider.

    context: the most positions of a session, None: as in `edge.load`.
    Only for dialect npu: ep: the provider that runs the graphs. chunk: tokens of a prompt that are
    run at once. weights: their form. calibration: a file of text. socs: SoCs to compile for ahead
    of time.
    """

    dialect: Dialect
    context: int | None = None
    ep: str | None = None
    chunk: int | None = None
    weights: str | None = None
    calibration: str | None = None
    socs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check.choice("dialect", self.dialect, get_args(Dialect))
        check.optional(check.whole, "context", self.context, 1)
        if self.dialect == "cpu":
            for field in fields(self)[2:]:
                if getattr(self, field.name) is not None:
                    raise InputError(f"{field.name} is for dialect npu alone")
            return
        provider = self.npu_options().provider
        if self.socs and provider != "qnn":
            raise InputError(f"soc {self.socs[0]} is for qnn, this is made for {provider}")
        for soc in self.socs or ():
            require_compiler(soc)

    def npu_options(self) -> npu.NpuOptions:
        """The options of dialect npu. Raises InputError."""
        options: dict[str, Any] = {
            "provider": self.ep,
            "weights": self.weights,
            "chunk": self.chunk,
            "calibration": self.calibration,
        }
        return npu.NpuOptions(**{key: value for key, value in options.items() if value is not None})


def export(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    recipe: Recipe,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a GGUF file to a folder, which must be new or empty.

    force: replace the folder of an earlier export. progress(bytes of weights done, in all).
    Returns facts as JSON values: dialect, architecture, context; bytes: of all files; files: bytes
    by name.

    Raises InputError for a packed file, or a folder that must not be replaced; ModelFileError for a
    damaged file, and if the folder cannot be written; ContextError for a context beyond the
    model's; UnsupportedError for a model that the dialect cannot express, if the package onnx is
    not installed, and if a SoC's compiler does not work here or refuses the model.
    """
    onnx()
    with open_model(path) as opened:
        model = opened.unpacked(": export its source")
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        graph, config = models.build(
            model.metadata, shapes, context=recipe.context, path=model.path
        )
        with _replacing(Path(os.fsdecode(folder)), force) as scratch:
            vocabulary = beside.write_tokenizer(model, config, scratch)
            model.metadata.forget()
            on_op = _Meter(model, graph, progress)
            if recipe.dialect == "cpu":
                beside.write_genai(graph, config, vocabulary, scratch, cpu.GRAPH)
                cpu.write(model, graph, config, scratch, on_op)
            else:
                npu.write(model, graph, config, scratch, recipe.npu_options(), on_op)
            for soc in recipe.socs or ():
                compile_for(scratch, soc)
            files = {
                file.relative_to(scratch).as_posix(): file.stat().st_size
                for file in sorted(scratch.rglob("*"))
                if file.is_file()
            }
    return {
        "dialect": recipe.dialect,
        "architecture": config.architecture,
        "context": config.n_context,
        "bytes": sum(files.values()),
        "files": files,
    }


class _Meter:
    """Called after each op: reports the bytes of the model's weights that were written."""

    def __init__(self, model: GGUF, graph: Graph, progress: Progress | None) -> None:
        self._left = {name: model.tensors[name].n_bytes for name in graph.weights}
        self._total, self._progress = sum(self._left.values()), progress

    def __call__(self, op: Op) -> None:
        for name in op.weights:
            self._left.pop(name, None)
        if self._progress:
            self._progress(self._total - sum(self._left.values()), self._total)


@contextlib.contextmanager
def _replacing(folder: Path, force: bool) -> Iterator[Path]:
    """A scratch folder beside `folder`. It replaces `folder` if the block succeeds, else it is
    removed.

    Raises InputError if `folder` must not be replaced, ModelFileError if it cannot be written.
    """
    folder = folder.resolve()
    _check_place(folder, force)
    scratch, old = (folder.with_name(f".{folder.name}-{secrets.token_hex(8)}") for _ in range(2))
    try:
        scratch.mkdir()
        yield scratch
        for file in filter(Path.is_file, scratch.iterdir()):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(scratch)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(old)
        scratch.rename(folder)
        sync_folder(folder.parent)
    except OSError as e:
        raise ModelFileError(f"cannot be written: {e.strerror or e}", path=folder) from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(folder)


def _check_place(folder: Path, force: bool) -> None:
    """Raise InputError unless the folder is new or empty, or an export that `force` replaces."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is there already, and no folder: name another one")
    names = set(os.listdir(folder))
    if not names:
        return
    if not names & _MARKS or names - _FILES:
        raise InputError(f"{folder} is not empty, and no export: name another folder")
    if not force:
        raise InputError(f"{folder} holds an export already: --force replaces it")
