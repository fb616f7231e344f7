"""The damage that each type would do to each matrix, measured.

Two measurements make a damage. The model runs a text with one matrix at a time in PROBE, and its
output's KL divergence is taken (`edge.quantizer.sensitivity`). And some rows of each matrix are
rounded to every type, as they will be in the file, and the mean square of what that changes in the
matrix's output is taken on inputs that were held back. For small errors the first grows as the
second, so the damage of a type is that of PROBE times the ratio of the two squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge.files.gguf import Tensor
from edge.model import load
from edge.native import CData
from edge.perplexity import Windows
from edge.progress import Progress
from edge.quantizer.activations import Activations
from edge.quantizer.encode import IMPORTANCE_TYPES, Encoder, decode
from edge.quantizer.feedback import FeedbackRounder
from edge.quantizer.moments import HELD_EVERY, Moments, RowMoments, collect, passes
from edge.quantizer.runnable import runnable
from edge.quantizer.sensitivity import EncodedMatrix, damages
from edge.quantizer.source import Floats, RowSlice, read_floats, slices
from edge.quantizer.types import fitting
from edge.weights.model_file import RawModel

__all__ = ["CANDIDATES", "PROBE", "DamageMeasurement"]

#: The types that a matrix may get. Each is better than the ones before, or as good and faster.
CANDIDATES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_XS", "IQ4_NL", "Q5_K", "Q6_K", "Q8_0"),
)
#: The type in which the damage of a matrix is measured: so coarse that it shows.
PROBE = "Q3_K"
#: Windows that the model runs for each matrix, and the tokens of each.
_WINDOWS, _CONTEXT = 4, 256
#: Rows of a matrix that stand for all, and the fewest of each range that shares moments.
_ROWS, _LEAST_ROWS = 64, 4


@dataclass(frozen=True)
class _Sample:
    """Some rows of a matrix. x: (n, k); ranges: of these rows, in order; shares: for each range,
    how many rows of the matrix stand behind one of the sample.
    """

    x: Floats
    ranges: Sequence[RowMoments]
    shares: Sequence[float]

    def loss(self, errors: Floats) -> float:
        """The mean square of what errors, (n, k), change in the output of the whole matrix."""
        total = 0.0
        for part, share in zip(self.ranges, self.shares, strict=True):
            some, own = errors[part.first : part.first + part.n_rows], part.moments
            judges, n = (own.held, own.n_held) if own.n_held else (own.train, own.n_train)
            square = np.einsum("ij,ij->", some @ judges, some, dtype=np.float64)
            total += share * float(square) / max(1, n)
        return total


@dataclass
class DamageMeasurement:
    """A measurement of a model's matrices. gguf: its file; names: the matrices; threads: of
    `edge.native.new_threads`; n_threads: how many. progress(matrices measured, all), each twice.
    """

    gguf: RawModel
    names: Sequence[str]
    threads: CData
    n_threads: int
    progress: Progress
    _losses: dict[str, dict[str, float]] = field(default_factory=dict)
    _probed: dict[str, float] = field(default_factory=dict)
    _importance: dict[str, Floats | None] = field(default_factory=dict)
    _encoders: dict[str, Encoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rounder = FeedbackRounder(self.threads, self.n_threads)

    def measure_losses(
        self, activations: Activations, windows: Windows, most_bytes: int | None
    ) -> None:
        """Round some rows of each matrix to each type. activations, windows: the model, open, and
        the text that it runs; most_bytes: of second moments at a time.

        Raises what `collect` and `FeedbackRounder.round` raise.
        """
        for group in passes(activations, self.names, most_bytes):
            moments = collect(activations, windows, group)
            for name in group:
                self._measure(self.gguf.tensors[name], moments.pop(name))
        for name in self.names:
            if name not in self._losses:  # a table of rows by token: nothing multiplies it
                self._measure(self.gguf.tensors[name], None)

    def damages(self, windows: Windows) -> dict[str, dict[str, float]]:
        """Matrix -> type -> the damage that it does, in nats of KL divergence, after
        `measure_losses`. windows: parts of them are run. Raises what `edge.load` and
        `edge.quantizer.sensitivity.damages` raise.
        """
        with (
            runnable(self.gguf, self.threads) as path,
            load(path, context=_CONTEXT, threads=self.n_threads) as model,
        ):
            trials = {name: partial(self._trial, name) for name in self.names}
            harms = damages(model, _probes(windows), trials, progress=self._second)
        return {name: self._damages_of(name, harms[name]) for name in self.names}

    def _second(self, done: int, total: int) -> None:
        self.progress(total + done, 2 * total)

    def _damages_of(self, name: str, harm: float) -> dict[str, float]:
        """harm: the damage that PROBE does."""
        probed, losses = self._probed[name], self._losses[name]
        return {kind: harm * loss / probed if probed > 0 else 0.0 for kind, loss in losses.items()}

    def _encoder(self, type_name: str) -> Encoder:
        if type_name not in self._encoders:
            self._encoders[type_name] = Encoder(type_name)
        return self._encoders[type_name]

    # ---- losses of some rows ----

    def _measure(self, tensor: Tensor, ranges: Sequence[RowMoments] | None) -> None:
        """Round some rows of a matrix to each type. ranges: its moments; None: it has none."""
        k = tensor.shape[-1]
        if ranges is None:
            none = Moments(np.eye(k, dtype=np.float32), np.eye(k, dtype=np.float32), 1, 1)
            ranges = [RowMoments(0, int(np.prod(tensor.shape[:-1])), none)]
            self._importance[tensor.name] = None
        else:
            self._importance[tensor.name] = _importance(ranges)
        sample = self._sample(tensor, ranges)
        losses = dict[str, float]()
        for kind in dict.fromkeys(fitting(candidate, k) for candidate in CANDIDATES):
            blocks = self._rounder.round(self._encoder(kind), sample.x, sample.ranges).blocks
            losses[kind] = sample.loss(decode(kind, blocks, k, self.threads) - sample.x)
        self._losses[tensor.name] = losses
        kind = fitting(PROBE, k)
        nearest = self._nearest(tensor.name, sample.x, kind)
        self._probed[tensor.name] = sample.loss(decode(kind, nearest, k, self.threads) - sample.x)
        self.progress(len(self._losses), 2 * len(self.names))

    def _sample(self, tensor: Tensor, ranges: Sequence[RowMoments]) -> _Sample:
        """Rows of a matrix, evenly spread over each range."""
        total, n = sum(part.n_rows for part in ranges), tensor.shape[-2]
        x, sampled, shares = list[Floats](), list[RowMoments](), list[float]()
        for part in ranges:
            count = min(part.n_rows, max(_LEAST_ROWS, _ROWS * part.n_rows // total))
            sampled.append(RowMoments(len(x), count, part.moments))
            shares.append(part.n_rows / count)
            for i in range(count):
                matrix, row = divmod(part.first + i * part.n_rows // count, n)
                x.append(read_floats(tensor, RowSlice(matrix, row, 1), self.threads)[0])
        return _Sample(np.stack(x), sampled, shares)

    def _nearest(self, name: str, x: Floats, kind: str) -> NDArray[np.uint8]:
        """The blocks of some rows of a matrix, each rounded to the nearest."""
        importance = self._importance[name]
        if importance is None and kind in IMPORTANCE_TYPES:
            importance = np.ones(x.shape[1], np.float32)
        return self._encoder(kind).encode(x, importance, self.threads)

    def _trial(self, name: str) -> EncodedMatrix:
        """A whole matrix in PROBE."""
        tensor = self.gguf.tensors[name]
        kind = fitting(PROBE, tensor.shape[-1])
        rows = [
            self._nearest(name, read_floats(tensor, some, self.threads), kind)
            for some in slices(tensor)
        ]
        self.gguf.forget()
        return EncodedMatrix(kind, np.concatenate(rows))


def _importance(ranges: Sequence[RowMoments]) -> Floats:
    """The mean squares of a matrix's inputs, (k,): the mean over its rows."""
    total = sum(part.n_rows for part in ranges)
    mean = np.zeros(len(ranges[0].moments.train), np.float32)
    for part in ranges:
        share = part.n_rows / total / max(1, part.moments.n_train)
        mean += np.diagonal(part.moments.train) * np.float32(share)
    return mean


def _probes(windows: Windows) -> Windows:
    """Starts of windows that are held back from rounding, evenly spread over the text."""
    held = windows.tokens[HELD_EVERY - 1 :: HELD_EVERY] or windows.tokens
    context = min(_CONTEXT, windows.context)
    chosen = [held[i * len(held) // _WINDOWS] for i in range(min(_WINDOWS, len(held)))]
    return Windows(tuple(window[:context] for window in chosen), context)
