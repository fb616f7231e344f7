"""How much each matrix matters: the damage that its rounding does to the model's output.

The damage is measured, not guessed. One matrix at a time takes a coarse type, all others stay as
they are, and the KL divergence of the model's output from the untouched model's is taken on a text.
What another type would do follows from it: for small errors the divergence grows as the mean square
of what changes in the matrix's output. Damages of single matrices tell in which order to buy types,
not the divergence of a whole file.

Where the engine quantises activations, any change of the weights, however small, rounds other
activations up and down, so that the outputs diverge a little. This floor falls from layer to layer.
It is measured for each layer, with a matrix that hardly changes, and taken off.

The layers before the matrix give the same each time: they run once, and what they leave is kept.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge import native
from edge.disk.own import make_folder
from edge.disk.room import cache_dir
from edge.engine.engine import Engine
from edge.engine.states import WindowPiece, cuts, state_views
from edge.files.tensor_types import TYPE_NUMBERS
from edge.kv.cache import KVCache
from edge.model import Model
from edge.native import ALIGNMENT, CData, ffi, lib
from edge.native.cancel import Cancel
from edge.perplexity import KeptLogits, keep
from edge.quantizer.encode import Encoder, decode, row_bytes
from edge.weights.packed import describe_weight
from edge.windows import Windows, pieces

__all__ = ["EncodedMatrix", "damages"]

#: How much the weights of a layer's floor change, relative to each: less than any type does.
_HARDLY = 1e-3


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix in a type of a GGUF. rows: (n, bytes of a row), of all its matrices for a stack."""

    type: str
    rows: NDArray[np.uint8]


def damages(
    model: Model,
    windows: Windows,
    trials: Mapping[str, Callable[[], EncodedMatrix]],
    *,
    cancel: Cancel | None = None,
) -> Iterator[tuple[str, float]]:
    """Weight names, and the KL divergence that the trial of each causes, in nats, at least 0.

    trials: weight name -> what makes its blocks in another type; called once, when it is needed.
    In a file of the cache folder lie the untouched model's logits, windows.n_scored rows of 4 bytes
    for each token of the vocabulary; in memory what a layer makes of all tokens. Raises OSError,
    and the errors of `edge.perplexity.keep`.
    """
    engine = model.engine
    assert isinstance(engine, Engine)
    threads = native.new_threads(engine.threads, engine.cores.cpus)
    floors, first_ops = dict[str, float](), _first_ops(engine, trials)
    make_folder(cache_dir())
    with (
        tempfile.TemporaryFile(dir=cache_dir(), prefix=".states-") as file,
        contextlib.closing(engine.cache()) as cache,
    ):
        runs = _Runs(engine, keep(model, windows, file, cancel=cancel), cache, cancel)

        def measured(name: str, blocks: EncodedMatrix) -> float:
            with _packed(engine, name, blocks, threads) as weight:
                return runs.divergence({name: weight})

        for name in sorted(trials, key=first_ops.__getitem__):
            runs.go_to(first_ops[name])
            if (layer := _layer(name)) not in floors:
                floors[layer] = 0.0
                if engine.takes_q8(name):
                    floors[layer] = measured(name, _hardly_changed(engine, name, threads))
            yield name, max(0.0, measured(name, trials[name]()) - floors[layer])


def _first_ops(engine: Engine, names: Iterable[str]) -> dict[str, int]:
    """Weight -> the op from which on its layer runs."""
    ops = engine.lowered.ops
    starts = [0, *cuts(ops)]
    reading: dict[str, int] = {}
    for i, op in enumerate(ops):
        for name in op.weights:
            reading.setdefault(name, i)
    return {name: starts[bisect_right(starts, reading[name]) - 1] for name in names}


