"""Folders as optimum exports them: a graph of plain operators that takes tokens and all keys and
values before them, with the weights in the graph, and logits of every token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import refgraph
from onnx import TensorProto, helper

from edge import models
from edge.files.gguf import GGUF
from edge.graph.ops import Attention, Embed, Matmul, RmsNorm, Rope, Rotate
from edge.onnx.export import config as beside
from edge.onnx.export.lowering import Lowering, rotations
from edge.onnx.export.writer import GraphWriter

OPSET = 18


def write_optimum(
    path: Path,
    folder: Path,
    *,
    half: bool = False,
    merged: bool = False,
    positions: bool = True,
    rows: bool = False,
) -> Path:
    """Write a model's config.json, tokenizer and onnx/model.onnx.

    half: keys, values and logits are float16. merged: use_cache_branch says whether there are keys
    and values before. positions: position_ids are an input. rows: num_logits_to_keep is one.
    """
    (folder / "onnx").mkdir(parents=True)
    with GGUF.open(path) as model:
        shapes = {t.name: t.shape for t in model.tensors.values()}
        graph, config = models.build(model.metadata, shapes, context=None, path=str(path))
        weights = refgraph.load_weights(model)
        g = GraphWriter("optimum", OPSET)
        lowering = _Optimum(graph, model, g, _Weights(weights))
        lowering.begin(half=half, merged=merged, positions=positions, n=config.n_context_train)
        logits = lowering.run(lambda op: None)
        if rows:
            logits = lowering.keep(logits, g.input("num_logits_to_keep", TensorProto.INT64, []))
        logits = g.node("Cast", logits, to=lowering.dtype)
        shape = [1, "sequence_length", graph.dims[graph.output]]
        g.output(g.rename(logits, "logits"), lowering.dtype, shape)
        g.save(folder / "onnx" / ("decoder_model_merged.onnx" if merged else "model.onnx"))
        vocabulary = beside.write_tokenizer(model, config, folder)
        facts = {
            "model_type": config.architecture,
            "max_position_embeddings": config.n_context_train,
            "num_attention_heads": config.heads[0].n_heads,
            "num_key_value_heads": config.heads[0].n_kv_heads,
            "hidden_size": config.dim,
            "bos_token_id": vocabulary.bos_id,
            "eos_token_id": vocabulary.eos_id,
        }
        (folder / "config.json").write_text(json.dumps(facts))
    return folder


def edit(path: Path, change: Any) -> Path:
    """change(onnx.ModelProto) what a file holds."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)
    return path


def to_external(path: Path, place: str = "model.onnx_data") -> Path:
    """Move a graph's larger weights into a file beside it."""
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location=place, size_threshold=256)
    return path


