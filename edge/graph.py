"""The graph: an architecture as a flat list of ops on named values.

Three readers share it: the native plan (`plan.py`), the numpy referee (`tests/refgraph.py`) and the
exporters. A value is a (tokens, dim) float32 matrix; the graph stores its dim. A weight has the
name of its tensor in the file, and the shape (n, k), or (n,) for a vector; stacked matrices of
experts have the shape (n_experts, n, k).

Each kind of op is a class, and `Op` is any of them. A reader matches on the classes and ends with
`assert_never`, so mypy reports a class that the reader does not handle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NoReturn

from edge.errors import ModelFileError

#: The most elements that a value, or a row or column of a weight, may have.
MAX_DIM = 1 << 24

#: The most experts of a layer, and the most that a token uses.
MAX_EXPERTS, MAX_EXPERTS_USED = 1024, 64

#: Activation functions: the names of the enum edge_activation, in lower case.
#:
#: silu: x / (1 + exp(-x)). gelu_tanh: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x ** 3))).
#: gelu_erf: x / 2 * (1 + erf(x / sqrt(2))). relu2: max(x, 0) ** 2. sigmoid: 1 / (1 + exp(-x)).
#: swiglu_oai: of a gate only, with the up beside it (gpt-oss): g / (1 + exp(-1.702 g)) * (u + 1),
#: g = min(gate, 7), u = up within -7 .. 7.
Activation = Literal["silu", "gelu_tanh", "gelu_erf", "relu2", "sigmoid", "tanh"]
#: Of a `Gated` op.
GateActivation = Literal[Activation, "swiglu_oai"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: how positions become angles.

    angle(position, i) = position * s(i) / factors[i] * base ** (-2 i / n_rot), i < n_rot / 2;
    cos and sin are multiplied by magnitude. s(i) is scale, or with a ramp (low, high), YaRN's:
    r + (1 - r) * scale, where r = 1 - (i - low) / max(0.001, high - low), within 0 .. 1.
    Source: RoFormer (Su et al. 2021); factors and magnitude: LongRoPE (Ding et al. 2024), Llama
    3.1; ramp: YaRN (Peng et al. 2023).
    """

    n_rot: int
    base: float
    interleaved: bool  # pairs (2 i, 2 i + 1); else (i, i + n_rot / 2)
    factors: str | None = None  # a vector of n_rot / 2 divisors
    scale: float = 1.0
    magnitude: float = 1.0
    ramp: tuple[float, float] | None = field(default=None, repr=False)


def check_factors(weight: str, factors: Sequence[float], path: str) -> None:
    """Raise ModelFileError for divisors of frequencies outside 1e-3 .. 1e31.

    Gemma 4 divides by 1e30 where it does not rotate.
    """
    least, most = min(factors), max(factors)
    if not (least >= 1e-3 and most <= 1e31):  # NaN fails too
        raise ModelFileError(
            f"rotary factors from {least} to {most}", path=path, field=f"tensor {weight}"
        )


@dataclass(frozen=True)
class Heads:
    """n_heads: of queries; n_kv_heads: of keys, and of values; head_dim: elements of each."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Scores:
    """How an attention turns products of queries and keys into weights; see `Attention`."""

    window: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    sinks: str | None = None


#: How a router's numbers become the weights of experts, see `Route`.
Score = Literal["given", "softmax", "softmax_of_chosen"]


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen and weighed; see `Route`."""

    n_used: int
    score: Score = "softmax"
    is_normed: bool = False
    scale: float = 1.0
    bias: str | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """The tensors of a layer's experts. gate_up: gate and up, (n_experts, n, k) each, or one of
    (n_experts, 2 n, k), rows of gate, then of up; down: (n_experts, dim, n). Biases: of gate and
    up, (n_experts, n) each, or none; of down, (n_experts, dim), or None.
    """

    gate_up: tuple[str, ...]
    down: str
    gate_up_biases: tuple[str, ...] = ()
    down_bias: str | None = None


def shown_name(tensor: str) -> str:
    """A tensor's name in tables for people: without `.weight`, the end of nearly all names."""
    return tensor.removesuffix(".weight")


