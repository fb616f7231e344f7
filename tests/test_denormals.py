"""Denormal numbers: every kernel keeps them, on instruction sets too whose vectors flush them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from native_plan import FLOAT_TYPES, Spec, Weight, evaluate, on_all_isas, rows_weight, vector
from test_attention import Heads
from test_kernels import (
    FORMS,
    KINDS,
    by_row,
    gated,
    matmul,
    moderate,
    n_halves,
    norm,
    normal,
    pack,
    random_blocks,
    sampled,
    set_scales,
    wide,
)

from edge.engine.ops import F32, Q8, Q8X2
from edge.engine.plan import _number_of
from edge.graph.ops import Activation, GateActivation
from edge.kv.shape import kv_types

pytestmark = [pytest.mark.native, pytest.mark.all_isas]


def times(x: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """x times a factor, by way of float64: numpy's own float32 may be what flushes."""
    return (x.astype(np.float64) * factor).astype(np.float32)


def denormals(x: np.ndarray) -> int:
    """How many, by their bits."""
    magnitude = x.view(np.uint32) & 0x7FFFFFFF
    return int(((magnitude > 0) & (magnitude < 0x800000)).sum())


def on_all(run: Callable[[str], np.ndarray], at_least: int = 1) -> np.ndarray:
    """The same bits everywhere, so many of them denormal numbers."""
    got = on_all_isas(run)
    assert denormals(got) >= at_least
    return got


def tiny_weight(kind: str, n: int, k: int) -> Weight:
    """With scales that are float16's least; floats of 1e-20."""
    type_name = kind.partition("-")[0]
    if type_name in FLOAT_TYPES:
        if type_name == "F32":
            return rows_weight(times(normal(n, k), 1e-20))
        raw = times(normal(n, k), 2e-7)
        halves = raw.astype("<f2") if type_name == "F16" else (raw.view("u4") >> 16).astype("<u2")
        return pack(kind, halves, (n, k))[0]
    raw = random_blocks(type_name, n * k // wide(kind, 1))
    if type_name == "MXFP4":
        raw[:, 0] = 8 + raw[:, 0] % 6
    elif type_name == "NVFP4":
        raw[:, :4] %= 8  # no scale is smaller
    set_scales(type_name, raw, normal(n_halves(type_name), len(raw)) * 3e-7)
    return pack(kind, raw, (n, k))[0]


@pytest.mark.parametrize("kind, form", FORMS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 9])
def test_products(kind: str, form: int, m: int) -> None:
    """Tiny weights times activations from the least that are quantised up: scales, products and
    sums that are denormal, beside others that are not."""
    k = wide(kind, 96)
    weight = tiny_weight(kind, 19, k)
    x = times(normal(m, k, seed=m), 3e-20 if kind == "F32" else 3e-30)
    on_all_isas(lambda isa: matmul(isa, x, [weight], form))
    x[:, 32:] = times(x[:, 32:], 1e-12)
    on_all_isas(lambda isa: matmul(isa, x, [weight], form))


