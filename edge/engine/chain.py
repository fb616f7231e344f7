"""Matmuls of one type, one after the other, timed: what weights of this type cost on this machine.

A chain has so many weights that the CPU's caches cannot hold them. One token through all of them is
like decoding; some tokens through a few of them are like a prompt.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edge import native
from edge.device.memory import anonymous
from edge.engine.ops import F32, Q8
from edge.native import ffi, lib
from edge.weights.packed import describe_weight

if TYPE_CHECKING:
    from mmap import mmap

    from typing_extensions import Self

__all__ = ["Chain"]


class Chain:
    """Matrices of a type in a form, each multiplied with the same activations, which are quantised
    before each matmul where the matrices want that.

    n_layers: how many matrices; n_bytes: of all of them. Raises MemoryBudgetError where there is
    no memory for activations, UnsupportedError for a type that does not run.
    """

    def __init__(
        self,
        block: mmap,
        type_name: str,
        shape: tuple[int, int],
        form: str = "fast",
        tokens: int = 1,
    ) -> None:
        """block: memory that holds at least one matrix, as `edge.device.machine.written` gives it:
        any bytes are weights. It stays the caller's. shape: rows, columns; tokens: the most that
        `seconds` is asked for.
        """
        weight, error = ffi.new("edge_weight *"), ffi.new("edge_error *")
        describe_weight(type_name, shape, form, weight)
        self.n_layers = len(block) // weight.n_bytes
        self.n_bytes = self.n_layers * weight.n_bytes
        takes_q8 = bool(lib.edge_layout_takes_q8(weight.layout))
        buffers, size = _buffers(shape, takes_q8, tokens)
        self._arena = anonymous(size)
        self._pointers = [ffi.from_buffer("uint8_t[]", b) for b in (block, self._arena)]
        spec = ffi.new("edge_plan_spec *")
        spec.isa, spec.max_tokens = native.isa_index(), tokens
        spec.native_bf16 = int(native.native_bf16(spec.isa))
        shapes = ffi.new("edge_kv_shape[]", [(lib.EDGE_KV_F16, 1, 1, 16)])
        spec.kv, spec.n_kv_groups = shapes, len(shapes)
        spec.arena, spec.arena_bytes = self._pointers[1], len(self._arena)
        ops, weights = self._layers(weight, takes_q8)
        self._ops_per_layer = len(ops) // self.n_layers
        arrays = [
            ffi.new(f"{kind}[]", rows)
            for kind, rows in (("edge_buffer", buffers), ("edge_op", ops), ("edge_weight", weights))
        ]
        spec.buffers, spec.ops, spec.weights = arrays
        spec.n_buffers, spec.n_ops, spec.n_weights = map(len, arrays)
        plan = ffi.new("edge_plan **")
        native.check(lib.edge_plan_new(spec, plan, error), error)
        self._plan = ffi.gc(plan[0], lib.edge_plan_free)
        # No op looks at keys and values: any memory is a page.
        self._pages = ffi.new("void *[]", [self._pointers[1]])
        self._groups = ffi.new("edge_kv_group[]", [{"n_pages": 1, "pages": self._pages}])
        self._groups[0].shape = shapes[0]
        self._kv = ffi.new("edge_kv *", {"n_groups": 1, "groups": self._groups})
        self._tokens = ffi.new("int32_t[]", tokens)

    def _layers(
        self, weight: Any, takes_q8: bool
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Entries of the ops and the weights, of buffers 0: x, 1: the product, 2: x quantised."""
        ops, weights = list[dict[str, Any]](), list[dict[str, Any]]()
        for i in range(self.n_layers):
            none = {"in2": -1, "w": [-1, -1, -1]}
            if takes_q8:
                ops.append({**none, "kind": lib.EDGE_OP_QUANTIZE, "in": 0, "out": 2})
            product = {"in": 2 if takes_q8 else 0, "in2": -1, "out": 1, "w": [i, -1, -1]}
            ops.append({"kind": lib.EDGE_OP_MATMUL, **product})
            entry = {name: getattr(weight, name) for name in ("layout", "table", "n", "k")}
            data = ffi.cast("uint8_t *", self._pointers[0]) + i * weight.n_bytes
            weights.append({**entry, "data": data, "n_bytes": weight.n_bytes})
        return ops, weights

    def seconds(self, threads: Any, n_tokens: int, n_layers: int) -> float:
        """What so many tokens take, through the first matrices. threads: see `new_threads`."""
        start = time.perf_counter()
        self._run(threads, n_tokens, n_layers, ffi.NULL)
        return time.perf_counter() - start

    def matmul_seconds(self, threads: Any, n_tokens: int) -> list[float]:
        """What each matrix takes with so many tokens, without their quantisation."""
        op_ns = ffi.new("int64_t[]", self._ops_per_layer * self.n_layers)
        self._run(threads, n_tokens, self.n_layers, op_ns)
        return [ns * 1e-9 for ns in list(op_ns)[self._ops_per_layer - 1 :: self._ops_per_layer]]

    def _run(self, threads: Any, n_tokens: int, n_layers: int, op_ns: Any) -> None:
        step, error = ffi.new("edge_step *"), ffi.new("edge_error *")
        step.tokens, step.n_tokens, step.op_ns = self._tokens, n_tokens, op_ns
        step.n_ops = self._ops_per_layer * n_layers
        native.check(lib.edge_run(self._plan, threads, self._kv, step, error), error)

    def close(self) -> None:
        """Free the memory."""
        ffi.release(self._plan)
        for pointer in self._pointers:
            ffi.release(pointer)
        self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _buffers(
    shape: tuple[int, int], takes_q8: bool, tokens: int
) -> tuple[list[dict[str, int]], int]:
    """x, the product, and x quantised; and the bytes of all."""
    (n, k), buffers, end = shape, list[dict[str, int]](), 0
    for kind, dim in [(F32, k), (F32, n), *([(Q8, k)] if takes_q8 else [])]:
        buffers.append({"kind": kind, "dim": dim, "offset": end})
        end += int(lib.edge_buffer_bytes(kind, dim, tokens))
    return buffers, end
