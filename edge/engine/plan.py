"""The plan: a graph lowered to what the native library runs.

Lowering chooses where quantised activations are made, fuses what saves a pass over memory
(norm + quantise, gate_up + activation, matmul + residual, rope + cache write), drops the tokens
whose logits nobody wants after the last attention, and lays the buffers out in one arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge.errors import NativeError
from edge.graph import Graph, Op, Rope

__all__ = ["F32", "LOGITS", "Q8", "Q8X2", "Buffer", "Lowered", "PlanOp", "lower"]

F32, Q8, Q8X2, LOGITS = range(4)  # edge_buffer_kind
_ACTIVATIONS = {"silu": 0}  # edge_activation
_ALIGN = 64
_MAX_WEIGHTS = 3  # of one op
_PANEL_ROWS = 16


@dataclass
class Buffer:
    """A value in the arena: (rows, dim).

    kind: F32, Q8, Q8X2 or LOGITS; logit_rows: rows of the tokens whose logits are wanted, else of
    all; first, last: the ops that write it first and read it last.
    """

    kind: int
    dim: int
    logit_rows: bool
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclass
class PlanOp:
    """One native op; kind: the name in edge_op_kind, lower case. attrs: fields of edge_op."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    weights: tuple[str, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Lowered:
    """The ops in order, the buffers they name, and the bytes that the buffers share."""

    ops: list[PlanOp]
    buffers: list[Buffer]
    arena_bytes: int

    def __str__(self) -> str:
        lines = [f"{'op':>4}  {'kind':<13} {'in':>9}  out  weights"]
        for i, op in enumerate(self.ops):
            inputs = " ".join(map(str, op.inputs))
            lines.append(
                f"{i:>4}  {op.kind:<13} {inputs:>9}  {op.output:>3}  {' '.join(op.weights)}"
            )
        return "\n".join(lines)


def lower(
    graph: Graph,
    takes_q8: Callable[[str], bool],
    buffer_bytes: Callable[[int, int], int],
) -> Lowered:
    """Lower a graph. takes_q8(weight): whether its layout multiplies quantised activations;
    buffer_bytes(kind, dim): bytes of a buffer for the most tokens that one run takes."""
    lowering = _Lowering(graph, takes_q8)
    lowering.run()
    arena_bytes = _lay_out(lowering.buffers, buffer_bytes)
    return Lowered(lowering.ops, lowering.buffers, arena_bytes)


