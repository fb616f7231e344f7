"""Rounding with error feedback: weights as blocks of a type, such that the outputs stay close.

    rounded = FeedbackRounder(threads).round(Encoder("Q4_0"), weights, moments)

Columns are rounded from left to right, and each error is passed on to the columns that come later:
GPTQ (Frantar et al. 2022), in the form of LDLQ (Chee et al. 2023). H, the second moments of the
inputs, is damped and cut into R R^T, R upper triangular. An error e of a row then costs |e R|^2;
column j of e R vanishes when the sum of e[i] R[i, j] / R[j, j] over i < j is added to weight j
before it is rounded. `native/feedback.c` rounds a tile of columns; what a tile leaves to all later
columns is a product of matrices, here.

The bits are the same for any number of threads: rows are cut in the same places always. They are
not the same on every machine, since the products of BLAS are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from edge import native
from edge.errors import InputError
from edge.native import CData, ffi, lib
from edge.quantizer.encode import IMPORTANCE_TYPES, Encoder, decode, row_bytes
from edge.quantizer.moments import Moments, RowMoments

__all__ = ["FeedbackRounder", "RangeLoss", "Rounded"]

Floats = NDArray[np.float32]
T = TypeVar("T")

#: What is added to the diagonal of H, as a share of its median: few columns may have nearly all of
#: the mean. Where H is not positive definite even so, ten times as much is tried, and once more.
DAMPING = 0.1
_TRIES = 3
#: Columns that the native library rounds at a time; rows of a product of matrices; rows whose
#: copies are in memory at a time.
_TILE, _SLICE, _ROWS = 256, 128, 4096


@dataclass(frozen=True)
class RangeLoss:
    """How rows that share moments came out, judged on the inputs that were held back; where there
    are none, on the others.

    feedback, nearest: the mean square error of the outputs, summed over the rows, when rounded with
    feedback, and to the nearest with an importance. is_nearest: the blocks are the latter, because
    they are better or because there are no moments.
    """

    first: int
    n_rows: int
    feedback: float
    nearest: float
    is_nearest: bool


@dataclass(frozen=True)
class Rounded:
    """blocks: (n, bytes of a row) uint8; ranges: how each range of rows came out."""

    blocks: NDArray[np.uint8]
    ranges: list[RangeLoss]


@dataclass(frozen=True)
class _Factor:
    """H = R R^T. shares: R[i, j] / R[j, j]; costs: R[j, j]^2; importance: the diagonal of H, of
    one token.
    """

    shares: Floats
    costs: Floats
    importance: Floats


class FeedbackRounder:
    """Rounds weights with error feedback.

    Factors of the moments of the last weights are kept: weights that share moments, one after the
    other, and the same weights in several types need them once. threads: of
    `edge.native.new_threads`; n_threads: of the products of matrices.
    """

    def __init__(self, threads: CData, n_threads: int = 1) -> None:
        self.threads = threads
        self._n_threads = n_threads
        self._factors: list[tuple[Moments, _Factor | None]] = []

    def round(self, encoder: Encoder, weights: Floats, moments: Sequence[RowMoments]) -> Rounded:
        """The blocks of weights, (n, k), whose rows have these moments, in order and without a gap.

        Rows for which feedback is worse on `Moments.held` than rounding to the nearest are rounded
        to the nearest. Raises InputError for a weight or moments that are NaN or infinite, for
        moments of other rows or columns, and what `Encoder.encode` raises.
        """
        _require_ranges(weights, moments)
        n, k = weights.shape
        blocks = np.empty((n, row_bytes(encoder.type_name, k)), np.uint8)
        ranges = []
        used = {id(part.moments) for part in moments}
        self._factors = [pair for pair in self._factors if id(pair[0]) in used]
        # numpy's own threads beside those of the pool would wait for each other
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(self._n_threads) as pool:
            for part in moments:
                rows = slice(part.first, part.first + part.n_rows)
                factor = self._factor_of(part.moments)
                job = _Range(encoder, weights[rows], part.moments, factor, self.threads, pool)
                feedback, nearest, is_nearest = job.round_into(blocks[rows])
                ranges.append(RangeLoss(part.first, part.n_rows, feedback, nearest, is_nearest))
        return Rounded(blocks, ranges)

    def _factor_of(self, moments: Moments) -> _Factor | None:
        for known, factor in self._factors:
            if known is moments:
                return factor
        with threadpool_limits(self._n_threads, "blas"):
            self._factors.append((moments, _factor(moments)))
        return self._factors[-1][1]


def _require_ranges(weights: Floats, moments: Sequence[RowMoments]) -> None:
    """Raise InputError for weights or moments that are not finite or do not fit each other."""
    if weights.ndim != 2:
        raise InputError(f"weights of shape {weights.shape} are no matrix")
    n, k = weights.shape
    for rows in _slices(n, _ROWS):
        bad = np.argwhere(~np.isfinite(weights[rows]))
        if len(bad):
            row, column = bad[0]
            value = weights[rows.start + row, column]
            raise InputError(f"the weight in row {rows.start + row}, column {column} is {value}")
    end = 0
    for part in moments:
        if part.first != end or part.n_rows < 1:
            raise InputError(f"moments of {part.n_rows} rows from {part.first} on, after row {end}")
        end += part.n_rows
        for square in (part.moments.train, part.moments.held):
            if square.shape != (k, k):
                raise InputError(f"moments of shape {square.shape} for rows of {k} weights")
            if not np.isfinite(square).all():
                raise InputError(f"the moments of rows {part.first} to {end - 1} hold NaN")
    if end != n:
        raise InputError(f"moments of {end} rows for weights of {n} rows")


def _factor(moments: Moments) -> _Factor | None:
    """None: these moments cannot be used, as those of an expert that no token reached."""
    diagonal = np.diagonal(moments.train).astype(np.float64)
    reached = diagonal[diagonal > 0]
    if not reached.size:
        return None
    damping = DAMPING * float(np.median(reached))
    for i in range(_TRIES):
        damped = moments.train.astype(np.float64)
        damped.flat[:: len(damped) + 1] += damping * 10**i
        importance = (damped.diagonal() / max(moments.n_train, 1)).astype(np.float32)
        try:  # a lower factor of H backwards, backwards, is an upper one
            upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
        del damped
        root = upper.diagonal()
        return _Factor((upper / root).astype(np.float32), (root**2).astype(np.float32), importance)
    return None


@dataclass(frozen=True)
class _Range:
    """Rows that share moments."""

    encoder: Encoder
    weights: Floats
    moments: Moments
    factor: _Factor | None
    threads: CData
    pool: ThreadPoolExecutor

    def round_into(self, blocks: NDArray[np.uint8]) -> tuple[float, float, bool]:
        """Fill blocks. Returns the losses with feedback and to the nearest, and whether the blocks
        are the latter."""
        nearest_blocks = np.empty_like(blocks)
        feedback = nearest = 0.0
        for rows in _slices(len(self.weights), _ROWS):
            weights = np.ascontiguousarray(self.weights[rows], np.float32)
            nearest_blocks[rows] = self._nearest(weights)
            nearest += self._loss(weights - self._decoded(nearest_blocks[rows]))
            if self.factor is not None:
                feedback += self._loss(self._with_feedback(weights, self.factor, blocks[rows]))
        is_nearest = self.factor is None or feedback > nearest
        if is_nearest:
            blocks[:] = nearest_blocks
        return (nearest if self.factor is None else feedback), nearest, is_nearest

    def _nearest(self, weights: Floats) -> NDArray[np.uint8]:
        importance = np.diagonal(self.moments.train)
        if importance.any():
            importance = importance / np.float32(max(self.moments.n_train, 1))
            return self.encoder.encode(weights, importance, self.threads)
        needs = self.encoder.type_name in IMPORTANCE_TYPES
        ones = np.ones(weights.shape[1], np.float32) if needs else None
        return self.encoder.encode(weights, ones, self.threads)

    def _decoded(self, blocks: NDArray[np.uint8]) -> Floats:
        return decode(self.encoder.type_name, blocks, self.weights.shape[1], self.threads)

    def _with_feedback(self, weights: Floats, factor: _Factor, blocks: NDArray[np.uint8]) -> Floats:
        """Round rows into their blocks. Returns the errors, weights - values."""
        x, k = weights.copy(), weights.shape[1]
        squares: Floats = np.einsum("ij,ij->i", weights, weights) / np.float32(k)
        for first in range(0, k, _TILE):
            end = min(first + _TILE, k)
            tile = self._round_tile(slice(first, end), weights, x, factor, squares)
            at = 0 if first == 0 else row_bytes(self.encoder.type_name, first)
            blocks[:, at : at + tile.shape[1]] = tile
            if end < k:
                self._pass_on(x, factor.shares, first, end)
        return x

    def _pass_on(self, x: Floats, shares: Floats, first: int, end: int) -> None:
        """Add the errors of columns first to end - 1 of x to the columns after them."""

        def to_rows(rows: slice) -> None:
            x[rows, end:] += x[rows, first:end] @ shares[first:end, end:]

        self._over_rows(to_rows, len(x))

    def _round_tile(
        self,
        columns: slice,
        weights: Floats,
        x: Floats,
        factor: _Factor,
        squares: Floats,
    ) -> NDArray[np.uint8]:
        """Round some columns of x, which become their errors. Returns their blocks."""
        n, width = len(x), columns.stop - columns.start
        blocks = np.empty((n, row_bytes(self.encoder.type_name, width)), np.uint8)
        tile = {
            "weights": np.ascontiguousarray(weights[:, columns]),
            "x": np.ascontiguousarray(x[:, columns]),
            "shares": np.ascontiguousarray(factor.shares[columns, columns].T),
            "costs": factor.costs[columns].copy(),
            "importance": factor.importance[columns].copy(),
            "row_squares": squares,
        }
        pointers = {name: ffi.from_buffer("float[]", array) for name, array in tile.items()}
        native_tile = ffi.new("edge_feedback *", {"n": n, "width": width, **pointers})
        error = ffi.new("edge_error *")
        status = lib.edge_encode_feedback(
            self.threads,
            self.encoder.handle,
            native_tile,
            ffi.from_buffer("uint8_t[]", blocks),
            blocks.nbytes,
            error,
        )
        if status == lib.EDGE_BAD_DATA:
            column = columns.start + int(error.column)
            raise InputError(
                f"{self.encoder.type_name} cannot hold what error feedback makes of the weights "
                f"from column {column} on"
            )
        native.check(status, error)
        x[:, columns] = tile["x"]
        return blocks

    def _loss(self, errors: Floats) -> float:
        """The mean square error of the outputs on the inputs that judge, summed over the rows."""
        judges, n = self.moments.held, self.moments.n_held
        if n == 0:
            judges, n = self.moments.train, self.moments.n_train

        def of(rows: slice) -> float:
            part = errors[rows]
            return float(np.einsum("ij,ij->", part @ judges, part, dtype=np.float64))

        return sum(self._over_rows(of, len(errors))) / max(n, 1)

    def _over_rows(self, task: Callable[[slice], T], n: int) -> list[T]:
        """The results of task on slices of n rows, computed at the same time."""
        return list(self.pool.map(task, _slices(n, _SLICE)))


def _slices(n: int, size: int) -> Iterator[slice]:
    for first in range(0, n, size):
        yield slice(first, min(first + size, n))
