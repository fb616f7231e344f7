"""The texts that a model runs while it is quantised, and the memory for their moments."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edge.files.text_file import TextFile
from edge.native import CData
from edge.quantizer.activations import Activations
from edge.quantizer.imatrix import CONTEXT
from edge.quantizer.runnable import runnable
from edge.weights.model_file import RawModel
from edge.windows import Windows

__all__ = ["Calibration", "digest"]

#: Bytes that rounding with feedback needs for each weight of a matrix: as a float, twice.
_BYTES_OF_WEIGHT = 8
#: Bytes for each second moment while they are factored: twice as float64, thrice as float32.
_BYTES_OF_FACTOR = 28


@dataclass(frozen=True)
class Calibration:
    """Texts for a model. gguf: its file; texts: paths of UTF-8 files; threads: of
    `edge.native.new_threads`; n_threads, memory: see `edge.load`.
    """

    gguf: RawModel
    texts: Sequence[str]
    threads: CData
    n_threads: int
    memory: int | None = None

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each text, in hex. Raises OSError."""
        return [digest(text) for text in self.texts]

    @contextmanager
    def running(self) -> Iterator[tuple[Activations, Windows]]:
        """The model, ready to run, and the windows of the texts. Raises what `runnable` and
        `Activations.open` raise, and InputError for a text that cannot be read.
        """
        files = [TextFile.open(text) for text in self.texts]
        with (
            runnable(self.gguf, self.threads) as path,
            Activations.open(
                path, context=self._context, threads=self.n_threads, memory=self.memory
            ) as activations,
        ):
            yield activations, activations.cut(activations.read(files))

    def room(self, activations: Activations, names: Sequence[str]) -> int | None:
        """Bytes for second moments, beside any of these matrices and what rounding it needs; None:
        any number.
        """
        shapes = [self.gguf.tensors[name].shape for name in names]
        weights = max((math.prod(shape) for shape in shapes), default=0)
        factor = max((shape[-1] ** 2 for shape in shapes), default=0)
        needed = _BYTES_OF_WEIGHT * weights + _BYTES_OF_FACTOR * factor
        return None if activations.room is None else max(0, activations.room - needed)

    @property
    def _context(self) -> int:
        """Tokens of a window."""
        architecture = self.gguf.metadata.get("general.architecture")
        most = self.gguf.metadata.get(f"{architecture}.context_length")
        return min(CONTEXT, most) if type(most) is int else CONTEXT


def digest(path: str) -> str:
    """SHA-256 of a file, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()
