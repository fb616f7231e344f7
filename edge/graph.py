"""The graph: an architecture as a flat list of ops on named values.

Three readers share it: the native plan (`plan.py`), the numpy referee (`tests/refgraph.py`) and the
exporters. A value is a (tokens, dim) float32 matrix; the graph stores its dim. A weight has the
name of its tensor in the file, and the shape (n, k), or (n,) for a vector.

Each kind of op is a class, and `Op` is any of them. A reader matches on the classes and ends with
`assert_never`, so mypy reports a class that the reader does not handle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

from edge.errors import ModelFileError

#: The most elements that a value, or a row or column of a weight, may have.
MAX_DIM = 1 << 24

#: Activation functions of a gate: the names of the enum edge_activation, in lower case.
Activation = Literal["silu"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: how positions become angles.

    angle(position, i) = position * scale / factors[i] * base ** (-2 i / n_rot), i < n_rot / 2;
    cos and sin are multiplied by magnitude. Source: RoFormer (Su et al. 2021); factors and
    magnitude: LongRoPE (Ding et al. 2024), Llama 3.1.
    """

    n_rot: int
    base: float
    interleaved: bool  # pairs (2 i, 2 i + 1); else (i, i + n_rot / 2)
    factors: str | None = None  # a vector of n_rot / 2 divisors
    scale: float = 1.0
    magnitude: float = 1.0


def check_factors(weight: str, factors: Sequence[float], path: str) -> None:
    """Raise ModelFileError for divisors of frequencies outside 1e-3 .. 1e9."""
    least, most = min(factors), max(factors)
    if not (least >= 1e-3 and most < 1e9):  # NaN fails too
        raise ModelFileError(
            f"rotary factors from {least} to {most}", path=path, field=f"tensor {weight}"
        )


@dataclass(frozen=True)
class Heads:
    """n_heads: of queries; n_kv_heads: of keys, and of values; head_dim: elements of each."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


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
class Matmul(_Op):
    """[x W0.T | x W1.T | ...], W of shape (n, k), x of shape (tokens, k)."""

    kind = "matmul"


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
class Attention(_Op):
    """softmax(scale q k.T + mask) v over the cache, after writing k and v to it; x = [q | k | v].

    window: how many last positions a token sees, its own included; 0: all. scale: 0: 1 /
    sqrt(head_dim), the scale of Vaswani et al. 2017.
    """

    kind = "attention"
    layer: int
    heads: Heads
    window: int
    scale: float


@dataclass(frozen=True)
class Gated(_Op):
    """activation(gate) * up, x = [gate | up]."""

    kind = "gated"
    activation: Activation


@dataclass(frozen=True)
class Add(_Op):
    """x + y."""

    kind = "add"


#: Any op.
Op = Embed | RmsNorm | Matmul | Rotate | Attention | Gated | Add


def assert_never(op: NoReturn) -> NoReturn:
    """The end of a `match` that names every class. `typing` has it from Python 3.11 on."""
    raise AssertionError(f"nothing reads {op!r}")


class Graph:
    """A flat list of ops, built by an architecture file, checked against the tensors' shapes.

    shapes: tensor name -> (n, k) or (n,). path: the file, for messages.
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
        """The attention of each layer."""
        return [op for op in self.ops if isinstance(op, Attention)]

    @property
    def ropes(self) -> list[Rope]:
        """The rotary embeddings that are used, each once, in the order of their first use."""
        return list(dict.fromkeys(op.rope for op in self.ops if isinstance(op, Rotate)))

    def embed(self, weight: str, dim: int | None = None) -> str:
        """Rows of the (n_vocab, dim) table, by token id. dim: the dim that the table must have,
        None: any.
        """
        dim = self._matrix(weight, k=dim)[1]
        return self._append(Embed((), self._next(Embed), (weight,)), dim)

    def rms_norm(self, x: str, weight: str, eps: float) -> str:
        """x / sqrt(mean(x ** 2) + eps) * weight, over each token's vector."""
        self._vector(weight, self.dims[x])
        return self._append(RmsNorm((x,), self._next(RmsNorm), (weight,), eps), self.dims[x])

    def matmul(self, x: str, *weights: str, rows: Sequence[int] | None = None) -> str:
        """x @ W.T for each W of shape (n, k), outputs side by side: [W0 x | W1 x | ...].

        rows: the n that each must have, None: any.
        """
        n_rows: Sequence[int | None] = rows or [None] * len(weights)
        shapes = [
            self._matrix(weight, n, self.dims[x]) for weight, n in zip(weights, n_rows, strict=True)
        ]
        return self._append(Matmul((x,), self._next(Matmul), weights), sum(n for n, _ in shapes))

    def rope(self, x: str, n_heads: int, head_dim: int, rope: Rope) -> str:
        """Rotate the first n_heads heads of x by the token's position; keep the other heads."""
        weights = () if rope.factors is None else (rope.factors,)
        for factors in weights:
            self._vector(factors, rope.n_rot // 2)
        op = Rotate((x,), self._next(Rotate), weights, n_heads, head_dim, rope)
        return self._append(op, self.dims[x])

    def attention(
        self, x: str, layer: int, heads: Heads, *, window: int = 0, scale: float = 0.0
    ) -> str:
        """Causal attention of q over the cache, after writing k and v to it.

        x = [q: n_heads | k: n_kv_heads | v: n_kv_heads] heads of head_dim. window: how many last
        positions a token sees, its own included; 0: all. scale: the factor of scores, 0: 1 /
        sqrt(head_dim).
        """
        n_heads, n_kv_heads, head_dim = heads.n_heads, heads.n_kv_heads, heads.head_dim
        want = (n_heads + 2 * n_kv_heads) * head_dim
        if self.dims[x] != want:
            raise ModelFileError(
                f"layer {layer} has {self.dims[x]} query, key and value rows, "
                f"its {n_heads} + 2 x {n_kv_heads} heads of {head_dim} need {want}",
                path=self.path,
            )
        op = Attention((x,), self._next(Attention), (), layer, heads, window, scale)
        return self._append(op, n_heads * head_dim)

    def gated(self, x: str, activation: Activation) -> str:
        """activation(gate) * up, where x = [gate | up]."""
        return self._append(Gated((x,), self._next(Gated), (), activation), self.dims[x] // 2)

    def add(self, x: str, y: str) -> str:
        """x + y."""
        return self._append(Add((x, y), self._next(Add), ()), self.dims[x])

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

    def _vector(self, weight: str, n: int) -> None:
        """Note that the graph reads this vector, of n elements."""
        shape = self.shapes.get(weight)
        if shape != (n,):
            self._fault(weight, shape, f"({n},)")
        self.weights[weight] = (n,)

    def _fault(self, weight: str, shape: tuple[int, ...] | None, want: str) -> None:
        if self.fault is None:
            message = "the tensor is missing"
            if shape is not None:
                message = f"shape is {shape}, the model needs {want}, at most 2^24 each"
            field = f"tensor {weight}"
            self.fault = ModelFileError(message, path=self.path, field=field)
