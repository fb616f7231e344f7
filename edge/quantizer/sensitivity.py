"""How much each matrix matters: the damage that its rounding does to the model's output.

The damage is measured, not guessed. One matrix at a time takes a coarse type, all others stay as
they are, and the KL divergence of the model's output from the untouched model's is taken on a text.
What another type would do follows from it: for small errors the divergence grows as the mean square
of what changes in the matrix's output. Damages of single matrices tell in which order to buy types,
not the divergence of a whole file.

Where the engine quantises activations, any change of the weights, however small, rounds other
activations up and down, so that the outputs diverge a little. This floor falls from layer to layer.
It is measured for each layer, with a matrix that hardly changes, and taken off.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge import native
from edge.engine.engine import Engine
from edge.files.tensor_types import TYPE_NUMBERS
from edge.model import Model
from edge.native import ALIGNMENT, CData, ffi, lib
from edge.native.cancel import Cancel
from edge.perplexity import Windows, compare, keep
from edge.progress import Progress
from edge.quantizer.encode import Encoder, decode, row_bytes
from edge.weights.packed import describe_weight

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
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, float]:
    """Weight name -> the KL divergence that its trial causes, in nats, at least 0.

    trials: weight name -> what makes its blocks in another type; called once, when it is needed.
    The untouched model's logits lie in a temporary file meanwhile: windows.n_scored rows of 4 bytes
    for each token of the vocabulary. Raises OSError, and the errors of `edge.perplexity.compare`.
    """
    engine = model.engine
    assert isinstance(engine, Engine)
    threads = native.new_threads(engine.threads, engine.cores.cpus)
    layers = {name: _layer(name) for name in trials}
    total, done = len(trials) + len(set(layers.values())), 0
    found, floors = dict[str, float](), dict[str, float]()
    with tempfile.TemporaryFile() as file:
        base = keep(model, windows, file, cancel=cancel)

        def measured(name: str, blocks: EncodedMatrix) -> float:
            nonlocal done
            with _substituted(engine, name, blocks, threads):
                file.seek(0)
                kl = compare(model, base, windows, cancel=cancel).kl
            done += 1
            if progress is not None:
                progress(done, total)
            return kl

        for name, trial in trials.items():
            if (layer := layers[name]) not in floors:
                floors[layer] = 0.0
                if engine.takes_q8(name):
                    floors[layer] = measured(name, _hardly_changed(engine, name, threads))
            found[name] = max(0.0, measured(name, trial()) - floors[layer])
    return found


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


@contextmanager
def _substituted(
    engine: Engine, name: str, blocks: EncodedMatrix, threads: CData
) -> Iterator[None]:
    """Run with these blocks for a weight: in their own type where the model's weight multiplies
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
        with engine.substituted({name: weight}):
            yield