@dataclass(frozen=True)
class _Op:
    """An op. inputs: the values that it reads; output: the value that it makes; weights: the
    tensors that it reads; kind: its name in the names of values and in tables.
    """

    kind: ClassVar[str]
    inputs: tuple[str, ...]
    output: str
    weights: tuple[str, ...]

    def __str__(self) -> str:
        operands = ", ".join((*self.inputs, *map(shown_name, self.weights)))
        return f"{self.output} = {self.kind}({operands})"


@dataclass(frozen=True)
class Embed(_Op):
    """Rows of a (n_vocab, dim) table, by token id."""

    kind = "embed"


@dataclass(frozen=True)
class RmsNorm(_Op):
    """x / sqrt(mean(x ** 2) + eps) * w, over each token's vector."""

    kind = "rms_norm"
    eps: float


@dataclass(frozen=True)
class LayerNorm(_Op):
    """(x - mean(x)) / sqrt(var(x) + eps) * w (+ b), over each token's vector.

    weights: w, or w and b.
    """

    kind = "layer_norm"
    eps: float


@dataclass(frozen=True)
class HeadNorm(_Op):
    """A norm of each of n_heads heads of head_dim elements from element `first` on; the other
    elements stay.

    is_centred: as `LayerNorm` (without b), else as `RmsNorm`. weights: none; or one of head_dim
    elements, for all heads; or of shape (n_heads, head_dim). n_heads 1: a norm over a range.
    """

    kind = "head_norm"
    first: int
    n_heads: int
    head_dim: int
    eps: float
    is_centred: bool


@dataclass(frozen=True)
class Matmul(_Op):
    """[x W0.T | x W1.T | ...], W of shape (n, k), x of shape (tokens, k)."""

    kind = "matmul"


@dataclass(frozen=True)
class Bias(_Op):
    """x + [0 | b0 | b1 | ... | 0], where b0 begins at element `first`. At most 3 weights."""

    kind = "bias"
    first: int


@dataclass(frozen=True)
class Gain(_Op):
    """Elements first .. first + n - 1 of x, times w; the other elements stay. w has n elements, or
    one.
    """

    kind = "gain"
    first: int
    n: int


@dataclass(frozen=True)
class Rotate(_Op):
    """The first n_heads heads of x, rotated by the token's position; the other heads unchanged.

    weights: the rotary factors, if any.
    """

    kind = "rope"
    n_heads: int
    head_dim: int
    rope: Rope


@dataclass(frozen=True)
class Temperature(_Op):
    """The first n elements of x, times 1 + beta * log(1 + floor(position / length)).

    Source: Llama 4's and Ministral 3's scaling of queries at far positions.
    """

    kind = "temperature"
    n: int
    beta: float
    length: int


@dataclass(frozen=True)
class Attention(_Op):
    """softmax(scale q k.T + mask) v over the cache, after writing k and v to it; x = [q | k | v].

    window: how many last positions a token sees, its own included; 0: all. scale: 0: 1 /
    sqrt(head_dim), the scale of Vaswani et al. 2017. softcap: 0, or scores become softcap *
    tanh(score / softcap) (Gemma 2). weights: none, or the sinks (n_heads,): one more score for each
    head, which takes part in the sum of the softmax alone (gpt-oss). reads_only: x = [q], keys and
    values are those that an earlier op of this `layer` wrote.
    """

    kind = "attention"
    layer: int
    heads: Heads
    window: int
    scale: float
    softcap: float = 0.0
    reads_only: bool = False


@dataclass(frozen=True)
class Gated(_Op):
    """activation(gate) * up, x = [gate | up]."""

    kind = "gated"
    activation: GateActivation


@dataclass(frozen=True)
class Activate(_Op):
    """activation(x)."""

    kind = "activate"
    activation: Activation


@dataclass(frozen=True)
class Xielu(_Op):
    """x > 0: alpha_p x ** 2 + beta x; else alpha_n (expm1(min(x, eps)) - x) + beta x.

    Source: Apertus; Huang & Schlag 2024.
    """

    kind = "xielu"
    alpha_p: float
    alpha_n: float
    beta: float
    eps: float


@dataclass(frozen=True)
class Sparsify(_Op):
    """max(0, x - mean - factor * std) of the first n elements, mean and std taken over these; the
    other elements stay. std: sqrt(mean((x - mean) ** 2)).

    Source: Gemma 3n, whose factor keeps the largest 5 % of a normal distribution.
    """

    kind = "sparsify"
    n: int
    factor: float