@pytest.mark.parametrize("kind, form", [("F32", F32), ("F16", F32), ("BF16", F32), ("Q4_0", Q8)])
@pytest.mark.parametrize("in_place", [False, True])
def test_residual_is_added_once(kind: str, form: int, in_place: bool) -> None:
    weight = tiny_weight(kind, 32, 64)
    x = times(normal(5, 64), {"F32": 1e-19, "Q4_0": 3e-31}.get(kind, 1e-33))
    residual = times(normal(5, 32, seed=1), 1e-38)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        source, to = spec.given(x), spec.given(residual)
        source = source if form == F32 else spec.quantized(source, form)
        out = to if in_place else spec.buffer(F32, 32)
        spec.op("matmul", (source, to), out, [weight])
        return evaluate(spec, out, len(x))

    alone = matmul("scalar", x, [weight], form)
    want = (alone.astype(np.float64) + residual.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(on_all(run, 20).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_gated_products(kind: str) -> None:
    form = F32 if kind in FLOAT_TYPES else Q8
    k = wide(kind, 96)
    weights = [moderate(kind, 37, k)[0], tiny_weight(kind, 37, k)]
    x = times(normal(5, k), 1 if kind == "F32" else 1e-15)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        source = spec.given(x)
        source = source if form == F32 else spec.quantized(source)
        out = spec.op("gated_matmul", (source,), spec.buffer(F32, 37), weights, activation=0)
        return evaluate(spec, out, len(x))

    on_all_isas(run)


@pytest.mark.parametrize("scale", [1e-18, 1e-21, 1e-38, 1e-42])
@pytest.mark.parametrize("eps", [0.0, 1e-38, 1e-5])
def test_norm(scale: float, eps: float) -> None:
    x, weight = times(normal(3, 37), scale), normal(37, seed=1)
    on_all_isas(lambda isa: norm(isa, x, weight, eps))
    on_all_isas(lambda isa: norm(isa, x, (weight, x[0]), eps, centred=True))
    for centred in (0, 1):
        by_row("head_norm", x, n_heads=2, head_dim=18, eps=eps, centred=centred)
    small = times(weight, 1e-38)
    on_all(lambda isa: norm(isa, normal(3, 37), small, eps), 20)


@pytest.mark.parametrize("form", [Q8, Q8X2])
@pytest.mark.parametrize("scale", [1e-28, 1e-30, 2e-31, 1e-38])
def test_quantised(form: int, scale: float) -> None:
    """Codes, scales and sums, seen through weights of about one."""
    x = times(normal(5, 64), np.where(np.arange(64) % 3 == 0, scale * 1e-9, scale))
    weight = moderate("Q8_0", 16, 64)[0]
    on_all_isas(lambda isa: matmul(isa, x, [weight], form))
    on_all_isas(lambda isa: norm(isa, normal(5, 64), x[0], 1e-5, form))


def test_gated() -> None:
    gate, up = np.linspace(-90, 90, 181, dtype=np.float32), normal(1, 181)[0]
    x = np.concatenate([gate, times(up, 1e-6)])[None]
    on_all(lambda isa: gated(isa, x), 5)
    x = np.concatenate([times(gate, 1e-38), up])[None]
    on_all(lambda isa: gated(isa, x), 10)


@pytest.mark.parametrize("activation", get_args(GateActivation))
def test_activations(activation: GateActivation) -> None:
    """Results that are denormal: of small numbers, of small factors, far below 0."""
    gate, up = np.linspace(-14, 14, 181, dtype=np.float32), normal(1, 181)[0]
    at_least = 0 if activation in ("relu2", "sigmoid", "swiglu_oai") else 10
    for x in (np.concatenate([gate, times(up, 1e-38)]), np.concatenate([times(gate, 1e-38), up])):
        on_all(lambda isa, x=x: gated(isa, x[None], activation), at_least)
    if activation in get_args(Activation):
        x = np.concatenate([gate, times(gate, 1e-38), times(gate, 1e-20)])[None]
        by_row("activate", x, activation=_number_of(activation))


def test_functions_and_products() -> None:
    x = np.concatenate([times(normal(1, 99), scale) for scale in (1, 1e-20, 1e-38, 1e-42)], 1)
    assert denormals(by_row("softcap", x, softcap=30.0)) > 90
    args = {"alpha_p": 0.8, "alpha_n": 0.7, "beta": 0.5, "eps": -1e-6}
    by_row("xielu", x, **args)
    assert denormals(by_row("scale", x, scale=0.3)) > 90
    assert denormals(by_row("multiply", x, y=times(x[:, ::-1], 1e-3))) > 10
    assert denormals(by_row("bias", x, [vector(x[0])], column=0)) > 90


def test_add_and_rotate() -> None:
    x = times(normal(5, 5 * 32), 1e-38)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        source = spec.given(x)
        return evaluate(spec, spec.op("add", (source, source), spec.buffer(F32, 160)), len(x))

    np.testing.assert_array_equal(on_all(run, 100).view(np.uint32), times(x, 2).view(np.uint32))
    heads = Heads(3, 1, 32, n_rot=32)

    def rotated(isa: str) -> np.ndarray:
        spec, source, _ = heads.spec(isa, x)
        return evaluate(spec, source, len(x))

    on_all(rotated, 100)


@pytest.mark.parametrize("kv", kv_types())
@pytest.mark.parametrize(
    "queries, keys, values",
    [
        (1, 1, 1e-38),  # lost in float16, whose own denormals are not
        (1, 1, 1e-6),
        (1, 1e-6, 1),
        (1e-39, 1, 1),
        (1e-20, 1e-5, 1),
        (90, 1, 1),  # most of the weights are next to nothing
        (40, 1, 1e-5),
    ],
)
def test_attention(kv: str, queries: float, keys: float, values: float) -> None:
    heads = Heads(3, 1, 64, kv=kv)
    x = times(heads.qkv(130), np.repeat([queries] * 3 + [keys, values], 64))
    got = on_all_isas(lambda isa: heads.run(isa, x, 130))
    np.testing.assert_array_equal(on_all_isas(lambda isa: heads.run(isa, x, 1)), got)


def test_scores_that_are_denormal() -> None:
    heads = Heads(1, 1, 32)
    x = np.zeros((20, 96), np.float32)
    x[:, 0], x[:, 32], x[:, 64:] = 1e-38, 1 / 7, normal(20, 32)
    x[:, 64] = np.linspace(0, 1e-7, 20)
    on_all_isas(lambda isa: heads.run(isa, x, 20))


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_softmax(function: str) -> None:
    sampled(function, times(normal(100), 1e-38))
    got = sampled(function, np.linspace(-87.5, 0, 999, dtype=np.float32))  # on every one
    assert function == "log_softmax" or denormals(got) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_embedding(kind: str) -> None:
    k = wide(kind, 32)
    weight = tiny_weight(kind, 19, k)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        return evaluate(spec, spec.op("embed", (), spec.buffer(F32, k), [weight]), 19)

    on_all_isas(run)
