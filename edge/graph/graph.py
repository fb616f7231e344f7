"""The graph: an architecture as a flat list of ops on named values.

Three readers share it: the native plan (`engine/plan.py`), the numpy referee (`tests/refgraph.py`)
and the exporters. A value is a (tokens, dim) float32 matrix; the graph stores its dim. A weight has
the name of its tensor in the file, and the shape (n, k), or (n,) for a vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edge.errors import ModelFileError
from edge.graph.ops import (
    MAX_DIM,
    MAX_EXPERTS,
    MAX_EXPERTS_USED,
    MAX_HEAD_DIM,
    MAX_OPS,
    Activate,
    Activation,
    Adapt,
    Add,
    Attention,
    Bias,
    Embed,
    Experts,
    ExpertWeights,
    Gain,
    GateActivation,
    Gated,
    HeadNorm,
    Heads,
    LayerNorm,
    LowRank,
    Matmul,
    Multiply,
    Op,
    Rescale,
    RmsNorm,
    Rope,
    Rotate,
    Route,
    Routing,
    Scale,
    Scores,
    Slice,
    Softcap,
    Sparsify,
    Temperature,
    Xielu,
)


class Graph:
    """A flat list of ops, built by an architecture file, checked against the tensors' shapes.

    shapes: tensor name -> (n, k), (n,) or (n_experts, n, k). path: the file, for messages.
    adapters: matrix or table -> what is added to its products or rows, in this order.
    Each method appends one op and returns the name of its output value. The first tensor that is
    missing or has the wrong shape becomes `fault`, the ModelFileError to raise when the graph is
    complete. Only then is it known whether the file has other tensors instead.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        path: str = "model",
        adapters: Mapping[str, Sequence[LowRank]] | None = None,
    ) -> None:
        self.path = path
        self.shapes = shapes
        self.adapters = adapters or {}
        self.ops: list[Op] = []
        self.dims: dict[str, int] = {}
        self.weights: dict[str, tuple[int, ...]] = {}
        self._tables: set[str] = set()
        self.fault: ModelFileError | None = None
        self.output = ""
        self._kept: dict[int, Heads] = {}  # of each layer's first attention

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
        n_rows, dim = self._matrix(weight, n_vocab, dim)
        self._tables.add(weight)
        x = self._append(Embed((), self._next(Embed), (weight,)), dim)
        for low in self.adapters.get(weight, ()):
            x = self._adapt(x, self.embed(low.a, n_vocab=n_rows), low, 0, dim)
        return x

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
        if weight is not None:
            rows = n_heads, head_dim
            has_rows = self.shapes.get(weight) == rows and head_dim <= MAX_HEAD_DIM
            self._vector(weight, *(rows if has_rows else rows[1:]))
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

        rows: the n that each must have, None: any. An adapter of a table does not change it where
        it is the output head, too: the adapter was trained for the rows alone.
        """
        n_rows: Sequence[int | None] = rows or [None] * len(weights)
        shapes = [
            self._matrix(weight, n, self.dims[x]) for weight, n in zip(weights, n_rows, strict=True)
        ]
        h = self._append(Matmul((x,), self._next(Matmul), weights), sum(n for n, _ in shapes))
        first = 0
        for weight, (n, _) in zip(weights, shapes, strict=True):
            for low in () if weight in self._tables else self.adapters.get(weight, ()):
                h = self._adapt(h, self.matmul(x, low.a), low, first, n)
            first += n
        return h

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
        kept = self._kept.setdefault(layer, heads)
        if reads_only and (kept.n_kv_heads, kept.head_dim) != (n_kv_heads, head_dim):
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
        scales = [*tensors.gate_up_scales]
        scales += [] if tensors.down_scale is None else [tensors.down_scale]
        for scale in scales:
            self._vector(scale, n_experts)
        weights = (*tensors.gate_up, tensors.down, *(name for name, _ in biases), *scales)
        op = Experts(
            (x, routes), self._next(Experts), weights, n_experts, n_used, activation, tensors
        )
        return self._append(op, k)

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))

    def _adapt(self, x: str, a: str, low: LowRank, first: int, n: int) -> str:
        """x, with B times a, scaled, added to its n elements from `first` on."""
        if low.scale != 1:
            a = self.scale(a, low.scale)
        self._matrix(low.b, n, self.dims[a])
        return self._append(Adapt((x, a), self._next(Adapt), (low.b,), first), self.dims[x])

    def _next(self, kind: type[Op]) -> str:
        """The name of the value that the next op makes."""
        return f"{kind.kind}.{len(self.ops)}"

    def _append(self, op: Op, dim: int) -> str:
        if len(self.ops) == MAX_OPS:
            raise ModelFileError(f"more than {MAX_OPS} operations", path=self.path)
        if dim > MAX_DIM and self.fault is None:
            message = f"{op.kind} makes {dim} numbers for a token, at most 2^24 run"
            self.fault = ModelFileError(message, path=self.path)
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