@dataclass(frozen=True)
class Rescale(_Op):
    """x * sqrt(mean(y ** 2)) / sqrt(max(mean(x ** 2), floor)): x, as large as y."""

    kind = "rescale"
    floor: float


@dataclass(frozen=True)
class Scale(_Op):
    """x * factor."""

    kind = "scale"
    factor: float


@dataclass(frozen=True)
class Softcap(_Op):
    """cap * tanh(x / cap)."""

    kind = "softcap"
    cap: float


@dataclass(frozen=True)
class Add(_Op):
    """x + y."""

    kind = "add"


@dataclass(frozen=True)
class Multiply(_Op):
    """x * y; y has as many elements as x, or one for each token."""

    kind = "multiply"


@dataclass(frozen=True)
class Slice(_Op):
    """Elements first .. first + n - 1 of x, where n is the dim of the output."""

    kind = "slice"
    first: int


@dataclass(frozen=True)
class Route(_Op):
    """The experts of each token: [n_used indices | their weights], from a score of each expert.

    The highest scores are chosen, equal ones by index. weights: none, or a vector that is added to
    the scores for this choice alone. score: "given": the scores are the weights; "softmax": after a
    softmax over all experts, before the choice; "softmax_of_chosen": after one over the chosen
    experts. is_normed: the weights are then divided by their sum (by 1e-12 at least); at last they
    are multiplied by scale.
    """

    kind = "route"
    n_used: int
    score: Score
    is_normed: bool
    scale: float


@dataclass(frozen=True)
class Experts(_Op):
    """The sum over a token's experts of weight * (down (activation(gate x) * up x)), in the order
    of the routes; inputs: x, and what a `Route` made. Biases are added to gate x, up x and down h.

    weights: the tensors of `tensors`, in the order of its fields.
    """

    kind = "experts"
    n_experts: int
    n_used: int
    activation: GateActivation
    tensors: ExpertWeights


#: Any op.
Op = (
    Embed
    | RmsNorm
    | LayerNorm
    | HeadNorm
    | Matmul
    | Bias
    | Gain
    | Rotate
    | Temperature
    | Attention
    | Gated
    | Activate
    | Xielu
    | Sparsify
    | Rescale
    | Scale
    | Softcap
    | Add
    | Multiply
    | Slice
    | Route
    | Experts
)


def assert_never(op: NoReturn) -> NoReturn:
    """The end of a `match` that names every class. `typing` has it from Python 3.11 on."""
    raise AssertionError(f"nothing reads {op!r}")


