"""What attention makes of the inputs of its values.

A head's output is o = A V, A its weights of attention (tokens, tokens), and V = X W.T. So o is
(A X) W.T: what counts for the rows of W that make values is A X, not X, of the query heads that
read them. X counts the first token of a text as one of many, but most heads look at it from nearly
every token, and an error in its value is an error of all of them.

Where a head norm follows values, this does not hold, and nothing is mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.graph.graph import Graph
from edge.graph.ops import (
    Attention,
    Bias,
    Gain,
    HeadNorm,
    Matmul,
    Op,
    Rotate,
    Scale,
    Temperature,
)

__all__ = ["ValueRows", "attention_weights", "mixing", "value_rows"]

Floats = NDArray[np.float32]

#: What may lie between a matrix and the attention that reads values of it. All are linear in the
#: values; a head norm is not, where it covers values.
_BETWEEN = (Bias, Gain, HeadNorm, Rotate, Scale, Temperature)


@dataclass(frozen=True)
class ValueRows:
    """Rows of a weight that make the values of a key head. weight: its name; first: the first row;
    n: how many; attention: the op that reads them; head: the key head.
    """

    weight: str
    first: int
    n: int
    attention: Attention
    head: int


def value_rows(graph: Graph) -> list[ValueRows]:
    """All rows that make values of which attention makes a linear thing, in order."""
    makers = {op.output: op for op in graph.ops}
    found: list[ValueRows] = []
    for attention in graph.attentions:
        matmul = _maker(attention, makers)
        if matmul is None or len({*matmul.weights}) < len(matmul.weights):
            continue
        heads, start = attention.heads, 0
        first = (heads.n_heads + heads.n_kv_heads) * heads.head_dim
        for weight in matmul.weights:
            end = start + graph.weights[weight][0]
            for head in range(heads.n_kv_heads):
                begin = max(start, first + head * heads.head_dim)
                n = min(end, first + (head + 1) * heads.head_dim) - begin
                if n > 0:
                    found.append(ValueRows(weight, begin - start, n, attention, head))
            start = end
    return found


def _maker(attention: Attention, makers: dict[str, Op]) -> Matmul | None:
    """The op whose weights make an attention's values; None: something comes between them."""
    heads = attention.heads
    first = (heads.n_heads + heads.n_kv_heads) * heads.head_dim
    op = makers[attention.inputs[0]]
    while isinstance(op, _BETWEEN):
        if isinstance(op, HeadNorm) and op.first + op.n_heads * op.head_dim > first:
            return None
        op = makers[op.inputs[0]]
    return op if isinstance(op, Matmul) else None


def attention_weights(
    op: Attention, x: Floats, sinks: Floats | None, head: int
) -> Iterator[Floats]:
    """The weights (tokens, tokens) of each query head that reads a key head, one after the other.

    x: what the attention reads from an empty cache, (tokens, heads * head_dim); sinks: (n_heads,),
    where it has them.
    """
    n_heads, n_kv_heads, d = op.heads.n_heads, op.heads.n_kv_heads, op.heads.head_dim
    n, per_key = len(x), n_heads // n_kv_heads
    age = np.arange(n)[:, None] - np.arange(n)
    hidden = (age < 0) | ((age >= op.window) if op.window else False)
    scale = np.float32(op.scale or 1 / np.sqrt(d))
    keys = x[:, (n_heads + head) * d : (n_heads + head + 1) * d]
    for i in range(head * per_key, (head + 1) * per_key):
        queries: Floats = np.multiply(x[:, i * d : (i + 1) * d], scale, dtype=np.float32)
        score: Floats = queries @ keys.T
        if op.softcap:
            score = np.float32(op.softcap) * np.tanh(score / np.float32(op.softcap))
        score[hidden] = -np.inf
        most = score.max(axis=1, keepdims=True)
        if sinks is not None:
            most = np.maximum(most, sinks[i])
        np.exp(score - most, out=score)
        total = score.sum(axis=1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks[i] - most)
        score /= total
        yield score


def mixing(op: Attention, x: Floats, sinks: Floats | None, head: int) -> Floats:
    """(tokens, tokens): the sum of A.T A over the query heads of a key head. For the inputs X of
    the values, X.T (this) X is the sum of (A X).T (A X). Arguments: see `attention_weights`.
    """
    total = np.zeros((len(x), len(x)), np.float32)
    for weights in attention_weights(op, x, sinks, head):
        total += weights.T @ weights
    return total