class _Weights:
    """Matrices in float32, in the graph itself."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.weights = weights

    def apply(self, g: GraphWriter, x: str, op: Matmul) -> str:
        parts = [self.weights[name] for name in op.weights]
        return g.node("MatMul", x, g.constant(np.concatenate(parts).T.copy()))


class _Optimum(Lowering):
    """Everything as written in papers, float32 but for the cache."""

    def begin(self, *, half: bool, merged: bool, positions: bool, n: int) -> None:
        g = self.g
        self.dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.n = n
        self.ids = g.input("input_ids", TensorProto.INT64, [1, "sequence_length"])
        self.mask = g.input("attention_mask", TensorProto.INT64, [1, "total"])
        self.branch = g.input("use_cache_branch", TensorProto.BOOL, [1]) if merged else ""
        count = g.node("Shape", self.ids, start=1, end=2)
        self.total = g.node("Shape", self.mask, start=1, end=2)
        start = g.node("Sub", self.total, count)
        scalars = [g.node("Squeeze", v) for v in (start, self.total)]
        own = g.node("Range", *scalars, g.constant(np.array(1)))
        self.own = g.node("Unsqueeze", own, g.constant(np.array([0])))  # (1, n)
        self.positions = self.own
        if positions:
            self.positions = g.input("position_ids", TensorProto.INT64, [1, "sequence_length"])

    def keep(self, logits: str, rows: str) -> str:
        """The last rows, all for 0."""
        g = self.g
        end, axis = g.constant(np.array([1 << 40])), g.constant(np.array([1]))
        start = g.node("Unsqueeze", g.node("Neg", rows), g.constant(np.array([0])))
        return g.node("Slice", logits, start, end, axis)

    def lower_embed(self, op: Embed) -> str:
        table = self.linears.weights[op.weights[0]]
        return self.g.node("Gather", self.g.constant(table), self.ids)

    def lower_rms_norm(self, op: RmsNorm, x: str) -> str:
        g, last = self.g, self.g.constant(np.array([-1]))
        mean = g.node("ReduceMean", g.node("Mul", x, x), last, keepdims=1)
        eps = g.constant(np.array(op.eps, np.float32))
        rms = g.node("Sqrt", g.node("Add", mean, eps))
        return g.node("Mul", g.node("Div", x, rms), self.vector(op.weights[0]))

    def lower_rope(self, op: Rotate, x: str) -> str:
        """Turn the first heads: every pair (a, b) by its matrix, gathered by position."""
        g, rope, d = self.g, op.rope, op.head_dim
        heads = self.reshape(x, 1, -1, self.graph.dims[op.output] // d, d)
        first, rest = self.split(heads, 2, op.n_heads)
        cos, sin = (self.rows(rope, i, d) for i in (0, 1))
        swapped = g.node("Gather", first, g.constant(_partner(rope, d)), axis=3)
        turned = g.node("Add", g.node("Mul", first, cos), g.node("Mul", swapped, sin))
        return self.reshape(
            g.node("Concat", turned, rest, axis=2), 1, -1, self.graph.dims[op.output]
        )

    def rows(self, rope: Rope, which: int, d: int) -> str:
        """cos, or sin with its sign, of the call's positions: (1, n, 1, d)."""
        g = self.g
        table = np.concatenate([piece[which] for piece in rotations(self.model, rope, self.n)])
        wide = np.full((self.n, d), 1.0 - which, np.float32)
        pair = np.arange(rope.n_rot // 2)
        a, b = _pairs(rope, pair)
        wide[:, a], wide[:, b] = (table, table) if which == 0 else (-table, table)
        rows = g.node("Gather", g.constant(wide), self.positions)
        return g.node("Unsqueeze", rows, g.constant(np.array([2])))

    def lower_attention(self, op: Attention, x: str) -> str:
        g, i, d = self.g, op.layer, op.heads.head_dim
        n_heads, n_kv = op.heads.n_heads, op.heads.n_kv_heads
        heads = self.reshape(x, 1, -1, n_heads + 2 * n_kv, d)
        heads = g.node("Transpose", heads, perm=[0, 2, 1, 3])
        q, rest = self.split(heads, 1, n_heads)
        k, v = self.split(rest, 1, n_kv)
        k, v = (
            self.cached(f"{i}.{part}", new, n_kv, d) for part, new in (("key", k), ("value", v))
        )
        index = g.constant(np.arange(n_heads) * n_kv // n_heads)
        k, v = (g.node("Gather", value, index, axis=1) for value in (k, v))
        scores = g.node("MatMul", q, g.node("Transpose", k, perm=[0, 1, 3, 2]))
        scores = g.node("Mul", scores, g.constant(np.array(d**-0.5, np.float32)))
        scores = g.node("Add", scores, self.causal(op.window))
        out = g.node("MatMul", g.node("Softmax", scores, axis=-1), v)
        return self.reshape(g.node("Transpose", out, perm=[0, 2, 1, 3]), 1, -1, n_heads * d)

    def cached(self, name: str, new: str, n_kv: int, d: int) -> str:
        """Behind those before: declared as input and output."""
        g = self.g
        past = g.input(f"past_key_values.{name}", self.dtype, [1, n_kv, "past", d])
        if self.branch:
            past = self.chosen(past)
        both = g.node("Concat", past, g.node("Cast", new, to=self.dtype), axis=2)
        g.output(g.rename(both, f"present.{name}"), self.dtype, [1, n_kv, "total", d])
        return g.node("Cast", both, to=TensorProto.FLOAT)

    def chosen(self, past: str) -> str:
        """What was there, or nothing: by use_cache_branch."""
        first, axis = (self.g.constant(np.array([v])) for v in (0, 2))
        branches = {
            f"{which}_branch": helper.make_graph(
                [helper.make_node("Constant", [], [f"{past}.{which}"], value_ints=[n])],
                which,
                [],
                [helper.make_tensor_value_info(f"{past}.{which}", TensorProto.INT64, [1])],
            )
            for which, n in (("then", 1 << 40), ("else", 0))
        }
        end = self.g.node("If", self.branch, **branches)
        return self.g.node("Slice", past, first, end, axis)

    def causal(self, window: int) -> str:
        """(n, total): 0 where a token sees another, else -inf."""
        g = self.g
        scalars = (g.constant(np.array(0)), g.node("Squeeze", self.total), g.constant(np.array(1)))
        age = g.node("Sub", self.reshape(self.own, -1, 1), g.node("Range", *scalars))
        hidden = g.node("Less", age, g.constant(np.array(0)))
        if window:
            old = g.node("GreaterOrEqual", age, g.constant(np.array(window)))
            hidden = g.node("Or", hidden, old)
        low, zero = (g.constant(np.array(x, np.float32)) for x in (-1e9, 0))
        return g.node("Where", hidden, low, zero)

    def split(self, x: str, axis: int, first: int) -> Sequence[str]:
        ends = [self.g.constant(np.array([v])) for v in (0, first, 1 << 40, axis)]
        return (
            self.g.node("Slice", x, ends[0], ends[1], ends[3]),
            self.g.node("Slice", x, ends[1], ends[2], ends[3]),
        )

    def reshape(self, x: str, *shape: int) -> str:
        return self.g.node("Reshape", x, self.g.constant(np.array(shape)))


def _pairs(rope: Rope, pair: Any) -> tuple[Any, Any]:
    return (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + rope.n_rot // 2)


def _partner(rope: Rope, d: int) -> Any:
    """The other one of each pair."""
    index, pair = np.arange(d), np.arange(rope.n_rot // 2)
    a, b = _pairs(rope, pair)
    index[a], index[b] = b, a
    return index
