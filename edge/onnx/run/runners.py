"""Runs of graphs in onnxruntime, for each kind of graph, without copies of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.kv.shape import WhenFull
from edge.onnx.files.folder import MASKED, Decoder, Folder, Static, static_shapes
from edge.onnx.run.kv import ArrayLayout, FixedCache, GrowingCache, HostCache

__all__ = ["DecoderRunner", "Runner", "StaticRunner", "Want", "most_tokens"]

Array = NDArray[Any]
Want = Literal["none", "last", "all"]

_CHUNK = 256  # most tokens of a run of a dynamic graph
_MERGED_CHUNK = 512  # of a merged graph, which takes tokens one by one after the first run
_CHUNK_COSTS = 16  # a run of a chunk of n tokens costs at least as much as n / 16 runs of a token


def most_tokens(folder: Folder) -> int:
    """The most tokens of one call of `OnnxEngine.run`."""
    if isinstance(folder, Static):
        return folder.chunk
    return _MERGED_CHUNK if isinstance(folder, Decoder) and folder.branch else _CHUNK


class Runner(Protocol):
    """Runs one model. layout: of its caches."""

    layout: ArrayLayout

    def cache(self, when_full: WhenFull) -> HostCache:
        """A new cache."""

    def pieces(self, start: int, n: int, want: Want) -> Iterator[int]:
        """The numbers of tokens of the runs for n tokens behind the first `start`."""

    def run(self, cache: Any, start: int, tokens: Sequence[int], want: Want) -> Array | None:
        """Run the tokens of one piece.

        Returns logits (rows, n_vocab), at least of the last token; None if they are not wanted.
        """


@dataclass
class _Bound:
    """The io binding of a cache. takes_token: the runner's buffer for one token id is bound.
    makes_row: its buffer for one row of logits is bound. They stay bound for the next token,
    because binding is slow.
    """

    io: Any
    takes_token: bool = False
    makes_row: bool = False


class DecoderRunner:
    """Runs one graph, see `edge.onnx.files.folder.Decoder`."""

    def __init__(self, folder: Decoder, sessions: Mapping[str, Any], n_context: int) -> None:
        self._folder, self._session, self._n_context = folder, sessions["model"], n_context
        self._last_only = folder.last_only
        inputs = folder.graphs["model"].inputs
        self._types = {name: value.dtype for name, value in inputs.items()}
        self._mask = np.ones((1, n_context), self._types[folder.mask])
        self._positions = np.arange(n_context, dtype=self._types.get(folder.positions, "int64"))
        self._rows_shape = (1,) if folder.rows and inputs[folder.rows].dims else ()
        logits = folder.graphs["model"].outputs[folder.logits]
        self._row = np.empty((1, 1, folder.n_vocab), logits.dtype)
        self._token = np.zeros((1, 1), self._types[folder.ids])
        self.layout = ArrayLayout(folder.dtype, folder.n_layers, folder.n_kv_heads, folder.head_dim)

    def cache(self, when_full: WhenFull) -> HostCache:
        """A new cache."""
        kind = FixedCache if self._folder.is_shared else GrowingCache
        return kind(self.layout, self._n_context, when_full)

    def pieces(self, start: int, n: int, want: Want) -> Iterator[int]:
        """All tokens in one run. One by one if all logits are wanted but the graph makes only the
        last, and behind other tokens if the graph is a merged one.
        """
        if (want == "all" and self._last_only) or (self._folder.branch and start):
            yield from (1 for _ in range(n))
        else:
            yield n

    def run(self, cache: Any, start: int, tokens: Sequence[int], want: Want) -> Array | None:
        """One run of the graph."""
        names, n = self._folder, len(tokens)
        bound = cache.bindings.get("model")
        if bound is None:
            bound = _Bound(self._session.io_binding())
            bound.io.bind_output(names.logits)  # first: outputs come in the order of binding
            if isinstance(cache, FixedCache):
                self._bind(bound.io, cache.arrays, cache.arrays)
            cache.bindings["model"] = bound
        io = bound.io
        self._token[0, 0] = tokens[0]
        if not (n == 1 and bound.takes_token):
            ids = self._token if n == 1 else np.array([tokens], self._token.dtype)
            bound.takes_token = False  # in case an interrupt comes before the binding
            io.bind_cpu_input(names.ids, ids)
            bound.takes_token = n == 1
        io.bind_cpu_input(names.mask, self._mask[:, : start + n])
        if names.positions:
            io.bind_cpu_input(names.positions, self._positions[None, start : start + n])
        if names.branch:
            io.bind_cpu_input(names.branch, np.array([start > 0]))
        if names.rows:
            rows = np.full(self._rows_shape, want != "all", self._types[names.rows])  # 0: all
            io.bind_cpu_input(names.rows, rows)
        if isinstance(cache, GrowingCache):
            self._bind(io, *cache.step(start, n))
        is_row = n == 1 or names.last_only or bool(names.rows and want != "all")
        if not (is_row and bound.makes_row):
            bound.makes_row = False
            if is_row:
                _bind_output(io, names.logits, self._row)
            else:
                io.bind_output(names.logits)
            bound.makes_row = is_row
        self._session.run_with_iobinding(io)
        logits: Array = self._row if is_row else io.get_outputs_as_ortvaluevector()[0].numpy()
        logits = logits[0]
        if want == "all" and len(logits) < n:  # the graph did not declare it
            self._last_only = True
            one_by_one = (self.run(cache, start + i, [t], want) for i, t in enumerate(tokens))
            return np.concatenate([row for row in one_by_one if row is not None])
        if isinstance(cache, GrowingCache):
            cache.ran(start + n)
        return None if want == "none" else logits.astype(np.float32)

    def _bind(self, io: Any, past: Sequence[Array], present: Sequence[Array]) -> None:
        """Bind the keys and values that a run reads and writes."""
        inputs = (name for layer in self._folder.kv for name in layer.past)
        outputs = (name for layer in self._folder.kv for name in layer.present)
        for name, array in zip(inputs, past, strict=True):
            io.bind_cpu_input(name, array)
        for name, array in zip(outputs, present, strict=True):
            _bind_output(io, name, array)


class StaticRunner:
    """Runs edge's graphs of fixed shapes: the host looks up embeddings, and owns cache and mask."""

    def __init__(self, folder: Static, sessions: Mapping[str, Any], n_context: int) -> None:
        self._folder, self._n_context, self._all = folder, n_context, folder.context or 0
        self.layout = ArrayLayout(
            folder.dtype, folder.n_layers, folder.n_kv_heads, folder.head_dim, keys_last=True
        )
        self._chunk = _StaticGraph(folder, sessions, "chunk")
        self._token = _StaticGraph(folder, sessions, "token")

    def cache(self, when_full: WhenFull) -> HostCache:
        """A new cache: its arrays have all positions of the graphs, even if the limit is lower."""
        cache = FixedCache(self.layout, self._all, when_full)
        cache.limit = self._n_context
        return cache

    def pieces(self, start: int, n: int, want: Want) -> Iterator[int]:
        """A chunk, which may be padded, and then single tokens, because only they have logits.

        Few tokens are run one by one, because a chunk costs as much as several tokens.
        """
        n_chunked = {"none": n, "last": n - 1, "all": 0}[want]
        if n_chunked > self._folder.chunk // _CHUNK_COSTS:
            yield n_chunked
            n -= n_chunked
        yield from (1 for _ in range(n))

    def run(self, cache: Any, start: int, tokens: Sequence[int], want: Want) -> Array | None:
        """One run of chunk.onnx or token.onnx."""
        graph = self._token if len(tokens) == 1 else self._chunk
        graph.run(cache, start, tokens)
        return graph.logits if want != "none" and len(tokens) == 1 else None


