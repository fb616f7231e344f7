"""What a run has in its buffers before an op of its plan: another run can go on from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge.engine.engine import Engine
from edge.engine.ops import Buffer, PlanAttention, PlanOp, PlanStore
from edge.native import lib

__all__ = ["WindowPiece", "cuts", "state_bytes", "state_views"]


@dataclass(frozen=True)
class WindowPiece:
    """Tokens of one run. is_scored: whether the logits of all of them are wanted, else of none."""

    tokens: Sequence[int]
    is_scored: bool


def cuts(ops: Sequence[PlanOp]) -> Iterator[int]:
    """The ops before which another layer begins, or what is in front of the layers or behind them.

    No cut separates keys and values from the attentions that read them: some layers read those of
    a layer before, and the cache is empty where a run goes on.
    """
    stored: dict[int, int] = {}
    spans = []
    for i, op in enumerate(ops):
        if isinstance(op, PlanStore):
            stored.setdefault(op.layer, i)
        elif isinstance(op, PlanAttention):
            spans.append((stored[op.layer], i))
    last: str | None = None
    for i, op in enumerate(ops):
        if not op.weights:
            continue
        prefix, _, rest = op.weights[0].partition(".")
        layer = rest.partition(".")[0] if prefix == "blk" else ""
        if last not in (None, layer) and not any(first < i <= end for first, end in spans):
            yield i
        last = layer


def state_bytes(buffers: Sequence[Buffer], op: int, piece: WindowPiece) -> int:
    """Bytes of what a piece has in its buffers before an op."""
    return sum(_bytes_of(buffer, piece) for buffer in _live(buffers, op))


def state_views(engine: Engine, op: int, piece: WindowPiece) -> Iterator[memoryview]:
    """What a piece has in the buffers before an op, to read or to write. A view is valid until the
    next one.
    """
    with memoryview(engine.arena) as arena:
        for buffer in _live(engine.lowered.buffers, op):
            with arena[buffer.offset : buffer.offset + _bytes_of(buffer, piece)] as view:
                yield view


def _live(buffers: Sequence[Buffer], op: int) -> Iterator[Buffer]:
    """The buffers that were written before an op, and are read from it on."""
    return (b for b in buffers if 0 <= b.first < op <= b.last)


def _bytes_of(buffer: Buffer, piece: WindowPiece) -> int:
    has_rows = piece.is_scored or not buffer.logit_rows
    rows = len(piece.tokens) if has_rows else 0
    return int(lib.edge_buffer_bytes(buffer.kind, buffer.dim, rows))
