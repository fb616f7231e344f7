"""The damage that each type would do to each matrix, measured.

Two measurements make a damage. The model runs a text with one matrix at a time in PROBE, and its
output's KL divergence is taken (`edge.quantizer.sensitivity`). And some rows of each matrix are
rounded to every type, as they will be in the file, and the mean square of what that changes in the
matrix's output is taken on inputs that were held back. For small errors the first grows as the
second, so the damage of a type is that of PROBE times the ratio of the two squares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edge.files.gguf import Tensor
from edge.model import load
from edge.progress import Progress
from edge.quantizer.activations import Activations
from edge.quantizer.calibration import Calibration
from edge.quantizer.encode import Encoder, decode
from edge.quantizer.feedback import FeedbackRounder
from edge.quantizer.kept import KeptDamages
from edge.quantizer.moments import HELD_EVERY, Moments, RowMoments, collect, passes
from edge.quantizer.runnable import runnable
from edge.quantizer.sensitivity import EncodedMatrix, damages
from edge.quantizer.source import Floats, RowSlice, identity, read_floats, slices
from edge.quantizer.types import fitting
from edge.version import __version__
from edge.windows import Windows

__all__ = ["CANDIDATES", "PROBE", "DamageMeasurement"]

#: The types that a matrix may get. Each is better than the ones before, or as good and faster; Q4_K
#: stands for Q5_0 where rows are no multiple of 256.
CANDIDATES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    *("IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
)
#: The type in which the damage of a matrix is measured: so coarse that it shows.
PROBE = "Q3_K"
#: Windows that the model runs for each matrix, and the tokens of each.
_WINDOWS, _CONTEXT = 4, 256
#: Rows of a matrix that stand for all, and the fewest of each range that shares moments.
_ROWS, _LEAST_ROWS = 64, 4
#: What a matrix counts in the progress.
_STEPS = 100


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
    """A measurement of a model's matrices. calibration: the model, and the texts that it runs;
    names: the matrices. What was measured before is kept. progress(steps done, all).
    """

    calibration: Calibration
    names: Sequence[str]
    progress: Progress

    def __post_init__(self) -> None:
        self.kept = KeptDamages.of(_key(self.calibration), self.names)
        self._gguf, self._threads = self.calibration.gguf, self.calibration.threads
        self._rounder = FeedbackRounder(self._threads, self.calibration.n_threads)
        self._encoders = dict[str, Encoder]()

    def measure(self) -> None:
        """Round some rows of each matrix to each type, and run the model with each in PROBE, as far
        as it was not done before.

        Raises what `Calibration.running`, `collect`, `FeedbackRounder.round`, `edge.load` and
        `edge.quantizer.sensitivity.damages` raise; what was measured until then is kept.
        """
        names = set(self.names)
        if names <= self.kept.losses.keys() and names <= self.kept.harms.keys():
            return
        try:
            with self.calibration.running() as (activations, windows):
                self._measure_losses(activations, windows)
            self._measure_harms(windows)
        finally:
            self.kept.save(now=True)

    @property
    def damages(self) -> dict[str, dict[str, float]]:
        """Matrix -> type -> the damage that it does, in nats of KL divergence, after `measure`."""
        return {name: self._damages_of(name) for name in self.names}

    def _tell_read(self, n: int, done: int, total: int) -> None:
        """Tell the progress of the moments of n matrices."""
        self._tell(n * done / total)

    def _damages_of(self, name: str) -> dict[str, float]:
        kept = self.kept
        harm, probed, losses = kept.harms[name], kept.probed[name], kept.losses[name]
        return {kind: harm * loss / probed if probed > 0 else 0.0 for kind, loss in losses.items()}

    def _tell(self, n_read: float = 0.0) -> None:
        """Tell the progress, and keep what there is. n_read: matrices of which the moments alone
        are there.
        """
        done = len(self.kept.losses) + len(self.kept.harms) + n_read / 2
        self.progress(int(_STEPS * done), 2 * _STEPS * len(self.names))
        self.kept.save()

    def _encoder(self, type_name: str) -> Encoder:
        if type_name not in self._encoders:
            self._encoders[type_name] = Encoder(type_name)
        return self._encoders[type_name]

    # ---- losses of some rows ----

    def _measure_losses(self, activations: Activations, windows: Windows) -> None:
        missing = [name for name in self.names if name not in self.kept.losses]
        room = self.calibration.room(activations, missing)
        for group in passes(activations, missing, room):
            progress = partial(self._tell_read, len(group))
            moments = collect(activations, windows, group, progress=progress)
            while moments:
                name = next(iter(moments))
                self._measure(self._gguf.tensors[name], moments.pop(name))
                self._tell(len(moments))
        for name in missing:
            if name not in self.kept.losses:  # a table of rows by token: nothing multiplies it
                self._measure(self._gguf.tensors[name], None)
                self._tell()

    def _measure(self, tensor: Tensor, ranges: Sequence[RowMoments] | None) -> None:
        """Round some rows of a matrix to each type. ranges: its moments; None: it has none."""
        k = tensor.shape[-1]
        if ranges is None:
            none = Moments(np.eye(k, dtype=np.float32), np.eye(k, dtype=np.float32), 1, 1)
            ranges = [RowMoments(0, int(np.prod(tensor.shape[:-1])), none)]
        sample = self._sample(tensor, ranges)
        losses = dict[str, float]()
        for kind in dict.fromkeys(fitting(candidate, k) for candidate in CANDIDATES):
            blocks = self._rounder.round(self._encoder(kind), sample.x, sample.ranges).blocks
            losses[kind] = sample.loss(decode(kind, blocks, k, self._threads) - sample.x)
        kind = fitting(PROBE, k)
        probe = self._encoder(kind).encode(sample.x, None, self._threads)
        errors = decode(kind, probe, k, self._threads) - sample.x
        self.kept.probed[tensor.name] = sample.loss(errors)
        self.kept.losses[tensor.name] = losses

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
                x.append(read_floats(tensor, RowSlice(matrix, row, 1), self._threads)[0])
        return _Sample(np.stack(x), sampled, shares)

    # ---- harms ----

    def _measure_harms(self, windows: Windows) -> None:
        missing = [name for name in self.names if name not in self.kept.harms]
        trials = {name: partial(self._trial, name) for name in missing}
        memory, n_threads = self.calibration.memory, self.calibration.n_threads
        with (
            runnable(self._gguf, self._threads) as path,
            load(path, context=_CONTEXT, threads=n_threads, memory=memory) as model,
        ):
            for name, harm in damages(model, _probes(windows), trials):
                self.kept.harms[name] = harm
                self._tell()

    def _trial(self, name: str) -> EncodedMatrix:
        """A whole matrix in PROBE, rounded to the nearest."""
        tensor = self._gguf.tensors[name]
        encoder = self._encoder(fitting(PROBE, tensor.shape[-1]))
        rows = [
            encoder.encode(read_floats(tensor, some, self._threads), None, self._threads)
            for some in slices(tensor)
        ]
        self._gguf.forget()
        return EncodedMatrix(encoder.type_name, np.concatenate(rows))


def _key(calibration: Calibration) -> str:
    """A digest of all that damages depend on."""
    how = [CANDIDATES, PROBE, _WINDOWS, _CONTEXT, _ROWS, _LEAST_ROWS, __version__]
    facts = [identity(calibration.gguf), calibration.digests, how]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _probes(windows: Windows) -> Windows:
    """Starts of windows that are held back from rounding, evenly spread over the text."""
    held = windows.tokens[HELD_EVERY - 1 :: HELD_EVERY] or windows.tokens
    context = min(_CONTEXT, windows.context)
    chosen = [held[i * len(held) // _WINDOWS] for i in range(min(_WINDOWS, len(held)))]
    return Windows(tuple(window[:context] for window in chosen), context)
