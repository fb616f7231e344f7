"""The plan: a graph lowered to what the native library runs.

Lowering chooses where activations are quantised, and fuses ops where that saves a pass over memory
(norm + quantise, gate_up + activation, matmul + residual, rope + cache write). After the last
attention it drops the tokens whose logits nobody wants. It lays the buffers out in one arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from edge.engine.ops import (
    F32,
    LOGITS,
    MAX_WEIGHTS,
    Q8,
    Q8X2,
    Buffer,
    PlanActivate,
    PlanAdd,
    PlanAngles,
    PlanAttention,
    PlanBias,
    PlanEmbed,
    PlanExpertColumns,
    PlanExpertGain,
    PlanExpertGated,
    PlanExpertMatmul,
    PlanExpertSum,
    PlanGain,
    PlanGated,
    PlanGatedMatmul,
    PlanGather,
    PlanHeadNorm,
    PlanMatmul,
    PlanMultiply,
    PlanNorm,
    PlanOp,
    PlanQuantize,
    PlanRescale,
    PlanRotate,
    PlanRoute,
    PlanScale,
    PlanSlice,
    PlanSoftcap,
    PlanSparsify,
    PlanStore,
    PlanTemperature,
    PlanXielu,
)
from edge.errors import NativeError
from edge.graph.graph import Graph
from edge.graph.ops import (
    Activate,
    Adapt,
    Add,
    Attention,
    Bias,
    Embed,
    Experts,
    Gain,
    GateActivation,
    Gated,
    HeadNorm,
    LayerNorm,
    Matmul,
    Multiply,
    Op,
    Rescale,
    RmsNorm,
    Rope,
    Rotate,
    Route,
    Scale,
    Slice,
    Softcap,
    Sparsify,
    Temperature,
    Xielu,
    assert_never,
    shown_name,
)
from edge.native import ALIGNMENT, PANEL_ROWS, lib

__all__ = ["CHUNK", "KeptInput", "Lowered", "lower"]

#: The most tokens in one native call: enough to keep the matmuls busy, few enough for a progress
#: bar that moves.
CHUNK = 256

_Kind = TypeVar("_Kind", Matmul, Rotate, Attention, Gated, Add)


class KeptInput(NamedTuple):
    """Where an input is after a run. buffer: of floats; op: the first op that reads the input, so
    that a run of the ops before it is enough; routes: of experts, the buffer of what `PlanRoute`
    made, None: no experts read it; in_pairs: whether it has a column for each pair of a token and
    one of its experts, ordered by expert, then by token.
    """

    buffer: int
    op: int
    routes: int | None = None
    in_pairs: bool = False


@dataclass
class Lowered:
    """The ops in order, the buffers that they name, and the bytes of the arena. kept: see `lower`;
    by the names of weights, and by the values that attentions make.
    """

    ops: list[PlanOp]
    buffers: list[Buffer]
    arena_bytes: int
    kept: dict[str, KeptInput] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'op':>4}  {'kind':<13} {'in':>9}  out  weights"]
        for i, op in enumerate(self.ops):
            inputs, weights = " ".join(map(str, op.inputs)), " ".join(map(shown_name, op.weights))
            lines.append(f"{i:>4}  {op.kind:<13} {inputs:>9}  {op.output:>3}  {weights}")
        return "\n".join(lines)


def lower(
    graph: Graph,
    takes_q8: Callable[[str], bool],
    buffer_bytes: Callable[[int, int], int],
    *,
    keeps_inputs: bool = False,
) -> Lowered:
    """Lower a graph. takes_q8(weight): whether its layout multiplies quantised activations;
    buffer_bytes(kind, dim): bytes of a buffer for the most tokens that one run takes.

    keeps_inputs: whether the inputs of all matrices, and of the attentions, stay in the arena as
    floats until the next run. Queries and keys are then rotated. The logits have the same bits.
    """
    lowering = _Lowering(graph, takes_q8, keeps_inputs)
    lowering.run()
    for kept in lowering.kept.values():
        for i in (kept.buffer, kept.routes):
            if i is not None:
                lowering.buffers[i].last = len(lowering.ops) - 1
    arena_bytes = _lay_out(lowering.buffers, buffer_bytes)
    return Lowered(lowering.ops, lowering.buffers, arena_bytes, lowering.kept)


class _Lowering:
    def __init__(
        self, graph: Graph, takes_q8: Callable[[str], bool], keeps_inputs: bool = False
    ) -> None:
        self.graph, self.takes_q8, self.keeps_inputs = graph, takes_q8, keeps_inputs
        readers = (Matmul, Experts, Attention) if keeps_inputs else ()
        self.kept_values = {x for op in graph.ops if isinstance(op, readers) for x in op.inputs}
        self.kept: dict[str, KeptInput] = {}
        self.ops: list[PlanOp] = []
        self.buffers: list[Buffer] = []
        self.makers = {op.output: op for op in graph.ops}
        self.readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for value in op.inputs:
                self.readers.setdefault(value, []).append(op)
        attentions = [i for i, op in enumerate(graph.ops) if isinstance(op, Attention)]
        self.last_attention = attentions[-1] if attentions else -1
        behind = graph.ops[self.last_attention + 1 :] if attentions else []
        self.gathered = {value for op in behind for value in op.inputs}
        self.gathering = False  # behind the last attention: only rows whose logits are wanted
        self.buffer_of: dict[tuple[str, int, bool], int] = {}  # value, kind, logit rows -> buffer
        self.angles: dict[Rope, int] = {}
        self.done: set[str] = set()  # values that a fused op computes

    def run(self) -> None:
        for i, op in enumerate(self.graph.ops):
            if op.output not in self.done:
                self._lower(op)
            if i == self.last_attention:
                self.gathering = True
        if self.buffers[self.ops[-1].output].kind != LOGITS:
            raise NativeError("a graph must end in a matmul that gives the logits")

    # ---- values and buffers ----

    def _emit(self, op: PlanOp) -> int:
        i = len(self.ops)
        self.ops.append(op)
        for buffer in (*op.inputs, op.output):
            b = self.buffers[buffer]
            b.first, b.last = (i if b.first < 0 else b.first), i
        return op.output

    def _new(self, value: str, kind: int = F32) -> int:
        """A fresh buffer for a value."""
        rows = self.gathering or kind == LOGITS
        self.buffers.append(Buffer(kind, self.graph.dims[value], rows))
        self.buffer_of[value, kind, rows] = len(self.buffers) - 1
        return len(self.buffers) - 1

    def _get(self, value: str, kind: int = F32) -> int:
        """The buffer of a value in a form. A form that does not exist yet is made."""
        buffer = self.buffer_of.get((value, kind, self.gathering))
        if buffer is not None:
            return buffer
        if kind in (Q8, Q8X2):
            source = self._get(value)
            return self._emit(PlanQuantize((source,), self._new(value, kind), ()))
        if self.gathering and (value, F32, False) in self.buffer_of:
            source = self.buffer_of[value, F32, False]
            return self._emit(PlanGather((source,), self._new(value), ()))
        raise NativeError(f"value {value} is read before it is made")

    def _only_reader(self, value: str, kind: type[_Kind]) -> _Kind | None:
        """The op that reads a value, if it is the only one and of this kind."""
        readers = self.readers.get(value, [])
        reader = readers[0] if len(readers) == 1 else None
        return reader if isinstance(reader, kind) else None

    def _is_logits(self, value: str) -> bool:
        """Whether a value is the logits, or ops that run in place turn it into them."""
        while value != self.graph.output:
            readers = self.readers.get(value, [])
            in_place = (Adapt, Bias, Gain, Scale, Softcap)
            if len(readers) != 1 or not isinstance(readers[0], in_place):
                return False
            if readers[0].inputs[0] != value:
                return False
            value = readers[0].output
        return True

    def _in_place(self, op: Op) -> tuple[tuple[int], int]:
        """The buffers of an op's input and of its output: the same one if nothing else reads the
        input.
        """
        (value,) = op.inputs
        if len(self.readers[value]) > 1 or value in self.kept_values:
            return (self._get(value),), self._new(op.output)
        buffer = self._overwrite(op)
        return (buffer,), buffer

    def _overwrite(self, op: Op) -> int:
        """The buffer of the op's first input, which becomes that of its output."""
        value = op.inputs[0]
        if len(self.readers[value]) > 1:
            raise NativeError(
                f"the plan computes {op.kind} in place: nothing else may read {value}"
            )
        logits = self.buffer_of.get((value, LOGITS, True))
        i = self._get(value) if logits is None else logits
        buffer = self.buffers[i]
        self.buffer_of[op.output, buffer.kind, buffer.logit_rows] = i
        return i

    # ---- ops of the graph ----

    def _lower(self, op: Op) -> None:
        match op:
            case Embed():
                self._emit(PlanEmbed((), self._new(op.output), op.weights))
            case RmsNorm() | LayerNorm():
                self._norm(op)
            case HeadNorm():
                heads, kind = (op.first, op.n_heads, op.head_dim), (op.eps, op.is_centred)
                self._emit(PlanHeadNorm(*self._in_place(op), op.weights, *heads, *kind))
            case Matmul():
                self._matmul(op)
            case Rotate():
                self._rotate(op)
            case Temperature():
                buffer = self._overwrite(op)
                self._emit(PlanTemperature((buffer,), buffer, (), op.n, op.beta, op.length))
            case Attention():
                self._attention(op)
            case Gated():
                source = self._get(op.inputs[0])
                output = self._new(op.output)
                self._emit(PlanGated((source,), output, (), _number_of(op.activation)))
            case Add():
                inputs = tuple(self._get(value) for value in op.inputs)
                self._emit(PlanAdd(inputs, self._new(op.output), ()))
            case Adapt():
                self._adapt(op)
            case Bias():
                self._emit(PlanBias(*self._in_place(op), op.weights, op.first))
            case Gain():
                self._emit(PlanGain(*self._in_place(op), op.weights, op.first, op.n))
            case Scale():
                self._emit(PlanScale(*self._in_place(op), (), op.factor))
            case Activate():
                activation = _number_of(op.activation)
                self._emit(PlanActivate(*self._in_place(op), (), activation))
            case Xielu():
                numbers = (op.alpha_p, op.alpha_n, op.beta, op.eps)
                self._emit(PlanXielu(*self._in_place(op), (), *numbers))
            case Softcap():
                self._emit(PlanSoftcap(*self._in_place(op), (), op.cap))
            case Multiply():
                inputs = tuple(self._get(value) for value in op.inputs)
                self._emit(PlanMultiply(inputs, self._new(op.output), ()))
            case Slice():
                source = self._get(op.inputs[0])
                self._emit(PlanSlice((source,), self._new(op.output), (), op.first))
            case Sparsify():
                source = self._get(op.inputs[0])
                output = self._new(op.output)
                self._emit(PlanSparsify((source,), output, (), op.n, op.factor))
            case Rescale():
                inputs = tuple(self._get(value) for value in op.inputs)
                self._emit(PlanRescale(inputs, self._new(op.output), (), op.floor))
            case Route():
                self._route(op)
            case Experts():
                self._experts(op)
            case _:
                assert_never(op)

    def _norm(self, op: RmsNorm | LayerNorm) -> None:
        """Quantise in the same op where every reader is a matmul that takes this form. Rows are
        gathered as floats: a value that is read on both sides of the last attention stays so, and
        so does a value that is kept.
        """
        forms = {
            self._form(reader, weight) if isinstance(reader, Matmul) else F32
            for reader in self.readers.get(op.output, [])
            for weight in reader.weights or ("",)
        }
        if (not self.gathering and op.output in self.gathered) or op.output in self.kept_values:
            forms.add(F32)
        source = self._get(op.inputs[0])
        output = self._new(op.output, forms.pop() if len(forms) == 1 else F32)
        self._emit(PlanNorm((source,), output, op.weights, op.eps, isinstance(op, LayerNorm)))

    def _form(self, matmul: Matmul, weight: str) -> int:
        """The form of its input that a matmul takes.

        The input of the output head is quantised twice (Q8X2). Its weights are read for few
        columns, so a second column costs nothing, and the KL divergence to exact activations falls
        from 0.0031 to 0.0023 (SmolLM2 in Q4_1 with a Q8_0 head, 2,000 tokens of English).
        """
        if not self.takes_q8(weight):
            return F32
        return Q8X2 if self._is_logits(matmul.output) else Q8

    def _matmul(self, op: Matmul) -> None:
        gated = self._only_reader(op.output, Gated)
        if gated is not None and self._gated_matmul(op, gated):
            return
        add = self._only_reader(op.output, Add)
        result, residual = op.output, None
        if add is not None and add.inputs[0] != add.inputs[1]:
            other = next(v for v in add.inputs if v != op.output)
            if (other, F32, False) in self.buffer_of or (other, F32, True) in self.buffer_of:
                result, residual = add.output, self._get(other)
                self.done.add(add.output)
        output = self._new(result, LOGITS if self._is_logits(result) else F32)
        column = 0
        for weights in _runs(op.weights, self.takes_q8):
            source = self._get(op.inputs[0], self._form(op, weights[0]))
            inputs = (source,) if residual is None else (source, residual)
            self._keep(op, weights)
            self._emit(PlanMatmul(inputs, output, tuple(weights), column))
            column += sum(self.graph.weights[w][0] for w in weights)

    def _gated_matmul(self, op: Matmul, gated: Gated) -> bool:
        """Fuse a matmul and its activation. False: panels of gate and up do not pair off."""
        dim = self.graph.dims[gated.output]
        rows = [self.graph.weights[w][0] for w in op.weights]
        pairs = rows == [dim, dim] or (rows == [2 * dim] and dim % PANEL_ROWS == 0)
        if not pairs or len(_runs(op.weights, self.takes_q8)) > 1 or self._is_logits(gated.output):
            return False
        source = self._get(op.inputs[0], self._form(op, op.weights[0]))
        output, activation = self._new(gated.output), _number_of(gated.activation)
        self._keep(op, op.weights)
        self._emit(PlanGatedMatmul((source,), output, op.weights, activation))
        self.done.add(gated.output)
        return True

    def _adapt(self, op: Adapt) -> None:
        """A matmul whose second input is the value that it adds to, in place."""
        source = self._get(op.inputs[1], Q8 if self.takes_q8(op.weights[0]) else F32)
        target = self._overwrite(op)
        self._emit(PlanMatmul((source, target), target, op.weights, op.first))

    def _stores(self, op: Rotate) -> Attention | None:
        """The attention whose store op rotates, too: it alone reads all rotated heads."""
        attention = self._only_reader(op.output, Attention)
        if attention is None or attention.reads_only:
            return None
        n_heads = attention.heads.n_heads + attention.heads.n_kv_heads
        return attention if op.n_heads == n_heads else None

    def _rotate(self, op: Rotate) -> None:
        angles, buffer = self._angles(op.rope), self._overwrite(op)
        if self._stores(op) is None:
            heads = (op.n_heads, op.head_dim, op.rope.n_rot, op.rope.interleaved)
            self._emit(PlanRotate((buffer, angles), buffer, (), *heads))

    def _attention(self, op: Attention) -> None:
        heads = (op.layer, op.heads.n_heads, op.heads.n_kv_heads, op.heads.head_dim)
        source, rotation = self._get(op.inputs[0]), self.makers[op.inputs[0]]
        if isinstance(rotation, Rotate) and self._stores(rotation) is not None:
            rope = rotation.rope
            inputs = (source, self._angles(rope))
            self._emit(PlanStore(inputs, source, (), *heads, rope.n_rot, rope.interleaved))
        elif not op.reads_only:
            self._emit(PlanStore((source,), source, (), *heads))
        scores = (op.window, op.scale, op.softcap)
        output = self._new(op.output)
        self._keep(op, [op.output])
        self._emit(PlanAttention((source,), output, op.weights, *heads, *scores))

    def _route(self, op: Route) -> None:
        score = int(getattr(lib, f"EDGE_SCORE_{op.score.upper()}"))
        source, output = self._get(op.inputs[0]), self._new(op.output)
        numbers = (self.graph.dims[op.inputs[0]], op.n_used, score, op.is_normed, op.scale)
        self._emit(PlanRoute((source,), output, op.weights, *numbers))

    def _experts(self, op: Experts) -> None:
        x, routes = (self._get(value) for value in op.inputs)
        counts, t, graph = (op.n_experts, op.n_used), op.tensors, self.graph
        width = graph.weights[t.down][-1]
        gate_up, column = self._unnamed(F32, 2 * width * op.n_used), 0
        for weights in _runs(t.gate_up, self.takes_q8):
            form = Q8 if self.takes_q8(weights[0]) else F32
            columns = self._unnamed(form, self.buffers[x].dim * op.n_used)
            self._keep(op, weights, KeptInput(x, len(self.ops), routes))
            self._emit(PlanExpertColumns((x, routes), columns, (), *counts))
            self._emit(PlanExpertMatmul((columns,), gate_up, tuple(weights), *counts, column))
            column += sum(graph.weights[w][1] for w in weights)
        self._gains(gate_up, t.gate_up_scales, 2 * width, counts)
        activation, takes_q8 = _number_of(op.activation), self.takes_q8(t.down)
        for form in [F32, Q8] if takes_q8 and self.keeps_inputs else [Q8 if takes_q8 else F32]:
            h = self._unnamed(form, width * op.n_used)
            self._emit(PlanExpertGated((gate_up,), h, t.gate_up_biases, *counts, activation))
            if form == F32:
                self._keep(op, [t.down], KeptInput(h, len(self.ops), routes, in_pairs=True))
        each = self._unnamed(F32, graph.dims[op.output] * op.n_used)
        self._emit(PlanExpertMatmul((h,), each, (t.down,), *counts, 0))
        scales = () if t.down_scale is None else (t.down_scale,)
        self._gains(each, scales, graph.dims[op.output], counts)
        bias = () if t.down_bias is None else (t.down_bias,)
        self._emit(PlanExpertSum((each, routes), self._new(op.output), bias, *counts))

    def _keep(
        self, op: Matmul | Attention | Experts, names: Sequence[str], place: KeptInput | None = None
    ) -> None:
        """Keep the input of the op that comes next. names: of it in `Lowered.kept`; place: None:
        that of the op's first input.
        """
        if not self.keeps_inputs:
            return
        if place is None:
            value = op.inputs[0]
            everywhere = self.buffer_of.get((value, F32, False))
            buffer = self._get(value) if everywhere is None else everywhere
            place = KeptInput(buffer, len(self.ops))
        for name in names:
            self.kept.setdefault(name, place)

    def _gains(self, buffer: int, scales: Sequence[str], dim: int, counts: tuple[int, int]) -> None:
        """Multiply parts of equal size of each pair's dim elements by the expert's scales."""
        for i, scale in enumerate(scales):
            n = dim // len(scales)
            self._emit(PlanExpertGain((buffer,), buffer, (scale,), *counts, i * n, n))

    def _unnamed(self, kind: int, dim: int) -> int:
        """A fresh buffer for what is no value of the graph."""
        self.buffers.append(Buffer(kind, dim, self.gathering))
        return len(self.buffers) - 1

    def _angles(self, rope: Rope) -> int:
        """The buffer of cos and sin of every position; all layers with this rope share it."""
        if rope not in self.angles:
            self.buffers.append(Buffer(F32, rope.n_rot, logit_rows=False))
            output, factors = len(self.buffers) - 1, () if rope.factors is None else (rope.factors,)
            numbers = (rope.n_rot, rope.base, rope.scale, rope.magnitude)
            ramp = () if rope.ramp is None else (True, *rope.ramp)
            self.angles[rope] = self._emit(PlanAngles((), output, factors, *numbers, *ramp))
        return self.angles[rope]


