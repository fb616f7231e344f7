"""Kernels on one thread: `pytest tests/bench --benchmark-enable`; else each runs once, small.

The plans are those of the kernel tests, on the instruction set that edge would use. A matmul's time
includes bringing its input; its extra_info are bytes of packed weights and multiply-adds.
"""

from __future__ import annotations

from typing import Any

import make_shape
import numpy as np
import pytest
from native_plan import COMPACT_TYPES, TYPES, Plan, Spec, packed, vector

from edge import native
from edge.engine.ops import F32, Q8
from edge.native import lib

pytestmark = pytest.mark.native

ISA = native.text(lib.edge_isa_name(native.isa_index()))
WEIGHTS = [(t, "fast") for t in TYPES if t in make_shape.TYPES]
WEIGHTS += [(t, "compact") for t in COMPACT_TYPES]
COLUMNS = {"gemv": 1, "gemm": 64}  # one token; eight tiles of eight


def normal(*shape: int) -> np.ndarray:
    """Float32 of N(0, 1)."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def time(benchmark: Any, spec: Spec, m: int, start: int = 0) -> Plan:
    """Benchmark runs of m tokens behind `start` others."""
    plan = Plan(spec, start + m)
    for first in range(0, start, spec.max_tokens):
        plan.run(range(min(spec.max_tokens, start - first)), start=first)
    benchmark(plan.run, range(m), start=start)
    return plan


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("type_name", "form"), WEIGHTS, ids=["-".join(w) for w in WEIGHTS])
def test_matmul(benchmark: Any, type_name: str, form: str, columns: str) -> None:
    n, k = (3072, 3072) if benchmark.enabled else (32, 512)
    m = COLUMNS[columns]
    raw = make_shape.random_rows(type_name, n, k, "speed")
    weight = packed(type_name, raw, (n, k), form=form)
    spec = Spec(ISA, max_tokens=m)
    source = spec.given(normal(m, k))
    if type_name not in make_shape.FLOATS:
        source = spec.quantized(source)
    out = spec.op("matmul", (source,), spec.buffer(F32, n), (weight,))
    plan = time(benchmark, spec, m)
    benchmark.extra_info |= {"bytes": int(weight.entry.n_bytes), "macs": m * n * k}
    assert np.isfinite(plan.read(out, m)).all()


@pytest.mark.parametrize("depth", [0, 4096])
@pytest.mark.parametrize("m", [1, 64])
def test_attention(benchmark: Any, m: int, depth: int) -> None:
    n_heads, n_kv, dim = 24, 8, 128
    depth = depth if benchmark.enabled else depth // 64
    spec = Spec(ISA, max_tokens=64, cache_shape=(1, n_kv, dim))
    heads = {"layer": 0, "n_heads": n_heads, "n_kv_heads": n_kv, "head_dim": dim}
    source = spec.given(normal(64, (n_heads + 2 * n_kv) * dim))
    spec.op("store", (source,), source, **heads)
    spec.op("attention", (source,), spec.buffer(F32, n_heads * dim), **heads)
    time(benchmark, spec, m, depth)


@pytest.mark.parametrize("norm", [False, True], ids=["quantize", "norm"])
@pytest.mark.parametrize("m", [1, 64])
def test_quantize(benchmark: Any, m: int, norm: bool) -> None:
    k = 8192 if benchmark.enabled else 512
    spec = Spec(ISA, max_tokens=m)
    source = spec.given(normal(m, k))
    if norm:
        weight = (vector(np.ones(k, np.float32)),)
        spec.op("norm", (source,), spec.buffer(Q8, k), weight, eps=1e-5)
    else:
        spec.quantized(source)
    time(benchmark, spec, m)
