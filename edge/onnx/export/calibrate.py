"""The ranges of activations: the least and the most that goes into and comes out of each matmul.

The model runs over a text on the CPU, its weights in blocks, stage by stage: about half a layer,
which all chunks of the text go through before the next one is written. Of its activations only
the extremes leave a stage, and the one value that the next stage takes, which waits in a file. So
memory is that of the largest stage, whatever the text and the number of layers.
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
from edge.graph import Embed, Graph, Matmul, Op
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

#: Tokens that go through at once, at most, and tokens that see each other.
_CHUNK, _WINDOW = 64, 256
_MOST_BYTES = 4 << 20  # of the text: more takes hours
_TEXT = Path(__file__).with_name("calibration.txt")


def calibration_tokens(model: GGUF, file: str | None) -> list[int]:
    """The tokens of a text. file: None: edge's own text.

    Raises InputError for a file that cannot be read or holds no text, and what
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
    """The ranges of each matmul of the graph, by its output, over a text.

    The text is cut into chunks of equal length, tokens that do not fill the last are left out; it
    begins anew after some chunks, with an empty cache. folder: for weights in blocks and what lies
    between two stages, which are deleted as it goes. Raises ModelFileError for NaN or infinity in
    a weight or a range, UnsupportedError, OSError.
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
                seen = _Stage(model, small, n, Path(place) / "stage.onnx").run(hidden)
            for name, (x, y) in zip(names, seen.tolist(), strict=True):
                ranges[name] = Ranges(Range(*x), Range(*y))
        ranges[graph.output] = _of_head(model, graph.ops[-1], hidden, Path(scratch) / "head.onnx")
        del hidden
    for name, found in ranges.items():
        if not np.isfinite(found).all():
            raise ModelFileError(
                f"{name} reaches {found.y.high} on the text: the model computes no numbers",
                path=model.path,
            )
    return ranges


def _of_head(model: GGUF, op: Op, x: NDArray[np.float32], path: Path) -> Ranges:
    """Of the last matmul, whose weight is the largest by far: a slice of its rows at a time."""
    g, k = GraphWriter("head", FUSED_NORM), x.shape[1]
    operands = (g.input("x", g.types.FLOAT, ("n", k)), g.input("w", g.types.FLOAT, ("rows", k)))
    y = g.node("Gemm", *operands, transB=1)
    for kind in ("ReduceMin", "ReduceMax"):
        g.output(g.rename(g.node(kind, y, keepdims=0), kind), g.types.FLOAT, ())
    g.save(path)
    session, seen = _session(path), []
    for tensor in (model.tensors[name] for name in op.weights):
        for first, n in slices(tensor):
            w = floats(tensor, first, n)
            model.forget()
            for i in range(0, len(x), _WINDOW):
                seen.append(session.run(None, {"x": x[i : i + _WINDOW], "w": w}))
    least, most = zip(*seen, strict=True)
    return Ranges(Range(float(x.min()), float(x.max())), Range(float(min(least)), float(max(most))))


def _embedded(model: GGUF, graph: Graph, tokens: Sequence[int], path: Path) -> NDArray[np.float32]:
    """Rows of the embedding in a file, (tokens, dim)."""
    table = model.tensors[graph.ops[0].weights[0]]
    hidden = np.memmap(path, np.float32, "w+", shape=(len(tokens), table.shape[1]))
    for i, token in enumerate(tokens):
        hidden[i] = floats(table, token)[0]
        model.forget()
    return hidden


def _stages(graph: Graph) -> Iterator[list[Op]]:
    """The ops between the embedding and the last matmul, cut where all that goes on is one value.

    Each but the last has a matmul, and each begins with an op `embed`, which stands for that value.
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


class _Watched(StepLowering):
    """outputs: of the matmuls; found: least and most of the input and the output of each."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.outputs: list[str] = []
        self.found: list[str] = []

    def lower_matmul(self, op: Matmul, x: str) -> str:
        y = super().lower_matmul(op, x)
        self.outputs.append(op.output)
        for value in (x, y):
            self.found += [self.g.node(kind, value) for kind in ("ReduceMin", "ReduceMax")]
        return y


def _write(model: GGUF, graph: Graph, ops: list[Op], shape: Shape, n: int, path: Path) -> list[str]:
    """Write a stage, and its weights beside it; the names of its matmuls' outputs, in order."""
    stage, g = copy.copy(graph), GraphWriter("stage", FUSED_NORM)
    stage.ops, stage.output = ops, ops[-1].output
    with DataFile(path.with_suffix(".data")) as data:
        lowering = _Watched(stage, model, g, BlockLinears(model, data), shape=shape, n=n)
        output = lowering.run(lambda op: None)
    if lowering.found:
        found = g.node("Concat", *lowering.found, axis=0)
        g.output(g.rename(found, "ranges"), g.types.FLOAT, (len(lowering.found), 1, 1))
    g.output(g.rename(output, "output"), g.types.FLOAT, (1, n, graph.dims[stage.output]))
    g.save(path)
    return lowering.outputs


class _Stage:
    """A session of a stage. cache: keys and values of the chunks before."""

    def __init__(self, model: GGUF, shape: Shape, n: int, path: Path) -> None:
        self.session = _session(path)
        self.shape, self.n = shape, n
        (self.cos, self.sin), *_ = rotations(model, shape.rope, shape.context)
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        kinds = {name: dims for name, dims in self.inputs.items() if name.startswith("past_")}
        self.cache = {name: np.zeros(dims, np.float32) for name, dims in kinds.items()}

    def run(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """All chunks of a text, whose values (tokens, dim) become those behind the stage.

        (matmuls, input and output, least and most) of the whole text.
        """
        found = [self._chunk(hidden, i) for i in range(len(hidden) // self.n)]
        return np.stack([np.min(found, 0)[..., 0], np.max(found, 0)[..., 1]], -1)

    def _chunk(self, hidden: NDArray[np.float32], i: int) -> NDArray[np.float32]:
        rows = hidden[i * self.n : (i + 1) * self.n]
        found = self.step(i % (self.shape.context // self.n), rows)
        rows[:] = found["output"][0]
        return np.reshape(found.get("ranges", np.empty(0, np.float32)), (-1, 2, 2))

    def step(self, i: int, rows: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Run the i-th chunk behind those before; the outputs by name."""
        place = slice(i * self.n, (i + 1) * self.n)
        values = {
            "hidden": rows[None],
            "cos": self.cos[None, place],
            "sin": self.sin[None, place],
            "mask": self.mask(i * self.n),
            **self.cache,
        }
        wanted = {name: value for name, value in values.items() if name in self.inputs}
        found = dict(zip(self.outputs, self.session.run(None, wanted), strict=True))
        for name, cache in self.cache.items():
            new = found[name.replace("past_", "new_")]
            cache[(..., place) if "key" in name else (..., place, slice(None))] = new
        return found

    def mask(self, n_past: int) -> NDArray[np.float32]:
        """Of a chunk behind n_past tokens, (1, 1, n, context + n)."""
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
