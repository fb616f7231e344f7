"""edge as a runtime that `runner` measures, and the work of a case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import edge
from edge.bench.runner import Case
from edge.engine.engine import Engine
from edge.engine.ops import PlanGatedMatmul, PlanMatmul
from edge.loading import Loading
from edge.model import open_described
from edge.progress import Progress

if TYPE_CHECKING:
    from edge.backend import Cache

__all__ = ["Ours", "Work", "work"]


class Ours:
    """A loaded model. options: more arguments of `edge.load`; raises what that raises."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None,
        context: int,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        options |= {"context": context, "threads": threads}
        with open_described(os.fspath(path), Loading.of(options)) as described:
            self.engine = described.start(progress)
        self.n_vocab, self.batch = self.engine.n_vocab, self.engine.chunk
        self._caches: dict[int, Cache] = {}  # by depth: a deep one takes long to fill
        self._depth = 0

    def build(self) -> str:
        """The version and the kernels."""
        return f"edge {edge.__version__}: {self.engine.isa}"

    def cut(self, n_tokens: int, depth: int) -> int:
        """See `runner.Runtime`."""
        if depth not in self._caches:
            self._caches[depth] = self.engine.cache()
        self._depth, cache = depth, self._caches[depth]
        cache.trim(min(cache.length, n_tokens))
        return cache.length

    def append(self, tokens: Sequence[int], start: int, last: bool) -> None:
        """See `runner.Runtime`."""
        cache = self._caches[self._depth]
        assert cache.length == start
        self.engine.run(cache, tokens, logits="last" if last else "none")

    def close(self) -> None:
        """Free the caches and the model."""
        for cache in self._caches.values():
            cache.close()
        self.engine.close()

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Work:
    """The work of a case's matmuls.

    macs: multiply-adds with weights per token. bytes: packed weights that are read per token, each
    counted as often as it is read. cache_bytes: keys and values that a token reads, on average.
    """

    macs: float
    bytes: float
    cache_bytes: int


def work(engine: Engine, case: Case) -> Work:
    """The work of a case.

    Ops behind the last attention run only for tokens whose logits are wanted: in a prompt, for the
    last token. An embedding counts only where it is the head too.
    """
    lowered, shapes = engine.lowered, engine.graph.weights
    steps = case.tokens if case.kind == "decode" else 1
    passes = case.tokens if case.kind == "decode" else -(-case.tokens // engine.chunk)
    macs = n_bytes = 0
    for op in lowered.ops:
        if not isinstance(op, (PlanMatmul, PlanGatedMatmul)):
            continue
        has_logit_rows = lowered.buffers[op.output].logit_rows
        for name in op.weights:
            n, k = shapes[name]
            macs += n * k * (steps if has_logit_rows else case.tokens)
            n_bytes += engine.weight_bytes(name) * (steps if has_logit_rows else passes)
    read = 0
    if case.kind == "decode":
        read = engine.cache_bytes(case.depth + (case.tokens + 1) // 2)
    return Work(macs / case.tokens, n_bytes / case.tokens, read)
