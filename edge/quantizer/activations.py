"""What the matrices of a model read, while the model runs a text.

    with Activations.open("model.gguf") as activations:
        windows = activations.cut([text])
        for window in windows.tokens:
            for n in activations.run(window, [site.weights[0] for site in activations.sites]):
                for site in activations.sites:
                    for expert, x in activations.inputs(site, n): ...

Texts are cut as `llama-imatrix` does: windows of 512 tokens that do not overlap, each from an empty
cache, with a beginning-of-sequence token in place of the first where the model wants one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge.engine.describe import Description
from edge.engine.engine import DescribedFile, Engine
from edge.engine.plan import CHUNK, KeptInput
from edge.errors import InputError, MemoryBudgetError, UnsupportedError
from edge.files.text_file import TextFile
from edge.graph.graph import Graph
from edge.graph.ops import Experts
from edge.loading import Loading, NativeOptions
from edge.native.cancel import Cancel
from edge.onnx import is_onnx
from edge.progress import Progress
from edge.quantizer.imatrix import CONTEXT
from edge.sizes import show
from edge.weights.model_file import open_model
from edge.windows import Windows, cut_tokens

if TYPE_CHECKING:
    from edge.tokenizer import Tokenizer

__all__ = ["Activations", "Site"]

Floats = NDArray[np.float32]

#: The fewest tokens of a run: below this, kernels are slow, and buffers take little memory.
_LEAST_CHUNK = 16
#: Memory for each byte of a text: 8 while it is read, and 8 for a token in the windows.
_TEXT_BYTES = 16


@dataclass(frozen=True)
class Site:
    """A value that matrices read. weights: their names; k: elements for each token; kept: where it
    is after a run; n_experts, n_used: of the experts that read it, 1 and 1: the matrices are none.
    """

    weights: tuple[str, ...]
    k: int
    kept: KeptInput
    n_experts: int = 1
    n_used: int = 1


class Activations:
    """A model whose runs show what its matrices read. Get one with `Activations.open`, and close
    it, or use it in a `with`.

    engine: it runs the model; context: tokens of a window; sites: what its matrices read, in the
    order in which it is computed.
    """

    def __init__(
        self, engine: Engine, description: Description, tokenizer: Tokenizer, context: int
    ) -> None:
        self.engine, self.context = engine, context
        self._vector = description.weights.model.vector
        self.sites = _sites(engine)
        self._tokenizer = tokenizer

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        context: int = CONTEXT,
        threads: int | None = None,
        memory: int | str | None = None,
        progress: Progress | None = None,
    ) -> Activations:
        """Open a GGUF model. context: tokens of a window; threads, memory, progress: see
        `edge.load`.

        Raises what `edge.load` raises; InputError for a packed file, UnsupportedError for ONNX.
        """
        path = os.fsdecode(path)
        if is_onnx(path):
            raise UnsupportedError(
                f"{path} is an ONNX model: name the GGUF file that it was made of",
                what="activations of ONNX models",
            )
        options = Loading.of({"context": context, "threads": threads, "memory": memory}).native
        described = _describe(path, options)
        try:
            described.ledger.require()
            tokenizer = described.new_tokenizer()
            return cls(described.start(progress), described.description, tokenizer, context)
        finally:
            described.close()

    @property
    def graph(self) -> Graph:
        """The model's graph."""
        return self.engine.graph

    @property
    def room(self) -> int | None:
        """Bytes of the memory budget that the model does not take; None: there is no budget."""
        ledger = self.engine.ledger
        # prompts and packing are done with
        own = ledger.needed - ledger.parts["prompt"] - ledger.parts["packing"]
        return None if ledger.budget is None else max(0, ledger.budget - own)

    @property
    def most_text(self) -> int | None:
        """The most bytes of text for which there is room; None: any number."""
        return None if self.room is None else self.room // _TEXT_BYTES

    def read(self, files: Sequence[TextFile]) -> list[str]:
        """The whole of some texts, without a newline at the end, as llama.cpp reads them.

        Raises MemoryBudgetError for more text than there is room for, InputError.
        """
        texts, left = list[str](), self.most_text
        for file in files:
            text = file.read(left)
            if text is None:
                most = self.most_text or 0
                raise MemoryBudgetError(
                    f"{file.name}: the memory budget has room for {show(most)} of text: take less "
                    "text or a larger --memory",
                    needed=most + 1,
                    budget=most,
                )
            left = None if left is None else max(0, left - len(text))
            texts.append(text.removesuffix("\n"))
        return texts

    def cut(
        self, texts: Sequence[str], *, chunks: int | None = None, cancel: Cancel | None = None
    ) -> Windows:
        """The windows of texts, one text after the other; no window has tokens of two texts.

        chunks: the most windows of all texts. Raises what `edge.perplexity.cut` raises.
        """
        tokens: list[Sequence[int]] = []
        for text in texts:
            left = None if chunks is None else chunks - len(tokens)
            if left != 0:
                windows = cut_tokens(
                    self._tokenizer, text, context=self.context, chunks=left, cancel=cancel
                )
                tokens += windows.tokens
        if not tokens:
            raise InputError("there is no text to run")
        return Windows(tuple(tokens), self.context)

    def run(
        self, window: Sequence[int], names: Iterable[str], *, cancel: Cancel | None = None
    ) -> Iterator[int]:
        """Run a window from an empty cache, as far as the inputs of these weights and attentions
        need. Yields after each part of it how many tokens that had: then `inputs` and `queries`
        give what was read.

        Raises what `Engine.run` raises.
        """
        last = max(self.engine.lowered.kept[name].op for name in names)
        cache = self.engine.cache()
        try:
            for start in range(0, len(window), self.engine.chunk):
                part = window[start : start + self.engine.chunk]
                self.engine.run_before(last, cache, part, cancel=cancel)
                yield len(part)
        finally:
            cache.close()

    def inputs(self, site: Site, n_tokens: int) -> list[tuple[int, Floats]]:
        """What was read in the last run: (expert, (n, k)) for each expert that a token reached; the
        only expert is 0 where matrices are none.
        """
        rows = self.engine.kept(site.kept.buffer, n_tokens)
        if site.kept.routes is None:
            return [(0, rows)]
        routes = self.engine.kept(site.kept.routes, n_tokens)
        experts = routes[:, : site.n_used].astype(np.int64).ravel()
        order = np.argsort(experts, kind="stable")
        pairs = rows.reshape(-1, site.k) if site.kept.in_pairs else rows[order // site.n_used]
        ends = np.cumsum(np.bincount(experts, minlength=site.n_experts))
        parts = np.split(pairs, ends[:-1])
        return [(expert, part) for expert, part in enumerate(parts) if len(part)]

    def queries(self, attention: str, n_tokens: int) -> Floats:
        """What the attention that makes this value read in the last run, (n_tokens, heads *
        head_dim): queries and keys, rotated, and values.
        """
        return self.engine.kept(self.engine.lowered.kept[attention].buffer, n_tokens)

    def vector(self, name: str) -> Floats:
        """A vector of the model, (n,) float32."""
        return self._vector(name)

    def require(self, n_bytes: int, what: str) -> None:
        """Raise MemoryBudgetError unless there is room for so many bytes."""
        if self.room is not None and n_bytes > self.room:
            raise MemoryBudgetError(
                f"{self.engine.path}: {what} take {show(n_bytes)}, the memory budget has room for "
                f"{show(self.room)}: raise it (--memory)",
                needed=n_bytes,
                budget=self.room,
            )

    def close(self) -> None:
        """Give the memory back."""
        self.engine.close()

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _describe(path: str, options: NativeOptions) -> DescribedFile:
    """The model with kept inputs, in the longest runs that fit its memory budget."""
    chunk = min(CHUNK, options.context or CHUNK)
    while True:
        file = open_model(path)
        try:
            file.unpacked(": name the GGUF file that it was made of")
            described = DescribedFile(file, options, kept=chunk)
        except BaseException:
            file.close()
            raise
        if described.ledger.fits or chunk <= _LEAST_CHUNK:
            return described
        described.close()
        chunk //= 2


def _sites(engine: Engine) -> tuple[Site, ...]:
    """What matrices read, each value once."""
    graph, lowered = engine.graph, engine.lowered
    experts = {name: op for op in graph.ops if isinstance(op, Experts) for name in op.weights}
    found: dict[tuple[int, bool], Site] = {}
    for name, kept in lowered.kept.items():
        if name not in graph.weights:
            continue  # an attention's
        # experts read rows of their own, also where matrices read the same value
        place = (kept.buffer, kept.routes is not None)
        if place in found:
            found[place] = replace(found[place], weights=(*found[place].weights, name))
            continue
        op = experts.get(name)
        counts = (op.n_experts, op.n_used) if op is not None and kept.routes is not None else (1, 1)
        found[place] = Site((name,), graph.weights[name][-1], kept, *counts)
    return tuple(found.values())
