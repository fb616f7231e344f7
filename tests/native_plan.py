"""Plans of a few ops, built by hand and run on an instruction set of choice.

    spec = Spec("avx2")
    x = spec.given(rows)  # an embedding whose rows are the input: exact for any float32
    out = spec.op("add", (x, x), spec.buffer(F32, rows.shape[1]))
    plan = Plan(spec)
    plan.run(range(len(rows)))
    plan.read(out, len(rows))

Nothing is checked here: a spec may be as wrong as a test wants it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge import native
from edge.engine.ops import F32, LOGITS, Q8
from edge.files.tensor_types import TYPE_NUMBERS
from edge.native import ffi, lib
from edge.weights.weights import supported_types

ISAS = native.isas()
TYPES = supported_types()
FLOAT_TYPES = ("F32", "F16", "BF16")
_UNREADABLE = 0  # PROT_NONE


def isa_index(name: str) -> int:
    """The number of an instruction set that is compiled in."""
    names = []
    while (text := lib.edge_isa_name(len(names))) != ffi.NULL:
        names.append(native.text(text))
    return names.index(name)


def guarded(n_bytes: int, align: int = 64) -> np.ndarray:
    """Zeros (n_bytes,) uint8 that end at an unreadable page, or `-n_bytes % align` before it."""
    page = mmap.PAGESIZE
    size = -(-n_bytes // page) * page
    block = mmap.mmap(-1, size + page)
    base = np.frombuffer(block, np.uint8)
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        guard = ctypes.c_void_p(base.ctypes.data + size)
        assert libc.mprotect(guard, ctypes.c_size_t(page), _UNREADABLE) == 0
    start = (size - n_bytes) // align * align
    return base[start : start + n_bytes]


def floats(x: np.ndarray) -> Any:
    """A float * to the data of x."""
    return ffi.cast("float *", x.ctypes.data)


@functools.cache
def shared_threads(n: int = 1) -> Any:
    """edge_threads that all tests share."""
    out, error = ffi.new("edge_threads **"), ffi.new("edge_error *")
    native.check(lib.edge_threads_new(n, ffi.NULL, 0, out, error), error)
    return ffi.gc(out[0], lib.edge_threads_free)


@dataclass
class Weight:
    """An edge_weight and the guarded memory that it points to."""

    entry: Any
    memory: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return int(self.entry.n), int(self.entry.k)


def form_number(form: str) -> int:
    """The edge_form called "fast" or "compact"."""
    return int(getattr(lib, f"EDGE_FORM_{form.upper()}"))


def described(type_name: str, n: int, k: int, form: str = "fast") -> Weight:
    """A weight with room for its panels, not yet packed."""
    entry = ffi.new("edge_weight *")
    error = ffi.new("edge_error *")
    number = TYPE_NUMBERS[type_name]
    native.check(lib.edge_weight_describe(number, form_number(form), n, k, entry, error), error)
    memory = guarded(entry.n_bytes)
    entry.data = ffi.cast("void *", memory.ctypes.data)
    return Weight(entry, memory)


def packed(
    type_name: str,
    raw: np.ndarray,
    shape: tuple[int, int],
    threads: int = 1,
    form: str = "fast",
) -> Weight:
    """The disk blocks raw (bytes of any shape) of an (n, k) matrix, packed; the blocks, too, end
    at an unreadable page. Raises NativeError."""
    weight = described(type_name, *shape, form)
    src = guarded(raw.nbytes, align=1)
    src[:] = np.frombuffer(raw.tobytes(), np.uint8)
    error = ffi.new("edge_error *")
    pointer = ffi.cast("void *", src.ctypes.data)
    status = lib.edge_weight_pack(
        shared_threads(threads), TYPE_NUMBERS[type_name], weight.entry, pointer, src.nbytes, error
    )
    native.check(status, error)
    return weight


def _has_compact_form(type_name: str) -> bool:
    fast, compact = (described(type_name, 1, 256, form) for form in ("fast", "compact"))
    return bool(fast.entry.layout != compact.entry.layout)


#: Types with a form of their own for little memory.
COMPACT_TYPES = tuple(t for t in TYPES if _has_compact_form(t))


def unpacked(weight: Weight, row: int = 0, n_rows: int | None = None) -> np.ndarray:
    """Rows of a weight as float32, by the library."""
    n, k = weight.shape
    out = guarded((n if n_rows is None else n_rows) * k * 4, align=4).view(np.float32)
    native.check(lib.edge_weight_unpack(weight.entry, row, out.size // k, floats(out)))
    return out.reshape(-1, k)


def rows_weight(x: np.ndarray) -> Weight:
    """x (n, k) as an f32 weight, packed here, so that it may hold NaN."""
    weight = described("F32", *x.shape)
    padded = np.zeros((-(-len(x) // 16) * 16, x.shape[1]), np.float32)
    padded[: len(x)] = x
    panels = padded.reshape(-1, 16, x.shape[1]).transpose(0, 2, 1)
    weight.memory[:] = np.ascontiguousarray(panels).view(np.uint8).ravel()
    return weight


def vector(x: np.ndarray) -> Weight:
    """x (k,) as a vector."""
    x = np.asarray(x, np.float32)
    memory = guarded(x.nbytes)
    memory[:] = x.view(np.uint8)
    entry = ffi.new("edge_weight *")
    entry.layout, entry.n, entry.k, entry.n_bytes = lib.EDGE_LAYOUT_VECTOR, 1, x.size, x.nbytes
    entry.data = ffi.cast("void *", memory.ctypes.data)
    return Weight(entry, memory)


class Cache:
    """Pages of a cache of (layers, kv heads, head_dim), each at the end of readable memory.

    groups: n_groups edge_kv_group of this shape; group, memory, pages: those of the first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_positions: int = 512,
        kv: str = "f16",
        n_groups: int = 1,
    ):
        self.shape = kv_shape(shape, kv)
        size, per_page = lib.edge_page_bytes(self.shape), lib.edge_page_positions()
        n_pages = -(-n_positions // per_page)
        memories = [[guarded(size) for _ in range(n_pages)] for _ in range(n_groups)]
        tables = [
            ffi.new("void *[]", [ffi.cast("void *", page.ctypes.data) for page in memory])
            for memory in memories
        ]
        self.groups = ffi.new("edge_kv_group[]", n_groups)
        for group, pages in zip(self.groups, tables, strict=True):
            group.shape, group.n_pages, group.pages = self.shape[0], n_pages, pages
        self.handle = ffi.new("edge_kv *", {"n_groups": n_groups, "groups": self.groups})
        self.memory, self.pages, self.group = memories[0], tables[0], self.groups[0]
        self.alive = memories, tables


def kv_shape(shape: tuple[int, int, int], kv: str = "f16") -> Any:
    """An edge_kv_shape of (layers, kv heads, head_dim)."""
    names = []
    while (text := lib.edge_kv_type_name(len(names))) != ffi.NULL:
        names.append(native.text(text))
    return ffi.new("edge_kv_shape *", [names.index(kv), *shape])


@dataclass
class Spec:
    """An edge_plan_spec in the making. Buffers never share memory; numbers may be overwritten."""

    isa: str = "scalar"
    max_tokens: int = 32
    cache_shape: tuple[int, int, int] = (1, 1, 16)  # layers, kv heads, head_dim
    kv: str = "f16"
    n_groups: int = 1  # of layers, all of that shape
    buffers: list[dict[str, int]] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    ops: list[dict[str, Any]] = field(default_factory=list)
    arena_bytes: int = 64
    native_bf16: bool = False

    def buffer(self, kind: int, dim: int, logit_rows: bool = False) -> int:
        """A new buffer behind the others."""
        entry = {"kind": kind, "dim": dim, "is_logit_rows": int(logit_rows or kind == LOGITS)}
        size = max(0, lib.edge_buffer_bytes(kind, dim, self.max_tokens))
        self.buffers.append({**entry, "offset": self.arena_bytes if kind != LOGITS else 0})
        self.arena_bytes += -(-size // 64) * 64
        return len(self.buffers) - 1

    def weight(self, weight: Weight) -> int:
        """The index of a new weight."""
        self.weights.append(weight)
        return len(self.weights) - 1

    def op(
        self,
        kind: str,
        inputs: Sequence[int],
        out: int,
        weights: Sequence[Weight] = (),
        **attrs: Any,
    ) -> int:
        """Append an op; returns out."""
        padded = [*inputs, -1, -1]
        indices = [*(self.weight(w) for w in weights), -1, -1, -1][:3]
        number = getattr(lib, f"EDGE_OP_{kind.upper()}")
        entry = {"kind": number, "in": padded[0], "in2": padded[1], "out": out, "w": indices}
        self.ops.append({**entry, **attrs})
        return out

    def given(self, x: np.ndarray) -> int:
        """A buffer that row i of x is in, for token i."""
        return self.op("embed", (), self.buffer(F32, x.shape[1]), (rows_weight(x),))

    def quantized(self, source: int, kind: int = Q8) -> int:
        """A buffer's quantised form."""
        dim, logit_rows = (self.buffers[source][key] for key in ("dim", "is_logit_rows"))
        return self.op("quantize", (source,), self.buffer(kind, dim, bool(logit_rows)))

    def struct(self) -> tuple[Any, tuple[Any, ...]]:
        """The edge_plan_spec, and what it points to."""
        spec = ffi.new("edge_plan_spec *")
        buffers = ffi.new("edge_buffer[]", self.buffers)
        ops = ffi.new("edge_op[]", len(self.ops))
        for o, entry in zip(ops, self.ops, strict=True):
            for name, value in entry.items():
                setattr(o, name, value)
        weights = ffi.new("edge_weight[]", max(1, len(self.weights)))
        for w, weight in zip(weights, self.weights, strict=False):
            ffi.memmove(ffi.addressof(w), weight.entry, ffi.sizeof("edge_weight"))
        spec.isa, spec.max_tokens = isa_index(self.isa), self.max_tokens
        spec.native_bf16 = int(self.native_bf16)
        shape = ffi.new("edge_kv_shape[]", self.n_groups)
        for i in range(self.n_groups):
            shape[i] = kv_shape(self.cache_shape, self.kv)[0]
        spec.kv, spec.n_kv_groups = shape, self.n_groups
        spec.ops, spec.n_ops = ops, len(self.ops)
        spec.buffers, spec.n_buffers = buffers, len(self.buffers)
        spec.weights, spec.n_weights = weights, max(1, len(self.weights))
        arena = guarded(max(64, self.arena_bytes)) if self.arena_bytes < 1 << 40 else guarded(64)
        spec.arena, spec.arena_bytes = ffi.cast("void *", arena.ctypes.data), self.arena_bytes
        return spec, (ops, buffers, weights, arena, shape, list(self.weights))


class Plan:
    """A spec that passed the check, and its cache. Raises NativeError with code and op."""

    def __init__(self, spec: Spec, n_positions: int = 512) -> None:
        self.spec = spec
        struct, self.alive = spec.struct()
        out, error = ffi.new("edge_plan **"), ffi.new("edge_error *")
        native.check(lib.edge_plan_new(struct, out, error), error)
        self.handle = ffi.gc(out[0], lib.edge_plan_free)
        self.cache = Cache(spec.cache_shape, n_positions, spec.kv, spec.n_groups)

    def run(
        self, tokens: Sequence[int], *, start: int = 0, n_logits: int = 0, threads: int = 1
    ) -> np.ndarray:
        """Run tokens; returns the logits (n_logits, dim of the last op's output)."""
        dim = self.spec.buffers[self.spec.ops[-1]["out"]]["dim"]
        logits = np.zeros((n_logits, dim), np.float32)
        ids = ffi.new("int32_t[]", list(tokens))
        step, error = ffi.new("edge_step *"), ffi.new("edge_error *")
        step.tokens, step.n_tokens, step.start, step.n_ops = ids, len(tokens), start, -1
        step.n_logits, step.logits = n_logits, floats(logits)
        native.check(
            lib.edge_run(self.handle, shared_threads(threads), self.cache.handle, step, error),
            error,
        )
        return logits

    def read(self, buffer: int, rows: int) -> np.ndarray:
        """(rows, dim) of an F32 buffer after a run."""
        out = np.empty((rows, self.spec.buffers[buffer]["dim"]), np.float32)
        native.check(lib.edge_plan_read(self.handle, buffer, rows, floats(out)))
        return out


def evaluate(spec: Spec, out: int, m: int) -> np.ndarray:
    """Rows of F32 buffer `out` after a run of tokens 0..m - 1, all of whose logits are wanted."""
    plan = Plan(spec)
    plan.run(range(m), n_logits=m)
    return plan.read(out, m)


def on_all_isas(run: Callable[[str], np.ndarray]) -> np.ndarray:
    """run(isa) on each; the scalar result, whose bits the others must have (any NaN for NaN)."""
    want = run("scalar")
    for isa in ISAS[1:]:
        got = run(isa)
        assert got.shape == want.shape
        same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
        bad = np.argwhere(~same)
        assert not len(bad), f"{isa}: {len(bad)} of {got.size} differ, first at {bad[0]}"
    return want