class _Runs:
    """Runs of the windows of a text from an op on. base: the untouched model's logits; cache: an
    empty one.
    """

    def __init__(
        self, engine: Engine, base: KeptLogits, cache: KVCache, cancel: Cancel | None
    ) -> None:
        self._engine, self._cache, self._cancel = engine, cache, cancel
        windows, shape = base.windows, (base.windows.n_scored, base.n_vocab)
        base.file.flush()
        #: The untouched model's log-probabilities, (n_scored, n_vocab), in the place of its logits.
        self._base = np.memmap(base.file, np.float32, "r+", shape=shape)
        for row in self._base:
            row[:] = native.log_softmax(row)
        self._windows = [list(pieces(window[:-1], windows.first)) for window in windows.tokens]
        self._first = 0
        #: What is in the buffers before that op, for each piece of all windows.
        self._states = [list[bytes]() for window in self._windows for _ in window]

    def go_to(self, op: int) -> None:
        """Run up to an op, no earlier than the last one."""
        if op == self._first:
            return
        n_ops, states = op - self._first, list[list[bytes]]()
        with self._engine.substituted({}, self._first):
            for piece in self._each():
                self._engine.run_before(n_ops, self._cache, piece.tokens, cancel=self._cancel)
                states.append([bytes(v) for v in state_views(self._engine, op, piece)])
        self._first, self._states = op, states

    def divergence(self, weights: Mapping[str, CData]) -> float:
        """The mean KL divergence of the model with other weights, in nats."""
        found, base = array("d"), iter(self._base)
        with self._engine.substituted(weights, self._first):
            for piece in self._each():
                rows: Literal["all", "none"] = "all" if piece.is_scored else "none"
                logits = self._engine.run(
                    self._cache, piece.tokens, logits=rows, cancel=self._cancel
                )
                for row in () if logits is None else logits:
                    log_p, log_q = next(base), native.log_softmax(row)
                    found.append(float(np.dot(np.exp(log_p), log_p - log_q)))
        return math.fsum(found) / len(found)

    def _each(self) -> Iterator[WindowPiece]:
        """Each piece, when the engine is ready to run it."""
        states = iter(self._states)
        for window in self._windows:
            self._cache.trim(0)
            for piece in window:
                views = state_views(self._engine, self._first, piece)
                for view, state in zip(views, next(states), strict=True):
                    view[:] = state
                yield piece
        self._cache.trim(0)


def _layer(name: str) -> str:
    """The layer of a weight: "blk.3.", or the whole name of what belongs to none."""
    match = re.match(r"blk\.\d+\.", name)
    return match[0] if match else name


def _hardly_changed(engine: Engine, name: str, threads: CData) -> EncodedMatrix:
    """A matrix with a small error of its own for each weight, in the finest type of blocks."""
    tensor = engine.gguf.unpacked(": name the GGUF file that it was made of").tensors[name]
    k = tensor.shape[-1]
    rows = np.frombuffer(tensor.data, np.uint8).reshape(-1, row_bytes(tensor.type, k))
    x = decode(tensor.type, rows, k, threads)
    x += np.float32(_HARDLY) * x * np.random.default_rng(0).standard_normal(x.shape, np.float32)
    return EncodedMatrix("Q8_0", Encoder("Q8_0").encode(x, None, threads))


@contextlib.contextmanager
def _packed(engine: Engine, name: str, blocks: EncodedMatrix, threads: CData) -> Iterator[CData]:
    """An edge_weight of these blocks: in their own type where the model's weight multiplies
    quantised activations, as that does; else, with the same values, in floats.
    """
    k, rows, type_name = engine.gguf.tensors[name].shape[-1], blocks.rows, blocks.type
    if not engine.takes_q8(name):
        rows = decode(type_name, rows, k, threads).view(np.uint8)
        type_name = "F32"
    weight, error = ffi.new("edge_weight *"), ffi.new("edge_error *")
    describe_weight(type_name, (len(rows), k), "fast", weight)
    panels = np.empty(weight.n_bytes + ALIGNMENT, np.uint8)
    panels = panels[-panels.ctypes.data % ALIGNMENT :]
    with ffi.from_buffer("uint8_t[]", panels) as data, ffi.from_buffer("uint8_t[]", rows) as src:
        weight.data = data
        number = TYPE_NUMBERS[type_name]
        native.check(lib.edge_weight_pack(threads, number, weight, src, rows.nbytes, error), error)
        yield weight
