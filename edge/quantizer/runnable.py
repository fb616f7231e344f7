"""The model that runs texts while it is quantised: one of floats runs as a copy in Q8_0.

Products with Q8_0 are two to three times as fast as those with floats, and the copy takes half of
the memory. What the matrices read then changes little: of Qwen2.5-Coder-0.5B from F16 the mean
square of a column by 0.3 % in the median, and of 99 in 100 columns by 3 % at most (1,024 tokens).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from edge.disk.own import make_folder
from edge.disk.room import cache_dir, sweep
from edge.files import gguf_writer
from edge.files.gguf import Tensor
from edge.native import CData
from edge.quantizer.encode import Encoder
from edge.quantizer.source import read_floats, read_raw, slices
from edge.quantizer.types import FLOATS, ModelTensors, fitting
from edge.quantizer.writer import OutputPlan, writing
from edge.weights.model_file import RawModel

__all__ = ["runnable"]

_TYPE, _SCRATCH = "Q8_0", ".running-"


@contextlib.contextmanager
def runnable(gguf: RawModel, threads: CData) -> Iterator[str]:
    """The path of the model itself, or of a copy that is removed at the end: it is in the cache
    folder, and takes 8.5 bits for each weight.

    threads: of `edge.native.new_threads`. Raises ModelFileError for a weight that is NaN or
    infinite, and where there is no room for the copy; OSError.
    """
    matrices = [t for t in ModelTensors.of(gguf).matrices if t.type in FLOATS]
    if not matrices:
        yield gguf.path
        return
    folder = cache_dir()
    make_folder(folder)
    sweep(folder, _SCRATCH, False, partial(shutil.rmtree, ignore_errors=True))
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
        path = Path(scratch) / Path(gguf.path).name
        _write(gguf, path, {t.name: fitting(_TYPE, t.shape[-1]) for t in matrices}, threads)
        yield str(path)


def _write(gguf: RawModel, path: Path, types: dict[str, str], threads: CData) -> None:
    """Write a copy with some matrices in other types."""
    tensors = gguf.tensors.values()
    entries = gguf_writer.copied(
        gguf.metadata, gguf.headers()[0], lambda key: not key.startswith("split.")
    )
    kinds = {t.name: (types.get(t.name, t.type), t.shape) for t in tensors}
    encoders = {kind: Encoder(kind) for kind in set(types.values())}
    with writing(path, OutputPlan.of(entries, kinds, gguf.alignment), "") as output:
        for tensor in tensors:
            encoder = encoders[types[tensor.name]] if tensor.name in types else None
            output.write(tensor.name, _pieces(gguf, tensor, encoder, threads))
    gguf.forget()


def _pieces(
    gguf: RawModel, tensor: Tensor, encoder: Encoder | None, threads: CData
) -> Iterator[memoryview]:
    """The bytes of a tensor in the copy. encoder: None: they stay as they are."""
    for rows in slices(tensor):
        if encoder is None:
            yield read_raw(tensor, rows)
        else:
            yield encoder.encode(read_floats(tensor, rows, threads), None, threads).data.cast("B")
        gguf.forget()
