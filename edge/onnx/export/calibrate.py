"""Measures the ranges of activations: minimum and maximum of the input and output of each matmul.

The model runs on a text, on the CPU, with weights in blocks, one stage after the other. A stage is
about half a layer. All chunks of the text run through a stage before the next stage is written. A
stage keeps only the extremes of its activations, and in a file the one value that the next stage
reads. So the memory is that of the largest stage, for any text and any number of layers.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.device import cores
from edge.errors import InputError, ModelFileError
from edge.files.gguf import GGUF
from edge.files.text_file import TextFile
from edge.graph.graph import Graph
from edge.graph.ops import Embed, Matmul, Op
from edge.onnx.export.blocks import floats, slices
from edge.onnx.export.htp import Range, Ranges
from edge.onnx.export.linear import BlockLinears
from edge.onnx.export.lowering import rotations
from edge.onnx.export.step import FUSED_NORM, Shape, StepLowering
from edge.onnx.export.writer import DataFile, GraphWriter
from edge.onnx.files.folder import MASKED
from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers.providers import choose
from edge.onnx.providers.sessions import open_graph
from edge.tokenizer import Tokenizer

__all__ = ["calibrate", "calibration_tokens"]

#: The most tokens of a chunk, and of a window: the tokens that see each other.
_CHUNK, _WINDOW = 64, 256
_MOST_BYTES = 4 << 20  # of the text: a longer one takes hours
_TEXT = Path(__file__).with_name("calibration.txt")


def calibration_tokens(model: GGUF, file: str | None) -> list[int]:
    """The tokens of a text. file: None: edge's own text.

    Raises InputError for a file that cannot be read, is too long or has no text, and what
    `Tokenizer.from_metadata` raises.
    """
    path = Path(file) if file is not None else _TEXT
    text = TextFile.open(path).read(_MOST_BYTES)
    if text is None:
        raise InputError(f"{path} has more than {_MOST_BYTES >> 20} MiB to calibrate on: take less")
    tokens = Tokenizer.from_metadata(model.metadata, model.path).encode(text)
    model.metadata.forget()
    if not text.strip() or not tokens:
        raise InputError(f"{path} holds no text to calibrate on")
    return tokens


def calibrate(
    model: GGUF, graph: Graph, shape: Shape, folder: Path, tokens: Sequence[int]
) -> dict[str, Ranges]:
    """The ranges of each matmul of the graph over a text, by the name of its output.

    The text is cut into chunks of equal length, without the tokens that do not fill the last one.
    After each window of chunks the cache is emptied. folder: of temporary files, for weights in
    blocks and the values between two stages. Raises ModelFileError for NaN or infinity in a weight
    or a range, UnsupportedError, OSError.
    """
    most = min(_CHUNK, shape.context)
    n = len(tokens) // -(-len(tokens) // most)
    n_together = max(1, min(_WINDOW, shape.context) // n)
    small = dataclasses.replace(shape, context=n * n_together, half_cache=False)
    ranges: dict[str, Ranges] = {}
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=folder) as scratch:
        hidden = _embedded(model, graph, tokens[: len(tokens) // n * n], Path(scratch) / "hidden")
        for ops in _stages(graph):
            with tempfile.TemporaryDirectory(dir=scratch) as place:
                names = _write(model, graph, ops, small, n, Path(place) / "stage.onnx")
                extremes = _Stage(model, small, n, Path(place) / "stage.onnx").run(hidden)
            for name, (x, y) in zip(names, extremes.tolist(), strict=True):
                ranges[name] = Ranges(Range(*x), Range(*y))
        ranges[graph.output] = _of_head(model, graph.ops[-1], hidden, Path(scratch) / "head.onnx")
        del hidden
    for name, measured in ranges.items():
        if not np.isfinite(measured).all():
            raise ModelFileError(
                f"{name} reaches {measured.y.high} on the text: the model computes no numbers",
                path=model.path,
            )
    return ranges


def _of_head(model: GGUF, op: Op, x: NDArray[np.float32], path: Path) -> Ranges:
    """The ranges of the last matmul. Its weight is by far the largest, so it is run in slices."""
    g, k = GraphWriter("head", FUSED_NORM), x.shape[1]
    operands = (g.input("x", g.types.FLOAT, ("n", k)), g.input("w", g.types.FLOAT, ("rows", k)))
    y = g.node("Gemm", *operands, transB=1)
    for kind in ("ReduceMin", "ReduceMax"):
        g.output(g.rename(g.node(kind, y, keepdims=0), kind), g.types.FLOAT, ())
    g.save(path)
    session, extremes = _session(path), []
    for tensor in (model.tensors[name] for name in op.weights):
        for first, n in slices(tensor):
            w = floats(tensor, first, n)
            model.forget()
            for i in range(0, len(x), _WINDOW):
                extremes.append(session.run(None, {"x": x[i : i + _WINDOW], "w": w}))
    least, most = zip(*extremes, strict=True)
    return Ranges(Range(float(x.min()), float(x.max())), Range(float(min(least)), float(max(most))))


def _embedded(model: GGUF, graph: Graph, tokens: Sequence[int], path: Path) -> NDArray[np.float32]:
    """The rows of the embedding, (tokens, dim), in a mapped file."""
    table = model.tensors[graph.ops[0].weights[0]]
    hidden = np.memmap(path, np.float32, "w+", shape=(len(tokens), table.shape[1]))
    for i, token in enumerate(tokens):
        hidden[i] = floats(table, token)[0]
        model.forget()
    return hidden


def _stages(graph: Graph) -> Iterator[list[Op]]:
    """The ops between the embedding and the last matmul, cut where later ops need only one value.

    Each stage begins with an Embed, which stands for that value. Each but the last has a matmul.
    """
    last = {name: i for i, op in enumerate(graph.ops) for name in op.inputs}
    stage: list[Op] = [graph.ops[0]]
    live = {graph.ops[0].output}
    for i, op in enumerate(graph.ops[1:-1], 1):
        stage.append(op)
        live = {value for value in live | {op.output} if last.get(value, 0) > i}
        if live == {op.output} and any(isinstance(op, Matmul) for op in stage):
            yield stage
            stage = [Embed((), op.output, ())]
    if len(stage) > 1:
        yield stage


class _WatchedGraph(StepLowering):
    """A lowering that adds nodes for the ranges of matmuls.

    outputs: the names of the matmuls' outputs. extremes: the names of minimum and maximum of the
    input and of the output of each matmul.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.outputs: list[str] = []
        self.extremes: list[str] = []

    def lower_matmul(self, op: Matmul, x: str) -> str:
        y = super().lower_matmul(op, x)
        self.outputs.append(op.output)
        for value in (x, y):
            self.extremes += [self.g.node(kind, value) for kind in ("ReduceMin", "ReduceMax")]
        return y