class _StaticGraph:
    """chunk.onnx or token.onnx, with all inputs and outputs except for the cache."""

    def __init__(self, folder: Static, sessions: Mapping[str, Any], name: str) -> None:
        self._name, self._session = name, sessions[name]
        self._n, self._all = (folder.chunk if name == "chunk" else 1), folder.context or 0
        self._names = folder.graphs[name].inputs
        inputs, outputs = static_shapes(folder, self._n, head=name == "token")
        self._ins = {key: np.zeros(inputs[key], np.float32) for key in ("hidden", "cos", "sin")}
        self._mask = np.full(inputs["mask"], MASKED, np.float32)
        self._window = folder.window
        age = np.arange(self._n)[:, None] - np.arange(self._n)  # between tokens of the run
        visible = (age >= 0) & (age < self._window) if self._window else age >= 0
        self._mask[0, 0, :, self._all :][visible] = 0
        self._n_seen = 0  # positions of the cache that the mask shows; -1: unknown
        self._outs = {
            key: np.zeros(shape, folder.dtype if key.startswith("new") else np.float32)
            for key, shape in outputs.items()
        }
        self._new = [array for key, array in self._outs.items() if key.startswith("new")]
        self._ids = np.zeros((1, self._n), np.int64)
        self._positions = np.zeros((1, self._n), np.int64)
        self._embedding = sessions["embedding"]
        self._lookup = self._embedding.io_binding()
        self._lookup.bind_cpu_input("input_ids", self._ids)
        self._lookup.bind_cpu_input("position_ids", self._positions)
        for key, array in self._ins.items():
            _bind_output(self._lookup, key, array)

    @property
    def logits(self) -> Array:
        """A copy of the last run's logits (1, n_vocab), of token.onnx only."""
        return np.array(self._outs["logits"][0])

    def run(self, cache: FixedCache, start: int, tokens: Sequence[int]) -> None:
        """Run tokens, with padding, and write their keys and values to the cache."""
        n = len(tokens)
        self._ids[0, :n] = tokens
        np.minimum(start + np.arange(self._n), self._all - 1, out=self._positions[0])
        self._see(start)
        self._embedding.run_with_iobinding(self._lookup)
        io = cache.bindings.get(self._name)
        if io is None:
            io = cache.bindings[self._name] = self._bind(cache)
        self._session.run_with_iobinding(io)
        cache.write(start, n, self._new)

    def _see(self, length: int) -> None:
        """Let the mask show the first `length` positions of a cache, or those in the window."""
        n_seen, self._n_seen = self._n_seen, -1  # in case an interrupt comes before the end
        if n_seen < 0 or (self._window and max(length, n_seen) + self._n > self._window):
            self._mask[..., : self._all] = MASKED
            for i, row in enumerate(self._mask[0, 0]):
                first = max(0, length + i - self._window + 1) if self._window else 0
                row[first:length] = 0
        else:
            first, last = sorted((length, n_seen))
            self._mask[..., first:last] = 0 if length > n_seen else MASKED
        self._n_seen = length

    def _bind(self, cache: FixedCache) -> Any:
        io = self._session.io_binding()
        past = [
            f"past_{what}.{i}" for i in range(cache.layout.n_layers) for what in ("key", "value")
        ]
        arrays = dict(zip(past, cache.arrays, strict=True))
        for key, array in {**self._ins, "mask": self._mask, **arrays}.items():
            if key in self._names:
                io.bind_cpu_input(key, array)
        for key, array in self._outs.items():
            _bind_output(io, key, array)
        return io


def _bind_output(io: Any, name: str, array: Array) -> None:
    """Bind an output to an array, which must outlive the binding."""
    io.bind_output(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