class Graph:
    """A flat list of ops, built by an architecture file, checked against the tensors' shapes.

    shapes: tensor name -> (n, k), (n,) or (n_experts, n, k). path: the file, for messages.
    Each method appends one op and returns the name of its output value. The first tensor that is
    missing or has the wrong shape becomes `fault`, the ModelFileError to raise when the graph is
    complete. Only then is it known whether the file has other tensors instead.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], path: str = "model") -> None:
        self.path = path
        self.shapes = shapes
        self.ops: list[Op] = []
        self.dims: dict[str, int] = {}
        self.weights: dict[str, tuple[int, ...]] = {}
        self.fault: ModelFileError | None = None
        self.output = ""

    def has(self, weight: str) -> bool:
        """Whether the file holds this weight."""
        return weight in self.shapes

    @property
    def attentions(self) -> list[Attention]:
        """The attentions that write keys and values: one for each layer that has its own."""
        return [op for op in self.ops if isinstance(op, Attention) and not op.reads_only]

    @property
    def ropes(self) -> list[Rope]:
        """The rotary embeddings that are used, each once, in the order of their first use."""
        return list(dict.fromkeys(op.rope for op in self.ops if isinstance(op, Rotate)))

    def embed(self, weight: str, dim: int | None = None, n_vocab: int | None = None) -> str:
        """Rows of the (n_vocab, dim) table, by token id. dim, n_vocab: what the table must have,
        None: any.
        """
        dim = self._matrix(weight, n_vocab, dim)[1]
        return self._append(Embed((), self._next(Embed), (weight,)), dim)

    def rms_norm(self, x: str, weight: str, eps: float) -> str:
        """x / sqrt(mean(x ** 2) + eps) * weight, over each token's vector."""
        self._vector(weight, self.dims[x])
        return self._append(RmsNorm((x,), self._next(RmsNorm), (weight,), eps), self.dims[x])

    def layer_norm(self, x: str, weight: str, eps: float, bias: str | None = None) -> str:
        """(x - mean(x)) / sqrt(var(x) + eps) * weight (+ bias), over each token's vector."""
        weights = (weight,) if bias is None else (weight, bias)
        for name in weights:
            self._vector(name, self.dims[x])
        return self._append(LayerNorm((x,), self._next(LayerNorm), weights, eps), self.dims[x])

    def head_norm(
        self,
        x: str,
        weight: str | None,
        eps: float,
        heads: tuple[int, int, int],
        *,
        is_centred: bool = False,
    ) -> str:
        """A norm of each head; the other elements stay. heads: first element, number, elements of
        each. weight: of the elements of a head, or a row for each head; None: no weight.
        """
        first, n_heads, head_dim = heads
        if weight is not None and self.shapes.get(weight) == (n_heads, head_dim):
            self._vector(weight, n_heads, head_dim)
        elif weight is not None:
            self._vector(weight, head_dim)
        weights = () if weight is None else (weight,)
        op = HeadNorm(
            (x,), self._next(HeadNorm), weights, first, n_heads, head_dim, eps, is_centred
        )
        return self._append(op, self.dims[x])

    def bias(self, x: str, *weights: str, dims: Sequence[int] | None = None, first: int = 0) -> str:
        """x + [0 | weights side by side | 0], from element `first` on. dims: of each weight; None:
        of the only one, all of x.
        """
        for weight, n in zip(weights, dims or [self.dims[x]], strict=True):
            self._vector(weight, n)
        return self._append(Bias((x,), self._next(Bias), weights, first), self.dims[x])

    def gain(self, x: str, weight: str, n: int | None = None, first: int = 0) -> str:
        """Elements first .. first + n - 1 of x, times weight, a vector of n or of one element; the
        other elements stay. n: None: all of x.
        """
        n = self.dims[x] if n is None else n
        self._vector(weight, 1 if self.shapes.get(weight) == (1,) else n)
        return self._append(Gain((x,), self._next(Gain), (weight,), first, n), self.dims[x])

    def matmul(self, x: str, *weights: str, rows: Sequence[int] | None = None) -> str:
        """x @ W.T for each W of shape (n, k), outputs side by side: [W0 x | W1 x | ...].

        rows: the n that each must have, None: any.
        """
        n_rows: Sequence[int | None] = rows or [None] * len(weights)
        shapes = [
            self._matrix(weight, n, self.dims[x]) for weight, n in zip(weights, n_rows, strict=True)
        ]
        return self._append(Matmul((x,), self._next(Matmul), weights), sum(n for n, _ in shapes))

    def matmul_stack(self, x: str, weight: str, n: int) -> str:
        """[W0 x | W1 x | ...] for a tensor that holds n square matrices, (n, dim, dim)."""
        dim, shape = self.dims[x], self.shapes.get(weight)
        if shape != (n, dim, dim):
            self._fault(weight, shape, f"({n}, {dim}, {dim})")
        self.weights[weight] = (n * dim, dim)
        return self._append(Matmul((x,), self._next(Matmul), (weight,)), n * dim)

    def matmul_row(self, x: str, weight: str) -> str:
        """One number for each token: its product with a tensor that is a vector."""
        k = self.dims[x]
        self._exactly(weight, (k,), is_possible=True)
        self.weights[weight] = (1, k)
        return self._append(Matmul((x,), self._next(Matmul), (weight,)), 1)

    def rope(self, x: str, n_heads: int, head_dim: int, rope: Rope) -> str:
        """Rotate the first n_heads heads of x by the token's position; keep the other heads."""
        weights = () if rope.factors is None else (rope.factors,)
        for factors in weights:
            self._vector(factors, rope.n_rot // 2)
        op = Rotate((x,), self._next(Rotate), weights, n_heads, head_dim, rope)
        return self._append(op, self.dims[x])

    def temperature(self, x: str, n: int, beta: float, length: int) -> str:
        """The first n elements of x, times 1 + beta * log(1 + floor(position / length))."""
        op = Temperature((x,), self._next(Temperature), (), n, beta, length)
        return self._append(op, self.dims[x])

    def attention(
        self,
        x: str,
        layer: int,
        heads: Heads,
        scores: Scores | None = None,
        *,
        reads_only: bool = False,
    ) -> str:
        """Causal attention of q over the cache, after writing k and v to it.

        x = [q: n_heads | k: n_kv_heads | v: n_kv_heads] heads of head_dim. reads_only: x = [q], and
        nothing is written: keys and values are those of an earlier attention of this `layer`.
        scores: None: no window, and the scale 1 / sqrt(head_dim).
        """
        n_heads, n_kv_heads, head_dim = heads.n_heads, heads.n_kv_heads, heads.head_dim
        n_written = 0 if reads_only else 2 * n_kv_heads
        want = (n_heads + n_written) * head_dim
        if self.dims[x] != want:
            raise ModelFileError(
                f"layer {layer} has {self.dims[x]} query, key and value rows, "
                f"its {n_heads} + {n_written} heads of {head_dim} need {want}",
                path=self.path,
            )
        kept = {op.layer: op.heads for op in self.attentions}.get(layer)
        if (
            reads_only
            and kept is not None
            and (kept.n_kv_heads, kept.head_dim)
            != (
                n_kv_heads,
                head_dim,
            )
        ):
            raise ModelFileError(
                f"layer {layer} keeps {kept.n_kv_heads} key heads of {kept.head_dim}, "
                f"another layer reads them as {n_kv_heads} of {head_dim}",
                path=self.path,
            )
        scores = scores or Scores()
        weights = () if scores.sinks is None else (scores.sinks,)
        for sinks in weights:
            self._vector(sinks, n_heads)
        op = Attention(
            (x,),
            self._next(Attention),
            weights,
            layer,
            heads,
            scores.window,
            scores.scale,
            scores.softcap,
            reads_only,
        )
        return self._append(op, n_heads * head_dim)

    def gated(self, x: str, activation: GateActivation) -> str:
        """activation(gate) * up, where x = [gate | up]."""
        return self._append(Gated((x,), self._next(Gated), (), activation), self.dims[x] // 2)

    def activate(self, x: str, activation: Activation) -> str:
        """activation(x)."""
        return self._append(Activate((x,), self._next(Activate), (), activation), self.dims[x])

    def xielu(self, x: str, alpha_p: float, alpha_n: float, beta: float, eps: float) -> str:
        """The activation of `Xielu`."""
        op = Xielu((x,), self._next(Xielu), (), alpha_p, alpha_n, beta, eps)
        return self._append(op, self.dims[x])

    def sparsify(self, x: str, n: int, factor: float) -> str:
        """max(0, x - mean - factor * std) of the first n elements; the other elements stay."""
        return self._append(Sparsify((x,), self._next(Sparsify), (), n, factor), self.dims[x])

    def rescale(self, x: str, y: str, floor: float) -> str:
        """x * sqrt(mean(y ** 2)) / sqrt(max(mean(x ** 2), floor))."""
        return self._append(Rescale((x, y), self._next(Rescale), (), floor), self.dims[x])

    def scale(self, x: str, factor: float) -> str:
        """x * factor."""
        return self._append(Scale((x,), self._next(Scale), (), factor), self.dims[x])

    def softcap(self, x: str, cap: float) -> str:
        """cap * tanh(x / cap)."""
        return self._append(Softcap((x,), self._next(Softcap), (), cap), self.dims[x])

    def add(self, x: str, y: str) -> str:
        """x + y."""
        return self._append(Add((x, y), self._next(Add), ()), self.dims[x])

    def multiply(self, x: str, y: str) -> str:
        """x * y; y has as many elements as x, or one."""
        return self._append(Multiply((x, y), self._next(Multiply), ()), self.dims[x])

    def slice(self, x: str, first: int, n: int) -> str:
        """Elements first .. first + n - 1 of x."""
        return self._append(Slice((x,), self._next(Slice), (), first), n)

    def route(self, x: str, routing: Routing) -> str:
        """The experts of each token, from a score of each expert."""
        n_experts, n_used = self.dims[x], routing.n_used
        if not 0 < n_used <= min(n_experts, MAX_EXPERTS_USED) or n_experts > MAX_EXPERTS:
            raise ModelFileError(
                f"{n_used} of {n_experts} experts for a token: from 1 to all of them, at most "
                f"{MAX_EXPERTS_USED} of {MAX_EXPERTS}",
                path=self.path,
            )
        weights = () if routing.bias is None else (routing.bias,)
        for bias in weights:
            self._vector(bias, n_experts)
        r = routing
        op = Route((x,), self._next(Route), weights, n_used, r.score, r.is_normed, r.scale)
        return self._append(op, 2 * n_used)

    def experts(
        self,
        x: str,
        routes: str,
        tensors: ExpertWeights,
        sizes: tuple[int, int],
        activation: GateActivation,
    ) -> str:
        """The weighted sum of the outputs of each token's experts. routes: of `route`; sizes: how
        many experts there are, and the width of one.
        """
        (n_experts, width), k = sizes, self.dims[x]
        n_used = self.dims[routes] // 2
        if n_used * max(2 * width, k) > MAX_DIM:
            raise ModelFileError(
                f"{n_used} experts of width {width} for a token: too many numbers", path=self.path
            )
        n = width if len(tensors.gate_up) == 2 else 2 * width
        for weight in tensors.gate_up:
            self._stack(weight, n_experts, n, k)
        self._stack(tensors.down, n_experts, k, width)
        biases = [(name, width) for name in tensors.gate_up_biases]
        biases += [] if tensors.down_bias is None else [(tensors.down_bias, k)]
        for bias, dim in biases:
            self._vector(bias, n_experts, dim)
        weights = (*tensors.gate_up, tensors.down, *(name for name, _ in biases))
        op = Experts(
            (x, routes), self._next(Experts), weights, n_experts, n_used, activation, tensors
        )
        return self._append(op, k)

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))

    def _next(self, kind: type[Op]) -> str:
        """The name of the value that the next op makes."""
        return f"{kind.kind}.{len(self.ops)}"

    def _append(self, op: Op, dim: int) -> str:
        self.ops.append(op)
        self.dims[op.output] = dim
        self.output = op.output
        return op.output

    def _matrix(self, weight: str, n: int | None = None, k: int | None = None) -> tuple[int, int]:
        """Note that the graph reads this matrix; returns its shape. n, k: as they must be, None:
        any.
        """
        shape = self.shapes.get(weight)
        is_matrix = shape is not None and len(shape) == 2 and max(shape) <= MAX_DIM
        if shape is None or not is_matrix or n not in (None, shape[0]) or k not in (None, shape[1]):
            self._fault(weight, shape, f"({n or 'n'}, {k or 'k'})")
            shape = (n or 0, k or 0)
        self.weights[weight] = shape
        return shape[0], shape[1]

    def _vector(self, weight: str, *want: int) -> None:
        """Note that the graph reads this vector of floats, of shape (n,), or of rows (heads, n)."""
        self._exactly(weight, want, is_possible=math.prod(want) <= MAX_DIM)

    def _stack(self, weight: str, *want: int) -> None:
        """Note that the graph reads these stacked matrices, (n_experts, n, k)."""
        is_possible = max(want) <= MAX_DIM and want[0] * want[1] < 1 << 31
        self._exactly(weight, want, is_possible=is_possible)

    def _exactly(self, weight: str, want: tuple[int, ...], *, is_possible: bool) -> None:
        """Note that the graph reads a tensor, which must have this shape."""
        shape = self.shapes.get(weight)
        if shape != want or not is_possible:
            self._fault(weight, shape, f"({', '.join(map(str, want))}{',' * (len(want) == 1)})")
        self.weights[weight] = want

    def _fault(self, weight: str, shape: tuple[int, ...] | None, want: str) -> None:
        if self.fault is None:
            message = "the tensor is missing"
            if shape is not None:
                message = f"shape is {shape}, the model needs {want}, at most 2^24 each"
            field = f"tensor {weight}"
            self.fault = ModelFileError(message, path=self.path, field=field)