class _Lowering:
    def __init__(self, graph: Graph, takes_q8: Callable[[str], bool]) -> None:
        self.graph, self.takes_q8 = graph, takes_q8
        self.ops: list[PlanOp] = []
        self.buffers: list[Buffer] = []
        self.makers = {op.output: op for op in graph.ops}
        self.readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for value in op.inputs:
                self.readers.setdefault(value, []).append(op)
        attentions = [i for i, op in enumerate(graph.ops) if op.kind == "attention"]
        self.last_attention = attentions[-1] if attentions else -1
        self.gathering = False  # past the last attention: only rows whose logits are wanted
        self.at: dict[tuple[str, int, bool], int] = {}  # value, kind, logit rows -> buffer
        self.angles: dict[Rope, int] = {}
        self.done: set[str] = set()  # values that a fused op has made already

    def run(self) -> None:
        for i, op in enumerate(self.graph.ops):
            if op.output not in self.done:
                getattr(self, f"_{op.kind}")(op)
            if i == self.last_attention:
                self.gathering = True
        if self.buffers[self.ops[-1].output].kind != LOGITS:
            raise NativeError("a graph must end in a matmul that gives the logits")

    # ---- values and buffers ----

    def _emit(
        self, kind: str, inputs: Sequence[int], output: int, *weights: str, **attrs: Any
    ) -> int:
        i = len(self.ops)
        self.ops.append(PlanOp(kind, tuple(inputs), output, weights, attrs))
        for buffer in (*inputs, output):
            b = self.buffers[buffer]
            b.first, b.last = (i if b.first < 0 else b.first), i
        return output

    def _new(self, value: str, kind: int = F32) -> int:
        """A fresh buffer for a value."""
        rows = self.gathering or kind == LOGITS
        self.buffers.append(Buffer(kind, self.graph.dims[value], rows))
        self.at[value, kind, rows] = len(self.buffers) - 1
        return len(self.buffers) - 1

    def _get(self, value: str, kind: int = F32) -> int:
        """The buffer of a value in a form; makes the form where it is not there yet."""
        found = self.at.get((value, kind, self.gathering))
        if found is not None:
            return found
        if kind in (Q8, Q8X2):
            source = self._get(value)
            return self._emit("quantize", (source,), self._new(value, kind))
        if self.gathering and (value, F32, False) in self.at:
            source = self.at[value, F32, False]
            return self._emit("gather", (source,), self._new(value))
        raise NativeError(f"value {value} is read before it is made")

    def _only_reader(self, value: str, kind: str) -> Op | None:
        """The one op that reads a value, if it is of this kind and the value is no result."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and readers[0].kind == kind else None

    def _is_logits(self, value: str) -> bool:
        return value == self.graph.output

    # ---- ops, by the graph's names ----

    def _embed(self, op: Op) -> None:
        self._emit("embed", (), self._new(op.output), *op.weights)

    def _rms_norm(self, op: Op) -> None:
        """Quantised at once where every reader is a matmul that wants it so."""
        readers = self.readers.get(op.output, [])
        forms = {
            self._form(r, weight) if r.kind == "matmul" else F32
            for r in readers
            for weight in r.weights or ("",)
        }
        source = self._get(op.inputs[0])
        output = self._new(op.output, forms.pop() if len(forms) == 1 else F32)
        self._emit("norm", (source,), output, *op.weights, eps=op.attrs["eps"])

    def _form(self, matmul: Op, weight: str) -> int:
        """The form of the input that a matmul wants.

        The output head's is quantised twice: its weights are read for few columns, so a second
        one costs nothing, and the KL divergence to exact activations falls from 0.0031 to 0.0023
        (SmolLM2 in Q4_1 with a Q8_0 head, 2,000 tokens of English).
        """
        if not self.takes_q8(weight):
            return F32
        return Q8X2 if self._is_logits(matmul.output) else Q8

    def _matmul(self, op: Op) -> None:
        gated = self._only_reader(op.output, "gated")
        if gated is not None and self._gated_matmul(op, gated):
            return
        add = self._only_reader(op.output, "add")
        result, residual = op.output, None
        if add is not None and add.inputs[0] != add.inputs[1]:
            other = next(v for v in add.inputs if v != op.output)
            if (other, F32, False) in self.at or (other, F32, True) in self.at:
                result, residual = add.output, self._get(other)
                self.done.add(add.output)
        output = self._new(result, LOGITS if self._is_logits(result) else F32)
        column = 0
        for weights in _runs(op.weights, self.takes_q8):
            source = self._get(op.inputs[0], self._form(op, weights[0]))
            inputs = (source,) if residual is None else (source, residual)
            self._emit("matmul", inputs, output, *weights, column=column)
            column += sum(self.graph.weights[w][0] for w in weights)

    def _gated_matmul(self, op: Op, gated: Op) -> bool:
        """matmul and gated in one, where panels of gate and up pair off. False: they do not."""
        dim = self.graph.dims[gated.output]
        rows = [self.graph.weights[w][0] for w in op.weights]
        pairs = rows == [dim, dim] or (rows == [2 * dim] and dim % _PANEL_ROWS == 0)
        if not pairs or len(_runs(op.weights, self.takes_q8)) > 1 or self._is_logits(gated.output):
            return False
        source = self._get(op.inputs[0], self._form(op, op.weights[0]))
        self._emit(
            "gated_matmul",
            (source,),
            self._new(gated.output),
            *op.weights,
            activation=_ACTIVATIONS[gated.attrs["activation"]],
        )
        self.done.add(gated.output)
        return True

    def _gated(self, op: Op) -> None:
        activation = _ACTIVATIONS[op.attrs["activation"]]
        source = self._get(op.inputs[0])
        self._emit("gated", (source,), self._new(op.output), activation=activation)

    def _add(self, op: Op) -> None:
        inputs = [self._get(value) for value in op.inputs]
        self._emit("add", inputs, self._new(op.output))

    def _rope(self, op: Op) -> None:
        """Left to the attention that reads it, which rotates as it writes the cache."""
        if self._only_reader(op.output, "attention") is None:
            raise NativeError("the plan rotates only what an attention reads")

    def _attention(self, op: Op) -> None:
        heads = {key: op.attrs[key] for key in ("layer", "n_heads", "n_kv_heads", "head_dim")}
        made = self.makers[op.inputs[0]]
        if made.kind == "rope":
            if made.attrs["n_heads"] != op.attrs["n_heads"] + op.attrs["n_kv_heads"]:
                raise NativeError("the plan rotates all heads of queries and keys, or none")
            if self._only_reader(made.inputs[0], "rope") is None:
                raise NativeError("the plan rotates in place: nothing else may read the value")
            rope: Rope = made.attrs["rope"]
            source = self._get(made.inputs[0])
            self._emit(
                "store",
                (source, self._angles(rope)),
                source,
                n_rot=rope.n_rot,
                interleaved=int(rope.interleaved),
                **heads,
            )
        else:
            source = self._get(op.inputs[0])
            self._emit("store", (source,), source, **heads)
        output = self._new(op.output)
        self._emit("attention", (source,), output, window=op.attrs["window"], **heads)

    def _angles(self, rope: Rope) -> int:
        """cos and sin of every position, made once for all layers."""
        if rope not in self.angles:
            self.buffers.append(Buffer(F32, rope.n_rot, logit_rows=False))
            self.angles[rope] = self._emit(
                "angles",
                (),
                len(self.buffers) - 1,
                *((rope.factors,) if rope.factors else ()),
                n_rot=rope.n_rot,
                base=rope.base,
                scale=rope.scale,
                magnitude=rope.magnitude,
            )
        return self.angles[rope]


def _runs(weights: Sequence[str], takes_q8: Callable[[str], bool]) -> list[list[str]]:
    """Neighbours that take the same input form, at most _MAX_WEIGHTS together."""
    runs: list[list[str]] = []
    for weight in weights:
        if runs and len(runs[-1]) < _MAX_WEIGHTS and takes_q8(runs[-1][0]) == takes_q8(weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return runs


def _lay_out(buffers: Sequence[Buffer], buffer_bytes: Callable[[int, int], int]) -> int:
    """Offsets such that buffers alive at the same op do not overlap; the bytes in all."""
    placed: list[tuple[int, int, Buffer]] = []  # begin, end
    total = _ALIGN
    for buffer in sorted(buffers, key=lambda b: -buffer_bytes(b.kind, b.dim)):
        size = -(-buffer_bytes(buffer.kind, buffer.dim) // _ALIGN) * _ALIGN
        begin = 0
        for other_begin, other_end, other in sorted(placed, key=lambda p: p[0]):
            apart = buffer.last < other.first or other.last < buffer.first
            if not apart and other_begin < begin + size:
                begin = max(begin, other_end)
        buffer.offset = begin
        if size:
            placed.append((begin, begin + size, buffer))
        total = max(total, begin + size)
    return total
