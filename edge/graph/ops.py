"""The ops of a graph, and what they are made of.

Each kind of op is a class, and `Op` is any of them. A reader matches on the classes and ends with
`assert_never`, so mypy reports a class that the reader does not handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NoReturn

from edge.errors import ModelFileError

#: The most elements that a value, or a row or column of a weight, may have.
MAX_DIM = 1 << 24

#: The most elements of a head.
MAX_HEAD_DIM = 512

#: The most ops of a graph.
MAX_OPS = 1 << 17

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
    up, (n_experts, n) each, or none; of down, (n_experts, dim), or None. Scales: a number for each
    expert, (n_experts,), of each tensor of gate_up, or none; of down, or None.
    """

    gate_up: tuple[str, ...]
    down: str
    gate_up_biases: tuple[str, ...] = ()
    down_bias: str | None = None
    gate_up_scales: tuple[str, ...] = ()
    down_scale: str | None = None


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix W (n, k): W x becomes W x + scale * B (A x).

    a: the tensor A, (rank, k); b: B, (n, rank). Of a table of rows (n, k) by token id: A is
    (n, rank) and B (k, rank), a row of A takes the place of A x.
    Source: LoRA (Hu et al. 2021).
    """

    a: str
    b: str
    scale: float


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
class Adapt(_Op):
    """x + [0 | a W.T | 0], where the product begins at element `first`; inputs: x, a."""

    kind = "adapt"
    first: int


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
    of the routes; inputs: x, and what a `Route` made. gate x, up x and down h are multiplied by the
    expert's scale, then its bias is added.

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
    | Adapt
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