def _number_of(activation: GateActivation) -> int:
    """The edge_activation of a name."""
    return int(getattr(lib, f"EDGE_ACTIVATION_{activation.upper()}"))


def _runs(weights: Sequence[str], takes_q8: Callable[[str], bool]) -> list[list[str]]:
    """Split weights into runs of the same input form, of at most MAX_WEIGHTS each."""
    runs: list[list[str]] = []
    for weight in weights:
        if runs and len(runs[-1]) < MAX_WEIGHTS and takes_q8(runs[-1][0]) == takes_q8(weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return runs


def _lay_out(buffers: Sequence[Buffer], buffer_bytes: Callable[[int, int], int]) -> int:
    """Set offsets such that buffers alive at the same op do not overlap. Returns the bytes."""
    taken: dict[int, list[tuple[int, int]]] = {}  # op -> (begin, end) of the buffers alive at it
    total = ALIGNMENT
    for buffer in sorted(buffers, key=lambda b: -buffer_bytes(b.kind, b.dim)):
        size = -(-buffer_bytes(buffer.kind, buffer.dim) // ALIGNMENT) * ALIGNMENT
        begin, alive = 0, range(buffer.first, buffer.last + 1)
        for other_begin, other_end in sorted({s for op in alive for s in taken.get(op, [])}):
            if other_begin < begin + size:
                begin = max(begin, other_end)
        buffer.offset = begin
        for op in alive if size else ():
            taken.setdefault(op, []).append((begin, begin + size))
        total = max(total, begin + size)
    return total
