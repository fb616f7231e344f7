"""The native engine: it opens a model file, starts it, and runs tokens."""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge import forked, native
from edge.device import cores, memory
from edge.device.cores import Choice
from edge.engine.describe import Description, describe
from edge.engine.ledger import Ledger
from edge.errors import EdgeError, InputError, MemoryBudgetError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.ops import check_factors, shown_name
from edge.kv.cache import KVCache
from edge.kv.page_store import PageStore
from edge.kv.pool import PagePool
from edge.kv.shape import WhenFull, kv_types
from edge.loading import Loading, LoadOptions, NativeOptions
from edge.native import CData, ffi, lib
from edge.native.cancel import Cancel
from edge.progress import Progress
from edge.sizes import show
from edge.version import __version__
from edge.weights.fingerprint import fingerprint
from edge.weights.model_file import ModelFile, open_model

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from edge.template.template import ChatTemplate
    from edge.tokenizer import Tokenizer

__all__ = ["DescribedFile", "Engine", "recommended_in"]

#: Where EDGE_TRACE=1 sends its lines.
_trace_log = logging.getLogger("edge.trace")

#: The version of the bytes in a page of keys and values; a change of their meaning raises it.
_PAGES_VERSION = 1


def recommended_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of sampling: the keys `general.sampling.*` and their values."""
    return {key: metadata[key] for key in metadata if key.startswith("general.sampling.")}


class DescribedFile:
    """A model file that is open and described, see `edge.backend.Described`.

    Get one with `DescribedFile.open`. file: open until `close`, or after `start` until the engine
    is closed; description: what would run of the file. kept: see `describe`.
    """

    def __init__(
        self,
        file: ModelFile,
        options: NativeOptions,
        lora: Sequence[GGUF] = (),
        *,
        kept: int | None = None,
    ) -> None:
        self.file, self._options = file, options
        self.description = describe(file, options, lora, kept=kept)
        self._lora = lora
        self._is_started = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        options: NativeOptions | None = None,
        *,
        header_only: bool = False,
    ) -> Self:
        """Open and check a GGUF file or a packed one. header_only: see `edge.files.gguf.GGUF.open`.

        Raises ModelFileError, ContextError, UnsupportedError, the last also for a wrong
        EDGE_ISA, and MemoryBudgetError for a stated budget above the available memory.
        `ledger.require` raises for a model above its budget.
        """
        if not header_only:
            native.isa_index()  # first: what EDGE_ISA says can be wrong of any file
        options = options or NativeOptions()
        with contextlib.ExitStack() as opened:
            file = open_model(path, header_only=header_only)
            opened.callback(file.close)
            lora = list[GGUF]()
            for adapter, _ in options.lora:
                if os.path.isdir(adapter):
                    raise InputError(
                        f"{adapter} is a folder: make a GGUF file of the adapter in it with "
                        "convert_lora_to_gguf.py of llama.cpp, and name that"
                    )
                lora.append(GGUF.open(adapter, header_only=header_only))
                opened.callback(lora[-1].close)
            described = cls(file, options, lora)
            opened.pop_all()
        return described

    @property
    def path(self) -> str:
        """The file, or the first of a split model's."""
        return os.fspath(self.file.path)

    @property
    def ledger(self) -> Ledger:
        """The memory that the model would take."""
        return self.description.ledger

    def new_tokenizer(self) -> Tokenizer:
        """Build the tokenizer. Raises ModelFileError, UnsupportedError."""
        from edge.tokenizer import Tokenizer

        metadata, graph = self.file.metadata, self.description.graph
        tokenizer = Tokenizer.from_metadata(metadata, self.path, graph.dims[graph.output])
        metadata.forget()
        return tokenizer

    def new_template(self) -> ChatTemplate:
        """Compile the chat template. Raises TemplateError if there is none, ModelFileError."""
        from edge.template.budget import Limits
        from edge.template.template import ChatTemplate

        limits = Limits.of_context(self.ledger.context)
        name = self._options.chat_template
        return ChatTemplate.from_metadata(self.file.metadata, self.path, limits, name)

    def start(self, progress: Progress | None = None) -> Engine:
        """Take the memory: threads, weights (packed or verified), the plan, pages.

        progress(bytes done, bytes in all). May be called once; the engine owns the file from then
        on. Raises MemoryBudgetError, ModelFileError, UnsupportedError, InputError.
        """
        if self._is_started:
            raise InputError("the model was started")
        self.ledger.require()
        options = self._options
        choice, isa = cores.choose(options.threads), native.isa_index()
        store = None if options.prefix_cache is None else PageStore(options.prefix_cache)
        engine = Engine(
            self.file, self.description, self._lora, model_sampling=options.model_sampling
        )
        self._is_started = True
        try:
            engine._start(choice, isa, progress)
            engine._pages = engine._new_pool(store)
        except BaseException:
            engine.close()
            raise
        return engine

    def close(self) -> None:
        """Close the files, unless an engine owns them."""
        if not self._is_started:
            self.file.close()
            for file in self._lora:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Engine:
    """A loaded model. `DescribedFile.start` makes one. Any thread may call `run`.

    gguf, graph, config: the loaded file, its graph and its configuration; chunk: the most tokens of
    a run; threads: how many; isa: the instruction set; cores: the threads, where they run and why;
    layouts: tensor name -> layout in memory; packed_bytes, arena_bytes: memory of the weights and
    of the buffers.

    With EDGE_TRACE=1 each run logs a line per operation to the logger "edge.trace". The level is
    WARNING, the lowest that Python shows on stderr when nobody set up `logging`.
    """

    def __init__(
        self,
        model: ModelFile,
        description: Description,
        lora: Sequence[GGUF] = (),
        *,
        model_sampling: bool = True,
    ) -> None:
        graph, weights = description.graph, description.weights
        self.gguf, self.graph, self.config = model, graph, description.config
        self.adapters, self._lora = description.adapters, lora
        self.kv, self.ledger = description.ledger.kv, description.ledger
        self.recommended = recommended_in(model.metadata) if model_sampling else {}
        self.notes = self.config.keys.notes
        self.n_vocab = graph.dims[graph.output]
        self.isa = ""
        self.cores = Choice(0, (), "not loaded")
        self.lowered, self.chunk = description.lowered, description.chunk
        self.packed_bytes, self.arena_bytes = weights.model.n_bytes, self.lowered.arena_bytes
        self.layouts = description.layouts
        self._weights = weights
        self._lock: threading.Lock | forked.Refusal = threading.Lock()
        self._isa = 0
        self._threads: CData = None
        self._plan: CData = None
        self._arena: mmap.mmap | None = None
        self._pages: PagePool | None = None
        self._fingerprint: bytes | None = None
        self._trace = os.environ.get("EDGE_TRACE", "0")
        if self._trace not in ("0", "1"):
            raise InputError(f"EDGE_TRACE={self._trace}: 0 or 1")
        forked.watch(self)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        **options: Unpack[LoadOptions],
    ) -> Engine:
        """Open a model and start it at once.

        options: see `edge.loading.Loading`. Raises what `DescribedFile` raises.
        """
        native_options = Loading.of(options).for_native(os.fspath(path))
        with DescribedFile.open(path, native_options) as described:
            return described.start(progress)

    @property
    def path(self) -> str:
        """The file, or the first of a split model's."""
        return os.fspath(self.gguf.path)

    @property
    def threads(self) -> int:
        """How many threads it runs on."""
        return self.cores.threads

    @property
    def refused(self) -> str | None:
        """Why the system did not keep threads on the chosen cores; None: it did."""
        with self._lock:
            return None if self._threads is None else native.refused(self._threads)

    def weight_bytes(self, name: str) -> int:
        """Bytes of a packed weight."""
        return self._weights.of(name).bytes_of(name)

    def takes_q8(self, name: str) -> bool:
        """Whether a matrix is multiplied with quantised activations, else with float32 ones."""
        return self._weights.takes_q8(name)

    def cache_bytes(self, n_tokens: int) -> int:
        """Bytes of keys and values of n_tokens tokens."""
        return self.kv.bytes(n_tokens)

    def resident(self) -> dict[str, int | None]:
        """Bytes of each part that are in memory; None where the system does not tell."""
        with self._lock:
            if self._plan is None or self._arena is None:
                raise InputError("the model was closed")
            with ffi.from_buffer("uint8_t[]", self._arena) as arena:
                buffers = memory.resident_of(int(ffi.cast("uintptr_t", arena)), len(arena))
            weights = self._weights.resident()
        return {
            **weights,
            "keys and values": self.pool.touched_bytes,
            "buffers": buffers,
        }

    @property
    def pool(self) -> PagePool:
        """The memory of keys and values."""
        if self._pages is None:
            raise InputError("the model was closed")
        return self._pages

    @property
    def arena(self) -> mmap.mmap:
        """The memory of the buffers: what the last run left in them."""
        if self._arena is None:
            raise InputError("the model was closed")
        return self._arena

    @property
    def page_bytes(self) -> Sequence[int]:
        """Bytes of a page of keys and values, for each layer group."""
        return [group.shape.page_bytes for group in self.kv.groups]

    @property
    def keeps_prompts(self) -> bool:
        """Whether caches can `keep` their pages for later processes."""
        return self.pool.store is not None

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that identify this model, see `edge.weights.fingerprint`."""
        with self._lock:
            if self._fingerprint is None:
                if self._plan is None:
                    raise InputError("the model was closed")
                self._fingerprint = fingerprint(
                    self.gguf.metadata, self.graph, self._weights, self.adapters
                )
            return self._fingerprint

    def facts(self) -> dict[str, Any]:
        """The facts that a session depends on, as plain values for JSON."""
        name = str(self.gguf.metadata.get("general.name") or "")
        file = os.path.basename(self.path)
        model = f"{name} ({file})" if name else file
        for adapter in self.adapters:
            model += f" + {adapter.scale:g} x {os.path.basename(adapter.path)}"
        factors = (rope.factors for rope in self.graph.ropes if rope.factors is not None)
        return {
            "edge": __version__,
            "model": model,
            "fingerprint": self.fingerprint.hex(),
            "kv": self.kv.facts(),
            # name of the rotary factors in use; with LongRoPE the context limit chooses them
            "factors": next(map(shown_name, factors), None),
            "native_bf16": self.isa.endswith("+bf16"),
            "context": int(self.config.n_context),
        }

    def info(self) -> dict[str, Any]:
        """Facts about the model, as plain values for JSON. Sizes in bytes, contexts in tokens.

        types, layouts: how many tensors have each type in the file, and each layout in memory.
        """
        gguf, config = self.gguf, self.config
        return {
            "path": self.path,
            "name": gguf.metadata.get("general.name"),
            "architecture": config.architecture,
            "parameters": sum(math.prod(t.shape) for t in gguf.tensors.values()),
            "types": dict(Counter(t.type for t in gguf.tensors.values())),
            "layouts": dict(Counter(self.layouts[name] for name in self._weights.model.names)),
            "layers": config.n_layers,
            "vocabulary": self.n_vocab,
            "context": config.n_context,
            "context_trained": config.n_context_train,
            "threads": self.threads,
            "isa": self.isa,
            "file_bytes": gguf.n_bytes,
            "packed_bytes": self.packed_bytes,
            "arena_bytes": self.arena_bytes,
            "cache_bytes": self.cache_bytes(config.n_context),
            "adapters": [adapter.as_dict() for adapter in self.adapters],
        }

    def cache(self, when_full: WhenFull = "stop") -> KVCache:
        """A new, empty cache for one session. when_full: see `KVCache`. Raises InputError."""
        config = self.config
        return KVCache(
            self.pool, config.n_context, when_full=when_full, n_positions=config.n_positions
        )

    def run(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        *,
        logits: Literal["none", "last", "all"] = "last",
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32] | None:
        """Run 1 to `chunk` tokens behind the tokens in the cache, and add them to it.

        Returns logits (rows, n_vocab) of the last token or of all tokens, or None.
        Raises ContextError when the tokens do not fit, InputError for a token that is not in the
        vocabulary, CancelledError (the cache is then as it was), MemoryBudgetError,
        ModelFileError when the weights make numbers that are not finite, UnsupportedError when
        they make keys or values that the cache's type cannot hold.
        """
        rows = {"none": 0, "last": 1, "all": len(tokens)}[logits]
        out = self._run(cache, tokens, rows, cancel=cancel)
        return out if rows else None

    def run_before(
        self, op: int, cache: KVCache, tokens: Sequence[int], *, cancel: Cancel | None = None
    ) -> None:
        """Run tokens as `run` does, but only the ops before one of the plan's, with rows for all
        tokens. Raises what `run` raises.
        """
        self._run(cache, tokens, len(tokens), op, cancel)

    def kept(self, buffer: int, n_rows: int) -> NDArray[np.float32]:
        """A copy (n_rows, dim) of a buffer that a plan of kept inputs has, after a run."""
        out = np.empty((n_rows, self.lowered.buffers[buffer].dim), np.float32)
        with self._lock:
            if self._plan is None:
                raise InputError("the model was closed")
            target = ffi.cast("float *", out.ctypes.data)
            native.check(lib.edge_plan_read(self._plan, buffer, n_rows, target))
        return out

    def _run(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        rows: int,
        n_ops: int = -1,
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32]:
        """The logits (rows, n_vocab) of the last rows. n_ops: of the plan, -1: all."""
        n = len(tokens)
        if not 1 <= n <= self.chunk:
            raise InputError(f"{n} tokens in one run: from 1 to {self.chunk}")
        if not 0 <= min(tokens) <= max(tokens) < self.n_vocab:
            raise InputError(
                f"token ids from {min(tokens)} to {max(tokens)}: 0 to {self.n_vocab - 1}"
            )
        with self._lock:
            if self._plan is None:
                raise InputError("the model was closed")
            cache.reserve(cache.length + n)
            out = np.empty((rows, self.n_vocab), np.float32)
            op_ns = ffi.new("int64_t[]", len(self.lowered.ops)) if self._trace == "1" else ffi.NULL
            ids = ffi.new("int32_t[]", list(tokens))
            step = ffi.new("edge_step *", {"n_tokens": n, "n_logits": rows, "n_ops": n_ops})
            step.tokens, step.start, step.op_ns = ids, cache.length, op_ns
            step.logits = ffi.cast("float *", out.ctypes.data) if rows else ffi.NULL
            step.cancel = cancel.pointer if cancel is not None else ffi.NULL
            error = ffi.new("edge_error *")
            status = lib.edge_run(self._plan, self._threads, cache.handle, step, error)
            if status == lib.EDGE_NOT_FINITE:
                raise self._not_finite(cache)
            native.check(status, error)
            cache.append(tokens)
        if op_ns:
            _trace_log.warning("%s", self._traced(n, op_ns))
        return out

    @contextlib.contextmanager
    def substituted(self, weights: Mapping[str, CData], first: int = 0) -> Iterator[None]:
        """Run with other weights in the place of some of the model's, until the `with` ends.

        first: the first op of the plan that runs. Buffers that it reads must be as the ops before
        left them, see `edge.engine.states`, and caches empty where these stored keys and values.
        weights: name -> edge_weight of the same shape, whose data are packed and stay there; it
        takes quantised activations exactly if the model's weight does. Sessions must not share
        pages with runs of other weights: empty their caches. Raises InputError, NativeError.
        """
        for name, weight in weights.items():
            ours = self._weights.entry(name)
            if (weight.n, weight.k) != (ours.n, ours.k):
                raise InputError(f"{name}: ({weight.n}, {weight.k}), not ({ours.n}, {ours.k})")
        entries = self._weights.entries()
        for i, name in enumerate(self._weights.names):
            if name in weights:
                entries[i] = weights[name][0]
        with self._lock:
            if self._plan is None:
                raise InputError("the model was closed")
            before, self._plan = self._plan, self._new_plan(entries, first)
        try:
            yield
        finally:
            with self._lock:
                if self._plan is not None:  # not closed meanwhile
                    ffi.release(self._plan)
                    self._plan = before

    def close(self) -> None:
        """Give all memory back, after the current run has ended. Later runs raise InputError.

        In a forked child this does nothing: a run of the parent would never end there.
        """
        if self._lock is forked.REFUSAL:
            return
        with self._lock:
            for handle in (self._plan, self._threads):
                if handle is not None:
                    ffi.release(handle)
            self._plan = self._threads = None
            if self._pages is not None:
                self._pages.close()
                self._pages = None
            if self._arena is not None:
                self._arena.close()
                self._arena = None
            self._weights.close()
            self.gguf.close()
            for file in self._lora:
                file.close()

    def _forked(self) -> None:
        self._lock = forked.REFUSAL

    def __del__(self) -> None:
        """Close what nobody closed, before the garbage collector frees parts in any order."""
        with contextlib.suppress(Exception):  # the object may be incomplete
            self.close()

    def _start(self, choice: Choice, isa: int, progress: Progress | None) -> None:
        """Take the memory: threads, packed weights, plan."""
        self._threads = native.new_threads(choice.threads, choice.cpus)
        self.cores, self.isa = choice, native.text(lib.edge_isa_name(isa))
        native_bf16 = native.native_bf16(isa)
        self.isa += "+bf16" if native_bf16 else ""
        self._weights.load(self._threads, progress)
        self._check_factors()
        try:
            self._arena = memory.anonymous(self.arena_bytes)
        except (OSError, MemoryError) as e:
            raise MemoryBudgetError(
                f"no memory for buffers of {show(self.arena_bytes)}",
                needed=self.arena_bytes,
                budget=memory.available() or 0,
                parts={"buffers": self.arena_bytes},
            ) from e
        self._isa = isa
        self._plan = self._new_plan(self._weights.entries())

    def _new_plan(self, entries: CData, first: int = 0) -> CData:
        """The plan from an op on with these weights, an edge_weight for each name."""
        error, plan = ffi.new("edge_error *"), ffi.new("edge_plan **")
        assert self._arena is not None
        spec, arrays = self._spec(self._isa, entries, first)
        spec.native_bf16 = int(native.native_bf16(self._isa))
        with ffi.from_buffer("uint8_t[]", self._arena) as arena:
            spec.arena = arena
        native.check(lib.edge_plan_new(spec, plan, error), error)
        del arrays  # the plan has copies of them
        return ffi.gc(plan[0], lib.edge_plan_free)

    def _new_pool(self, store: PageStore | None) -> PagePool:
        """The pages of the planned sessions."""
        root = b""
        if store is not None:  # everything that the bits of a page depend on
            groups = self.kv.groups
            kv = groups[0].shape if len(groups) == 1 else groups
            versions = f"{__version__} {_PAGES_VERSION} {kv} {self.isa.endswith('+bf16')}"
            root = self.fingerprint + versions.encode()
        planned, most = self.ledger.planned_pages, self.ledger.most_kv_bytes
        return PagePool(self.kv, planned, most_bytes=most, store=store, root=root)

    def _check_factors(self) -> None:
        """Check rotary factors, which divide frequencies. Raises ModelFileError."""
        for name in {rope.factors for rope in self.graph.ropes if rope.factors is not None}:
            check_factors(name, self._weights.model.vector(name).tolist(), self.gguf.path)

    def _not_finite(self, cache: KVCache) -> EdgeError:
        """The error for logits that are NaN or infinite. Packing found all weights finite."""
        layer = cache.overflowed_layer()
        lower = ", or lower the scales of its adapters" if self.adapters else ""
        if layer is not None:
            others = [t for t in kv_types()[1:] if self.kv.with_type(t).is_possible]
            hint = f"load the model with --kv {others[0]}" if others else "no other type keeps them"
            return UnsupportedError(
                f"{self.path}: keys or values of layer {layer} are beyond 65504, the most that f16 "
                f"holds: {hint}{lower}",
                what="kv f16",
                supported=others,
            )
        whose = (
            "the weights, or those of its adapters, are damaged"
            if lower
            else "the weights are damaged"
        )
        return ModelFileError(
            f"the logits came out NaN or infinite: {whose}{lower}", path=self.path
        )

    def _spec(self, isa: int, entries: CData, first: int = 0) -> tuple[CData, tuple[CData, ...]]:
        """The edge_plan_spec of the ops from one on, and the arrays that it points to."""
        lowered, weights = self.lowered, self._weights
        buffers = ffi.new("edge_buffer[]", len(lowered.buffers))
        for b, buffer in zip(buffers, lowered.buffers, strict=True):
            b.kind, b.dim, b.offset = buffer.kind, buffer.dim, buffer.offset
            b.is_logit_rows = int(buffer.logit_rows)
        places = self.kv.places
        index = {name: i for i, name in enumerate(weights.names)}
        ops = ffi.new("edge_op[]", [op.native(index, places) for op in lowered.ops[first:]])
        spec = ffi.new("edge_plan_spec *")
        spec.isa, spec.max_tokens = isa, self.chunk
        shapes = ffi.new("edge_kv_shape[]", len(self.kv.groups))
        for i, group in enumerate(self.kv.groups):
            shapes[i] = group.shape.native[0]
        spec.kv, spec.n_kv_groups = shapes, len(shapes)
        spec.ops, spec.n_ops = ops, len(ops)
        spec.buffers, spec.n_buffers = buffers, len(lowered.buffers)
        spec.weights, spec.n_weights = entries, len(index)
        spec.arena_bytes = lowered.arena_bytes
        return spec, (ops, buffers, shapes, entries)

    def _traced(self, n_tokens: int, op_ns: CData) -> str:
        """One line per op: kind, microseconds, layouts, weights."""
        lines = [f"{n_tokens} tokens, {self.threads} threads, {self.isa}"]
        for op, ns in zip(self.lowered.ops, op_ns, strict=True):
            layouts = " ".join(dict.fromkeys(self.layouts[name] for name in op.weights))
            names = " ".join(map(shown_name, op.weights))
            lines.append(f"{ns / 1000:10.1f} us  {op.kind:<13} {layouts:<8} {names}")
        return "\n".join(lines)
