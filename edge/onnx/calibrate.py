"""The ranges of activations: the least and the most that goes into and comes out of each matmul.

The model runs over a text on the CPU, in chunks, with its weights in blocks, as a graph whose only
outputs, besides new keys and values, are these numbers: no activation leaves the graph, and memory
grows neither with the text nor with what lies between two layers.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import InputError
from edge.gguf import GGUF
from edge.graph import Graph, Op
from edge.onnx.blocks import floats
from edge.onnx.htp import Range, Ranges
from edge.onnx.linear import BlockLinears
from edge.onnx.lowering import rotations
from edge.onnx.providers import onnxruntime
from edge.onnx.step import FUSED_NORM, Shape, StepLowering
from edge.onnx.writer import DataFile, GraphWriter
from edge.tokenizer import Tokenizer

__all__ = ["calibrate", "calibration_tokens"]

#: Tokens that go through at once, at most, and tokens that see each other.
_CHUNK, _WINDOW = 64, 256
_TEXT = Path(__file__).with_name("calibration.txt")
_MASKED = -1e30  # added to a score that must not count


def calibration_tokens(model: GGUF, file: str | None) -> list[int]:
    """The tokens of a text. file: None: edge's own text.

    Raises InputError for a file that cannot be read or holds no text, and what
    `Tokenizer.from_metadata` raises.
    """
    path = Path(file) if file is not None else _TEXT
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read as text to calibrate on: {e}") from e
    tokens = Tokenizer.from_metadata(model.metadata, model.path).encode(text)
    model.metadata.forget()
    if not text.strip() or not tokens:
        raise InputError(f"{path} holds no text to calibrate on")
    return tokens


def calibrate(
    model: GGUF, graph: Graph, shape: Shape, folder: Path, tokens: Sequence[int]
) -> dict[str, Ranges]:
    """The ranges of each matmul of the graph, by its output, over a text.

    The text is cut into chunks of equal length, tokens that do not fill the last are left out; it
    begins anew after some chunks, with an empty cache. folder: for weights in blocks, which are
    deleted afterwards. Raises ModelFileError for NaN or infinity in a weight, UnsupportedError,
    OSError.
    """
    most = min(_CHUNK, shape.context)
    n = len(tokens) // -(-len(tokens) // most)
    n_together = max(1, min(_WINDOW, shape.context) // n)
    small = dataclasses.replace(shape, context=n * n_together, half_cache=False)
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=folder) as scratch:
        path = Path(scratch) / "ranges.onnx"
        names = _write(model, graph, small, n, path)
        runner = _Runner(model, graph, small, n, path)
        seen = np.full((len(names), 4), np.nan, np.float32)
        for i in range(len(tokens) // n):
            new = runner.step(i % n_together, tokens[i * n : (i + 1) * n])
            seen[:, ::2] = np.fmin(seen[:, ::2], new[:, ::2])
            seen[:, 1::2] = np.fmax(seen[:, 1::2], new[:, 1::2])
        del runner
    rows = [(Range(*row[:2]), Range(*row[2:])) for row in seen.tolist()]
    return {name: Ranges(*row) for name, row in zip(names, rows, strict=True)}


class _Watched(StepLowering):
    """outputs: of the matmuls; found: least and most of the input and the output of each."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.outputs: list[str] = []
        self.found: list[str] = []

    def lower_matmul(self, op: Op, x: str) -> str:
        y = super().lower_matmul(op, x)
        self.outputs.append(op.output)
        for value in (x, y):
            self.found += [self.g.node(kind, value) for kind in ("ReduceMin", "ReduceMax")]
        return y


def _write(model: GGUF, graph: Graph, shape: Shape, n: int, path: Path) -> list[str]:
    """Write the graph, and weights beside it; the names of its matmuls' outputs, in order."""
    g = GraphWriter("ranges", FUSED_NORM)
    with DataFile(path.with_suffix(".data")) as data:
        lowering = _Watched(graph, model, g, BlockLinears(model, data), shape=shape, n=n)
        lowering.run(lambda op: None)
    found = g.node("Concat", *lowering.found, axis=0)
    g.output(g.rename(found, "ranges"), g.types.FLOAT, (len(lowering.found), 1, 1))
    g.save(path)
    return lowering.outputs


class _Runner:
    """The session, and the cache of the chunks before."""

    def __init__(self, model: GGUF, graph: Graph, shape: Shape, n: int, path: Path) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(
            path, sess_options=options, providers=["CPUExecutionProvider"]
        )
        self.shape, self.n = shape, n
        self.model, self.table = model, model.tensors[f"{graph.ops[0].weights[0]}.weight"]
        (self.cos, self.sin), *_ = rotations(model, shape.rope, shape.context)
        kinds = {v.name: v.shape for v in self.session.get_inputs() if v.name.startswith("past_")}
        self.cache = {name: np.zeros(dims, np.float32) for name, dims in kinds.items()}
        self.outputs = [v.name for v in self.session.get_outputs()]

    def step(self, i: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Run the i-th chunk behind those before; (matmuls, 4): least and most of input, output."""
        place = slice(i * self.n, (i + 1) * self.n)
        hidden = [floats(self.table, token) for token in tokens]
        self.model.forget()
        values = {
            "hidden": np.stack(hidden, 1),
            "cos": self.cos[None, place],
            "sin": self.sin[None, place],
            "mask": self.mask(i * self.n),
            **self.cache,
        }
        found = dict(zip(self.outputs, self.session.run(None, values), strict=True))
        for name, cache in self.cache.items():
            new = found[name.replace("past_", "new_")]
            cache[(..., place) if "key" in name else (..., place, slice(None))] = new
        return np.reshape(found["ranges"], (-1, 4))

    def mask(self, n_past: int) -> NDArray[np.float32]:
        """Of a chunk behind n_past tokens, (1, 1, n, context + n)."""
        context, n = self.shape.context, self.n
        column = np.arange(context + n)
        position = np.where(column < context, column, column - context + n_past)
        age = n_past + np.arange(n)[:, None] - position
        hidden = (age < 0) | ((column < context) & (column >= n_past))
        if self.shape.window:
            hidden |= age >= self.shape.window
        return np.where(hidden, np.float32(_MASKED), np.float32(0))[None, None]
