"""Dialect cpu: one graph for any number of tokens, with onnxruntime's own operators.

Inputs and outputs are those that onnxruntime-genai expects:

    input_ids int64 (1, n), attention_mask int64 (1, total),
    past_key_values.{i}.key, .value float32 (1, n_kv_heads, past, head_dim)
    -> logits float32 (1, 1, n_vocab) of the last token,
       present.{i}.key, .value like past_key_values

GroupQueryAttention writes the new keys and values at their position, so past and present may be one
buffer. The length of attention_mask says how much of it is filled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import Add, Attention, Embed, Op, RmsNorm, Rope, Rotate, Temperature
from edge.models.common import Config
from edge.onnx.export.linear import BlockLinears
from edge.onnx.export.lowering import Lowering, rotations
from edge.onnx.export.writer import CONTRIB, DataFile, GraphWriter

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DATA", "GRAPH", "write"]

GRAPH, DATA = "model.onnx", "model.onnx.data"

_OPSET = 21
_PARTS = ("key", "value")

# onnxruntime's CPU kernel requires multiples of these, and checks them when it runs.
_HEAD_STEP, _ROTARY_STEP = 16, 16


def write(
    model: GGUF, graph: Graph, config: Config, folder: Path, on_op: Callable[[Op], None]
) -> None:
    """Write model.onnx and its data into a folder. on_op: called after each op.

    Raises UnsupportedError for a model that this dialect cannot express; OSError.
    """
    g = GraphWriter(config.architecture, _OPSET)
    g.output("logits", g.types.FLOAT, [1, 1, graph.dims[graph.output]])
    with DataFile(folder / DATA) as data:
        g.rename(_CpuLowering(graph, config, model, g, data).run(on_op), "logits")
    g.save(folder / GRAPH)


class _CpuLowering(Lowering):
    """Lowers ops to onnxruntime's operators.

    wide: the values that exist for all tokens. Other values are computed only for the last token,
    because no key or value depends on them.
    """

    def __init__(
        self, graph: Graph, config: Config, model: GGUF, g: GraphWriter, data: DataFile
    ) -> None:
        self.blocks = BlockLinears(model, data)
        super().__init__(graph, model, g, self.blocks)
        self.config, self.data = config, data
        last = max(i for i, op in enumerate(graph.ops) if isinstance(op, Attention))
        self.wide = {op.output for op in graph.ops[: last + 1]}
        self.sums: dict[str, tuple[str, str]] = {}
        self.ropes: dict[str, Rope] = {}
        self.tables: dict[Rope, list[str]] = {}
        self.ids = g.input("input_ids", g.types.INT64, [1, "sequence_length"])
        mask = g.input("attention_mask", g.types.INT64, [1, "total_sequence_length"])
        self.positions = ""
        self.total = g.node("Shape", mask, start=1, end=2)
        self.total_int32 = g.node("Cast", self.total, to=g.types.INT32)
        self.last_int32 = g.node("Sub", self.total_int32, g.constant(np.array([1], np.int32)))

    def operand(self, op: Op, value: str) -> str:
        """As in Lowering; but the last token's row, where the op needs no other."""
        x = super().operand(op, value)
        if value in self.wide and op.output not in self.wide:
            return self.g.node("Gather", x, self.g.constant(np.array([-1])), axis=1)
        return x

    def lower_embed(self, op: Embed) -> str:
        """The rows of the embedding, whose weights stay in blocks."""
        return self.blocks.embedding(self.g, self.ids, op.weights[0])

    def lower_add(self, op: Add, x: str, y: str) -> str:
        """x + y. A norm of this sum adds x and y itself, and then no node uses this one."""
        total = super().lower_add(op, x, y)
        self.sums[total] = (x, y)
        return total

    def lower_rms_norm(self, op: RmsNorm, x: str) -> str:
        """One node, which also adds if x is a sum."""
        weight, eps = self.vector(op.weights[0]), op.eps
        if x not in self.sums:
            return self.g.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps)
        self.g.named(
            "SkipSimplifiedLayerNormalization",
            *(*self.sums[x], weight),
            outputs=[f"{x}.norm", "", "", f"{x}.sum"],
            domain=CONTRIB,
            epsilon=eps,
        )
        self.values[op.inputs[0]] = f"{x}.sum"
        return f"{x}.norm"

    def lower_rope(self, op: Rotate, x: str) -> str:
        """Leave the rotation to GroupQueryAttention if its kernel supports it, else rotate here."""
        rope = op.rope
        if rope.n_rot % _ROTARY_STEP == 0 and self._attends(op):
            self.ropes[x] = rope
            return x
        turned = op.n_heads * op.head_dim
        head = self.g.node(
            "RotaryEmbedding",
            *(self.part(x, 0, turned), self._positions(), *self._tables(rope)),
            domain=CONTRIB,
            num_heads=op.n_heads,
            rotary_embedding_dim=rope.n_rot,
            interleaved=int(rope.interleaved),
        )
        return self.among(op, x, head, 0, turned)

    def _attends(self, op: Rotate) -> bool:
        """Whether all that reads the rotated value is an attention."""
        return all(
            isinstance(reader, Attention) for reader in self.graph.ops if op.output in reader.inputs
        )

    def lower_temperature(self, op: Temperature, x: str) -> str:
        """The first elements, times 1 + beta log(1 + floor(position / length))."""
        g = self.g
        times = g.node("Div", self._positions(), g.constant(np.array(op.length)))
        times = g.node("Cast", g.node("Add", times, g.constant(np.array(1))), to=g.types.FLOAT)
        factor = g.node("Mul", g.node("Log", times), self.number(op.beta))
        factor = g.node("Add", factor, self.number(1))
        column = g.node("Unsqueeze", factor, g.constant(np.array([2])))
        scaled = g.node("Mul", self.part(x, 0, op.n), column)
        return self.among(op, x, scaled, 0, op.n)

    def lower_attention(self, op: Attention, x: str) -> str:
        """GroupQueryAttention of x = [q | k | v]."""
        g, layer, heads = self.g, op.layer, op.heads
        if op.reads_only:
            raise self.missing("keys and values of another layer")
        if op.weights:
            raise self.missing("sinks of an attention")
        if heads.head_dim % _HEAD_STEP:
            raise UnsupportedError(
                f"{self.graph.path}: heads of {heads.head_dim}: dialect cpu has multiples of "
                f"{_HEAD_STEP}",
                what=f"head_dim {heads.head_dim}",
            )
        shape: list[int | str] = [1, heads.n_kv_heads, "past_sequence_length", heads.head_dim]
        past = [g.input(f"past_key_values.{layer}.{part}", g.types.FLOAT, shape) for part in _PARTS]
        rope = self.ropes.get(x)
        present = [f"present.{layer}.{part}" for part in _PARTS]
        attended = f"attention.{layer}"
        g.named(
            "GroupQueryAttention",
            *(x, "", "", *past, self.last_int32, self.total_int32),
            *(self._tables(rope) if rope else ()),
            outputs=[attended, *present],
            domain=CONTRIB,
            num_heads=heads.n_heads,
            kv_num_heads=heads.n_kv_heads,
            local_window_size=op.window or -1,
            **({"scale": op.scale} if op.scale else {}),
            **({"softcap": op.softcap} if op.softcap else {}),
            do_rotary=int(rope is not None),
            rotary_interleaved=int(rope is not None and rope.interleaved),
        )
        shape[2] = "total_sequence_length"
        for name in present:
            g.output(name, g.types.FLOAT, shape)
        return attended

    def _positions(self) -> str:
        """The positions of the new tokens, (1, n)."""
        if not self.positions:
            g = self.g
            n = g.node("Shape", self.ids, start=1, end=2)
            scalars = [g.node("Squeeze", v) for v in (g.node("Sub", self.total, n), self.total)]
            span = g.node("Range", *scalars, g.constant(np.array(1)))
            self.positions = g.node("Unsqueeze", span, g.constant(np.array([0])))
        return self.positions

    def _tables(self, rope: Rope) -> list[str]:
        """cos and sin of all positions, (context, n_rot / 2) each."""
        if rope not in self.tables:
            n, g = self.config.n_context, self.g
            self.tables[rope] = [
                g.weight(
                    f"rotary.{len(self.tables)}.{name}",
                    self.data.add(
                        g.types.FLOAT,
                        (n, rope.n_rot // 2),
                        (pieces[i] for pieces in rotations(self.model, rope, n)),
                    ),
                )
                for i, name in enumerate(("cos", "sin"))
            ]
        return self.tables[rope]
