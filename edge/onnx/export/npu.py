"""Dialect npu: graphs of fixed shapes and plain operators, which an NPU can run as a whole.

Three graphs share one file of weights:

    embedding.onnx  input_ids, position_ids [1, n]  ->  hidden [1, n, dim], cos, sin [1, n, n_rot/2]
                    It runs on the CPU, so that tables never enter the NPU.
    chunk.onnx      n = chunk: keys and values of a part of a prompt, no logits
    token.onnx      n = 1: keys and values of one token, and its logits

    chunk, token    hidden, cos, sin, mask [1, 1, n, S + n],
                    past_key.{i} [1, Hkv, D, S], past_value.{i} [1, Hkv, S, D]
                    ->  new_key.{i} [1, Hkv, D, n], new_value.{i} [1, Hkv, n, D], logits [1, 1, V]

S is the context. The mask is added to scores: its first S columns belong to the cache, its last n
columns to the new tokens. The caller owns the cache, and writes the new keys and values into it.
Keys are transposed there, so that no graph transposes or copies the cache. Within a head, the
rotated dimensions have an order of their own, the same for queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge import check
from edge.errors import InputError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import Op
from edge.onnx.export.calibrate import calibrate, calibration_tokens
from edge.onnx.export.config import write_json
from edge.onnx.export.htp import Float16Linears, Int8Linears, Ranges
from edge.onnx.export.linear import BlockLinears
from edge.onnx.export.lowering import Linears, rotations
from edge.onnx.export.step import FUSED_NORM, Shape, StepLowering, shape_of
from edge.onnx.export.writer import DataFile, GraphWriter
from edge.onnx.providers.providers import PROVIDERS, RUNNERS
from edge.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from edge.models.common import Config

__all__ = ["CONFIG", "DATA", "GRAPHS", "NpuOptions", "write"]

CONFIG, DATA = "edge.json", "weights.data"
GRAPHS = ("embedding.onnx", "chunk.onnx", "token.onnx")

_FORMAT = 1  # of edge.json
_PLAIN = FUSED_NORM - 2  # the opset of graphs without that operator


@dataclass(frozen=True)
class NpuOptions:
    """Options of an export of dialect npu.

    provider: one of RUNNERS. weights: one of the provider's forms, None: the best. chunk: tokens of
    chunk.onnx. calibration: a file of text with which int8 measures the ranges of activations,
    None: edge's own text. Raises InputError for an unknown provider or form.
    """

    provider: str = "qnn"
    weights: str | None = None
    chunk: int = 64
    calibration: str | None = None

    def __post_init__(self) -> None:
        check.choice("provider", self.provider, RUNNERS)
        if self.weights not in (None, *PROVIDERS[self.provider].weights):
            forms = ", ".join(PROVIDERS[self.provider].weights)
            raise InputError(f"weights {self.weights!r}: {self.provider} takes {forms}")
        check.whole("chunk", self.chunk, 2)
        check.optional(check.path, "calibration", self.calibration)

    @property
    def form(self) -> str:
        """The form of the weights."""
        return self.weights or PROVIDERS[self.provider].weights[0]

    @property
    def opset(self) -> int:
        """The opset of the graphs, which decides whether the norm is one operator.

        QNN computes in float16, where the squares of a norm overflow; one operator avoids that.
        OpenVINO 1.24 refuses graphs with that operator.
        """
        return FUSED_NORM if self.provider == "qnn" else _PLAIN


def write(
    model: GGUF,
    graph: Graph,
    config: Config,
    folder: Path,
    options: NpuOptions,
    on_op: Callable[[Op], None],
) -> None:
    """Write the graphs, their weights and edge.json into a folder.

    on_op: called after each op of each graph.
    Raises UnsupportedError for a model that this dialect cannot express, and for weights that the
    form cannot hold; InputError for a chunk that is longer than the context; OSError.
    """
    if options.chunk > config.n_context:
        raise InputError(
            f"a chunk of {options.chunk} tokens, the context has {config.n_context}: "
            "ask for a smaller one"
        )
    shape = shape_of(graph, config.n_context, half_cache=options.provider == "qnn")
    ranges: dict[str, Ranges] = {}
    if options.form == "int8":
        tokens = calibration_tokens(model, options.calibration)
        ranges = calibrate(model, graph, shape, folder, tokens)
    with DataFile(folder / DATA) as data:
        blocks = BlockLinears(model, data)
        forms: dict[str, Callable[[], Linears]] = {
            "blocks": lambda: blocks,
            "float16": lambda: Float16Linears(model, data),
            "int8": lambda: Int8Linears(model, data, ranges),
        }
        linears = forms[options.form]()
        _write_embedding(model, graph, shape, blocks, data).save(folder / "embedding.onnx")
        for name, n in (("chunk", options.chunk), ("token", 1)):
            g = GraphWriter(name, options.opset)
            logits = StepLowering(graph, model, g, linears, shape=shape, n=n).run(on_op)
            if n == 1:
                g.output(
                    g.rename(logits, "logits"), g.types.FLOAT, (1, 1, graph.dims[graph.output])
                )
            g.save(folder / f"{name}.onnx")
    write_json(folder / CONFIG, _facts(model, config, shape, options))


def _write_embedding(
    model: GGUF, graph: Graph, shape: Shape, blocks: BlockLinears, data: DataFile
) -> GraphWriter:
    """The graph that looks up rows of the embedding, and of cos and sin by position."""
    g = GraphWriter("embedding", _PLAIN)
    first = graph.ops[0]
    ids = g.input("input_ids", g.types.INT64, (1, "n"))
    positions = g.input("position_ids", g.types.INT64, (1, "n"))
    hidden = blocks.embedding(g, ids, first.weights[0])
    g.output(g.rename(hidden, "hidden"), g.types.FLOAT, (1, "n", graph.dims[first.output]))
    for i, name in enumerate(("cos", "sin")):
        pieces = (piece[i] for piece in rotations(model, shape.rope, shape.context))
        table = data.add(g.types.FLOAT, (shape.context, shape.n_angles), pieces)
        rows = g.node("Gather", g.weight(f"rotations.{name}", table), positions)
        g.output(g.rename(rows, name), g.types.FLOAT, (1, "n", shape.n_angles))
    return g


def _facts(model: GGUF, config: Config, shape: Shape, options: NpuOptions) -> dict[str, Any]:
    """The content of edge.json."""
    vocabulary = Vocabulary.from_metadata(model.metadata, model.path)
    model.metadata.forget()
    return {
        "format": _FORMAT,
        "dialect": "npu",
        "provider": options.provider,
        "weights": options.form,
        "name": str(model.metadata.get("general.name") or ""),
        "architecture": config.architecture,
        "context": shape.context,
        "chunk": options.chunk,
        "window": shape.window,
        "n_layers": shape.n_layers,
        "n_kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "n_vocab": len(vocabulary.tokens),
        "bos_token_id": vocabulary.bos_id,
        "eos_token_ids": sorted(vocabulary.end_ids),
    }