def _write(model: GGUF, graph: Graph, ops: list[Op], shape: Shape, n: int, path: Path) -> list[str]:
    """Write a stage and its weights; returns the names of its matmuls' outputs, in order."""
    stage, g = copy.copy(graph), GraphWriter("stage", FUSED_NORM)
    stage.ops, stage.output = ops, ops[-1].output
    with DataFile(path.with_suffix(".data")) as data:
        lowering = _WatchedGraph(stage, model, g, BlockLinears(model, data), shape=shape, n=n)
        output = lowering.run(lambda op: None)
    if lowering.extremes:
        ranges = g.node("Concat", *lowering.extremes, axis=0)
        g.output(g.rename(ranges, "ranges"), g.types.FLOAT, (len(lowering.extremes), 1, 1))
    g.output(g.rename(output, "output"), g.types.FLOAT, (1, n, graph.dims[stage.output]))
    g.save(path)
    return lowering.outputs


class _Stage:
    """A session of a stage. cache: keys and values of earlier chunks."""

    def __init__(self, model: GGUF, shape: Shape, n: int, path: Path) -> None:
        self.session = _session(path)
        self.shape, self.n = shape, n
        (self.cos, self.sin), *_ = rotations(model, shape.rope, shape.context)
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        kinds = {name: dims for name, dims in self.inputs.items() if name.startswith("past_")}
        self.cache = {name: np.zeros(dims, np.float32) for name, dims in kinds.items()}

    def run(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run all chunks of a text. hidden (tokens, dim): the stage replaces it by its output.

        Returns the extremes over the text: (matmuls, input and output, minimum and maximum).
        """
        extremes = [self._chunk(hidden, i) for i in range(len(hidden) // self.n)]
        return np.stack([np.min(extremes, 0)[..., 0], np.max(extremes, 0)[..., 1]], -1)

    def _chunk(self, hidden: NDArray[np.float32], i: int) -> NDArray[np.float32]:
        rows = hidden[i * self.n : (i + 1) * self.n]
        outputs = self.step(i % (self.shape.context // self.n), rows)
        rows[:] = outputs["output"][0]
        return np.reshape(outputs.get("ranges", np.empty(0, np.float32)), (-1, 2, 2))

    def step(self, i: int, rows: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run chunk i of a window, behind the earlier chunks; returns the outputs by name."""
        place = slice(i * self.n, (i + 1) * self.n)
        values = {
            "hidden": rows[None],
            "cos": self.cos[None, place],
            "sin": self.sin[None, place],
            "mask": self.mask(i * self.n),
            **self.cache,
        }
        inputs = {name: value for name, value in values.items() if name in self.inputs}
        outputs = dict(zip(self.outputs, self.session.run(None, inputs), strict=True))
        for name, cache in self.cache.items():
            new = outputs[name.replace("past_", "new_")]
            cache[(..., place) if "key" in name else (..., place, slice(None))] = new
        return outputs

    def mask(self, n_past: int) -> NDArray[np.float32]:
        """The mask of a chunk behind n_past tokens, (1, 1, n, context + n)."""
        context, n = self.shape.context, self.n
        column = np.arange(context + n)
        position = np.where(column < context, column, column - context + n_past)
        age = n_past + np.arange(n)[:, None] - position
        hidden = (age < 0) | ((column < context) & (column >= n_past))
        if self.shape.window:
            hidden |= age >= self.shape.window
        return np.where(hidden, np.float32(MASKED), np.float32(0))[None, None]


def _session(path: Path) -> Any:
    target = choose("cpu", "cpu", threads=cores.choose(None).threads)
    return open_graph(OnnxFile.read(path), target).session
