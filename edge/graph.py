"""The graph: an architecture as a flat list of ops on named values.

Three readers share it: the native plan (`plan.py`), the numpy referee (`tests/refgraph.py`) and
exporters. A value is a (tokens, dim) float32 matrix; the graph stores its dim. A weight is named
without its `.weight` suffix and has shape (n, k), or (n,) for a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge.errors import ModelFileError

#: The most elements that a value, or a row or column of a weight, may have.
MAX_DIM = 1 << 24


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
    """Raise ModelFileError for divisors of frequencies that are zero, negative or absurd."""
    least, most = min(factors), max(factors)
    if not (least >= 1e-3 and most < 1e9):  # NaN fails too
        raise ModelFileError(
            f"rotary factors from {least} to {most}", path=path, field=f"tensor {weight}.weight"
        )


@dataclass(frozen=True)
class Op:
    """One step: `output = kind(inputs, weights, attrs)`."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    weights: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        operands = ", ".join((*self.inputs, *self.weights))
        return f"{self.output} = {self.kind}({operands})"


class Graph:
    """A flat list of ops, built by an architecture file, checked against the tensors' shapes.

    shapes: tensor name (with its suffix) -> (n, k) or (n,). path: the file, for messages.
    Each method appends one op and returns the name of its output value. The first tensor that is
    missing or has the wrong shape becomes `fault`, the ModelFileError to raise once the graph is
    whole: then it is known whether the file has other tensors in its place.
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
        return f"{weight}.weight" in self.shapes

    def embed(self, weight: str, dim: int | None = None) -> str:
        """Rows of the (n_vocab, dim) table, by token id. dim: as it must be, None: any."""
        n_vocab, dim = self._matrix(weight, k=dim)
        return self._append("embed", (), dim, (weight,), n_vocab=n_vocab)

    def rms_norm(self, x: str, weight: str, eps: float) -> str:
        """x / sqrt(mean(x ** 2) + eps) * weight, over each token's vector."""
        self._vector(weight, self.dims[x])
        return self._append("rms_norm", (x,), self.dims[x], (weight,), eps=eps)

    def matmul(self, x: str, *weights: str, rows: Sequence[int] | None = None) -> str:
        """x @ W.T for each W of shape (n, k), outputs side by side: [W0 x | W1 x | ...].

        rows: the n that each must have, None: any.
        """
        wanted: Sequence[int | None] = rows or [None] * len(weights)
        shapes = [
            self._matrix(weight, n, self.dims[x]) for weight, n in zip(weights, wanted, strict=True)
        ]
        return self._append("matmul", (x,), sum(n for n, _ in shapes), weights)

    def rope(self, x: str, n_heads: int, head_dim: int, rope: Rope) -> str:
        """Rotate the first n_heads heads of x by the token's position, leave the rest alone."""
        if rope.factors is not None:
            self._vector(rope.factors, rope.n_rot // 2)
        weights = (rope.factors,) if rope.factors else ()
        return self._append(
            "rope", (x,), self.dims[x], weights, n_heads=n_heads, head_dim=head_dim, rope=rope
        )

    def attention(
        self, x: str, layer: int, n_heads: int, n_kv_heads: int, head_dim: int, window: int
    ) -> str:
        """Causal attention of q over the cache, after writing k and v to it.

        x = [q: n_heads | k: n_kv_heads | v: n_kv_heads] heads of head_dim. Scores are scaled by
        1 / sqrt(head_dim). window: how many last positions a token sees, itself included; 0: all.
        """
        want = (n_heads + 2 * n_kv_heads) * head_dim
        if self.dims[x] != want:
            raise ModelFileError(
                f"layer {layer} has {self.dims[x]} query, key and value rows, "
                f"its {n_heads} + 2 x {n_kv_heads} heads of {head_dim} need {want}",
                path=self.path,
            )
        return self._append(
            "attention",
            (x,),
            n_heads * head_dim,
            layer=layer,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            window=window,
        )

    def gated(self, x: str, activation: str) -> str:
        """activation(gate) * up, where x = [gate | up]."""
        return self._append("gated", (x,), self.dims[x] // 2, activation=activation)

    def add(self, x: str, y: str) -> str:
        """x + y."""
        return self._append("add", (x, y), self.dims[x])

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))

    def _append(
        self,
        kind: str,
        inputs: tuple[str, ...],
        dim: int,
        weights: tuple[str, ...] = (),
        **attrs: Any,
    ) -> str:
        output = f"{kind}.{len(self.ops)}"
        self.ops.append(Op(kind, inputs, output, weights, attrs))
        self.dims[output] = dim
        self.output = output
        return output

    def _matrix(self, weight: str, n: int | None = None, k: int | None = None) -> tuple[int, int]:
        shape = self.shapes.get(f"{weight}.weight")
        right = shape is not None and len(shape) == 2 and max(shape) <= MAX_DIM
        if shape is None or not right or n not in (None, shape[0]) or k not in (None, shape[1]):
            self._fault(weight, shape, f"({n or 'n'}, {k or 'k'})")
            shape = (n or 0, k or 0)
        self.weights[weight] = shape
        return shape[0], shape[1]

    def _vector(self, weight: str, n: int) -> None:
        shape = self.shapes.get(f"{weight}.weight")
        if shape != (n,):
            self._fault(weight, shape, f"({n},)")
        self.weights[weight] = (n,)

    def _fault(self, weight: str, shape: tuple[int, ...] | None, want: str) -> None:
        if self.fault is None:
            message = "the tensor is missing"
            if shape is not None:
                message = f"shape is {shape}, the model needs {want}, at most 2^24 each"
            field = f"tensor {weight}.weight"
            self.fault = ModelFileError(message, path=self.path, field=field)
