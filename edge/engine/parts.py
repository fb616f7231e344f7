"""A model run part by part: some of its layers are in memory at a time.

The first layers run all pieces of all windows of a text. Then they are freed, and the next layers
run the pieces again, from where the first ones stopped. So the weights are read once, whatever the
number of windows, and the memory is that of the largest part. The buffers that a later part reads
are kept in a file without a name.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge.disk.room import cache_dir
from edge.engine.describe import Description
from edge.engine.engine import DescribedFile, Engine
from edge.engine.states import WindowPiece, cuts, state_bytes, state_views
from edge.loading import NativeOptions
from edge.native.cancel import Cancel
from edge.weights.joined import JoinedWeights
from edge.weights.weights import RawWeights

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ModelInParts"]


@dataclass(frozen=True)
class _Part:
    """Ops first .. end - 1 of a plan."""

    first: int
    end: int


class ModelInParts:
    """A GGUF model of which one part is in memory at a time. Close it, or use it in a `with`.

    path, config, gguf, n_vocab: see `Engine`; tokenizer: its tokenizer; ledger: the memory of the
    largest part, and of all else. Raises what `DescribedFile.open` and `new_tokenizer` raise, and
    InputError for a packed file.
    """

    def __init__(self, path: str | os.PathLike[str], options: NativeOptions) -> None:
        self._options = options
        self._described = DescribedFile.open(path, options)
        try:
            description = self._described.description
            self.gguf = self._described.file.unpacked(": a model runs in parts from its source")
            self.path, self.config = self._described.path, description.config
            self.n_vocab = description.graph.dims[description.graph.output]
            self._ops, self._buffers = description.lowered.ops, description.lowered.buffers
            self._parts = _parts_of(description)
            most = max(self._weights(self._described, part).n_bytes for part in self._parts)
            self.ledger = replace(description.ledger, weights=most, least_weights=most)
            self.tokenizer = self._described.new_tokenizer()
        except BaseException:
            self._described.close()
            raise

    @property
    def n_parts(self) -> int:
        """How often each token runs."""
        return len(self._parts)

    def run(
        self,
        windows: Sequence[Sequence[WindowPiece]],
        count: Callable[[int], None],
        cancel: Cancel | None = None,
    ) -> Generator[NDArray[np.float32] | None, None, None]:
        """Run windows, each from an empty cache: yields the logits (tokens, n_vocab) of each piece,
        None where it is not scored, all while the last part runs.

        count(n_tokens): called after each run. Raises what `Engine.run` and `DescribedFile.start`
        raise, and OSError.
        """
        pieces = [piece for window in windows for piece in window]
        places = list(itertools.accumulate(map(self._most_bytes, pieces), initial=0))
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".states-") as states:
            for part in self._parts:
                is_last = part is self._parts[-1]
                place = iter(places)
                with contextlib.closing(self._start(part)) as engine:
                    cache = engine.cache()
                    for window in windows:
                        cache.trim(0)
                        for piece in window:
                            at = next(place)
                            states.seek(at)
                            for view in state_views(engine, part.first, piece):
                                states.readinto(view)
                            logits = engine.run(
                                cache,
                                piece.tokens,
                                logits="all" if piece.is_scored else "none",
                                cancel=cancel,
                            )
                            count(len(piece.tokens))
                            if is_last:
                                yield logits
                                continue
                            states.seek(at)
                            for view in state_views(engine, part.end, piece):
                                states.write(view)
                    cache.close()

    def close(self) -> None:
        """Close the file."""
        self._described.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, part: _Part) -> Engine:
        """An engine whose plan is this part."""
        with DescribedFile.open(self.path, self._options) as described:
            old = described.description
            weights = self._weights(described, part)
            described.description = replace(
                old,
                weights=JoinedWeights(weights),
                lowered=replace(old.lowered, ops=old.lowered.ops[part.first : part.end]),
                ledger=replace(old.ledger, weights=weights.n_bytes, least_weights=weights.n_bytes),
            )
            return described.start()

    def _weights(self, described: DescribedFile, part: _Part) -> RawWeights:
        """The weights of a part, which are packed into memory when it starts."""
        names = {name: None for op in self._ops[part.first : part.end] for name in op.weights}
        weights = RawWeights(described.file.unpacked(""), names)
        weights.fit(self._options.layout)
        return weights

    def _most_bytes(self, piece: WindowPiece) -> int:
        """The most bytes that a piece has between two parts."""
        return max(state_bytes(self._buffers, part.first, piece) for part in self._parts)


def _parts_of(description: Description) -> list[_Part]:
    """The parts of a plan: as many layers as have no more weights than the largest one, or than the
    embeddings or the head.
    """
    ops = description.lowered.ops
    spans = list(itertools.pairwise([0, *cuts(ops), len(ops)]))
    sizes = []
    for first, end in spans:
        names = {name for op in ops[first:end] for name in op.weights}
        sizes.append(sum(map(description.weight_bytes, names)))
    parts, held = list[_Part](), 0
    for (first, end), size in zip(spans, sizes, strict=True):
        if parts and held + size <= max(sizes):
            parts[-1], held = replace(parts[-1], end=end), held + size
        else:
            parts.append(_Part(first, end))
            held = size
    return parts
