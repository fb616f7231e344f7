"""Kernels: every instruction set gives scalar's bits, and scalar what numpy says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import refgraph
import refmath
from native_plan import (
    COMPACT_TYPES,
    FLOAT_TYPES,
    TYPES,
    Plan,
    Spec,
    Weight,
    evaluate,
    floats,
    isa_index,
    on_all_isas,
    packed,
    rows_weight,
    vector,
)
from test_refmath import SIZES, n_halves, random_blocks, set_half

from edge import native
from edge.engine.ops import F32, LOGITS, Q8, Q8X2
from edge.engine.plan import _number_of
from edge.errors import NativeError
from edge.graph.ops import Activation, GateActivation
from edge.native import lib

pytestmark = [pytest.mark.native, pytest.mark.all_isas]

EPS = np.finfo(np.float32).eps
#: What a weight is: its type, packed fast, or with "-compact" behind it.
KINDS = [*TYPES, *(f"{t}-compact" for t in COMPACT_TYPES)]
#: With the buffers that it takes.
FORMS = [(t, F32) for t in FLOAT_TYPES] + [
    (kind, form) for kind in KINDS if kind not in FLOAT_TYPES for form in (Q8, Q8X2)
]
M = [*range(1, 10), 17]

#: Rows (m, k) that are hard on rounding, scales and clamps.
EXTREMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeros": lambda x: x * 0,
    "denormals": lambda x: (x * 1e-39).astype(np.float32),
    "tiny groups": lambda x: x * np.float32(2.0**-101),
    "huge": lambda x: x * np.float32(1e30),
    "mixed": lambda x: x * np.float32(10) ** np.arange(-30, 30)[: x.shape[1] % 60].mean(),
    "one large": lambda x: np.where(np.arange(x.shape[1]) == 5, np.float32(1e6), x),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 of N(0, 1)."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wide(kind: str, k: int) -> int:
    """k, up to whole blocks."""
    block = SIZES[kind.partition("-")[0]].block
    return -(-k // block) * block


def pack(kind: str, raw: np.ndarray, shape: tuple[int, int]) -> tuple[Weight, np.ndarray]:
    """A weight, and its values."""
    type_name, _, form = kind.partition("-")
    weight = packed(type_name, raw, shape, form=form or "fast")
    return weight, refmath.dequantise(type_name, raw.view(np.uint8), shape)


def moderate(kind: str, n: int, k: int, seed: int = 0) -> tuple[Weight, np.ndarray]:
    """A weight with values of about one, and the values in float64."""
    type_name = kind.partition("-")[0]
    raw = random_blocks(type_name, n * k // SIZES[type_name].block, seed)
    if type_name in FLOAT_TYPES:
        values = normal(n, k, seed=seed)
        float_type = {"F32": "<f4", "F16": "<f2"}.get(type_name)
        raw = values.astype(float_type) if float_type else (values.view("u4") >> 16).astype("<u2")
    elif type_name == "MXFP4":
        raw[:, 0] = 122 + raw[:, 0] % 6
    elif type_name == "NVFP4":
        raw[:, :4] = 32 + raw[:, :4] % 32
    else:
        set_scales(type_name, raw, np.ones((n_halves(type_name), len(raw))))
        size = refmath.dequantise(type_name, raw, (n, k)).std()
        set_scales(type_name, raw, normal(n_halves(type_name), len(raw), seed=seed) / size)
    weight, values = pack(kind, raw, (n, k))
    return weight, values.astype(np.float64)


def set_scales(type_name: str, raw: np.ndarray, values: np.ndarray) -> None:
    """The f16 numbers of blocks; values: (numbers per block, blocks)."""
    for i, row in enumerate(values):
        set_half(type_name, raw, i, row.astype("<f2").view("<u2"))


def seen(x: np.ndarray, form: int) -> np.ndarray:
    """x (m, k) as a matmul reads it, in float64."""
    if form == F32:
        return x.astype(np.float64)
    first = once(x)
    return first if form == Q8 else first + once((x - first).astype(np.float32))


def once(x: np.ndarray) -> np.ndarray:
    """x through one quantisation."""
    codes, scales = refmath.quantise_activations(x)
    return codes.astype(np.float64) * np.repeat(scales, 32, axis=1).astype(np.float64)


def matmul(
    isa: str, x: np.ndarray, weights: list[Weight], form: int = F32, **options: object
) -> np.ndarray:
    """[x w0 | x w1 ...] with options column, extra columns behind, residual (m, dim)."""
    spec = Spec(isa)
    source = spec.given(x)
    source = source if form == F32 else spec.quantized(source, form)
    column, behind = int(options.get("column", 0)), int(options.get("behind", 0))
    dim = column + sum(w.shape[0] for w in weights) + behind
    residual = options.get("residual")
    inputs = (source,) if residual is None else (source, spec.given(residual))
    out = spec.op("matmul", inputs, spec.buffer(F32, dim), weights, column=column)
    return evaluate(spec, out, len(x))[:, column : dim - behind]


# ---- matmuls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(1, 32), (15, 96), (16, 576), (17, 96), (48, 32)])
@pytest.mark.parametrize("kind, form", FORMS)
def test_matmul(kind: str, form: int, n: int, k: int) -> None:
    k = wide(kind, k)
    weight, values = moderate(kind, n, k)
    for m in M:
        x = normal(m, k, seed=m)
        got = on_all_isas(lambda isa, x=x: matmul(isa, x, [weight], form))
        exact = seen(x, form) @ values.T
        terms = np.abs(seen(x, form)) @ np.abs(values).T
        assert (np.abs(got - exact) <= terms * EPS * (k / 32 + 8)).all()


@pytest.mark.parametrize("k", [1, 33, 47])
@pytest.mark.parametrize("type_name", FLOAT_TYPES)
def test_float_matmul_of_any_width(type_name: str, k: int) -> None:
    weight, values = moderate(type_name, 19, k)
    x = normal(9, k)
    got = on_all_isas(lambda isa: matmul(isa, x, [weight]))
    np.testing.assert_allclose(got, x.astype(np.float64) @ values.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, form", FORMS)
def test_a_column_does_not_depend_on_its_neighbours(kind: str, form: int) -> None:
    k = wide(kind, 96)
    weight, x = moderate(kind, 33, k)[0], normal(9, k)
    for isa in native.isas():
        alone = [matmul(isa, x[i : i + 1], [weight], form) for i in range(len(x))]
        np.testing.assert_array_equal(np.concatenate(alone), matmul(isa, x, [weight], form))


@pytest.mark.parametrize("kind, form", FORMS)
def test_matmul_of_any_weight_bytes(kind: str, form: int) -> None:
    """Denormal and largest scales, all codes."""
    type_name, k = kind.partition("-")[0], wide(kind, 96)
    raw = random_blocks(type_name, 17 * k // SIZES[type_name].block)
    weight, x = pack(kind, raw, (17, k))[0], normal(5, k)
    on_all_isas(lambda isa: matmul(isa, x, [weight], form))


@pytest.mark.parametrize("type_name, form", [("F16", F32), ("Q4_0", Q8), ("Q8_0", Q8X2)])
def test_weights_side_by_side_with_residual_and_column(type_name: str, form: int) -> None:
    weights = [moderate(type_name, n, 64, seed=n)[0] for n in (17, 16, 5)]
    x, residual = normal(6, 64), normal(6, 48, seed=1)
    parts = [matmul("scalar", x, [w], form) for w in weights]
    together = on_all_isas(lambda isa: matmul(isa, x, weights, form))
    np.testing.assert_array_equal(together, np.concatenate(parts, 1))
    placed = on_all_isas(
        lambda isa: matmul(isa, x, weights[:2], form, column=9, behind=6, residual=residual)
    )
    want = np.concatenate(parts[:2], 1) + residual[:, 9:42]
    np.testing.assert_array_equal(placed, want)


def test_matmul_leaves_other_columns_alone() -> None:
    x, (weight, _) = normal(3, 32), moderate("Q4_0", 17, 32)
    spec = Spec()
    source, out = spec.quantized(spec.given(x)), spec.given(normal(3, 40, seed=1))
    spec.op("matmul", (source,), out, [weight], column=3)
    got, want = evaluate(spec, out, 3), normal(3, 40, seed=1)
    np.testing.assert_array_equal(got[:, :3], want[:, :3])
    np.testing.assert_array_equal(got[:, 20:], want[:, 20:])
    np.testing.assert_array_equal(got[:, 3:20], matmul("scalar", x, [weight], Q8))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gated_matmul(kind: str, fused: bool) -> None:
    dim, k, form = 48 if fused else 37, wide(kind, 96), F32 if kind in FLOAT_TYPES else Q8
    x = normal(9, k)
    gate_up = (
        [moderate(kind, 2 * dim, k)[0]]
        if fused
        else [moderate(kind, dim, k, seed)[0] for seed in (1, 2)]
    )

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        source = spec.given(x)
        source = source if form == F32 else spec.quantized(source)
        out = spec.op("gated_matmul", (source,), spec.buffer(F32, dim), gate_up, activation=0)
        return evaluate(spec, out, len(x))

    apart = gated("scalar", matmul("scalar", x, gate_up, form))
    np.testing.assert_array_equal(on_all_isas(run), apart)


@pytest.mark.parametrize("n, k", [(1, 1), (16, 33), (17, 62), (33, 96), (48, 576)])
def test_native_bf16(n: int, k: int) -> None:
    """Exact products of bfloat16 numbers, summed in some order; refused where the CPU has none."""
    weight, values = moderate("BF16", n, k)
    x = (normal(9, k).view("u4") & 0xFFFF0000).view("f4")  # bfloat16 already
    exact, terms = x.astype("f8") @ values.T, np.abs(x.astype("f8")) @ np.abs(values).T
    for isa in native.isas():
        spec = Spec(isa, native_bf16=True)
        out = spec.op("matmul", (spec.given(x),), spec.buffer(F32, n), [weight])
        if not lib.edge_isa_has_bf16(isa_index(isa)):
            with pytest.raises(NativeError, match="bfloat16"):
                Plan(spec)
            continue
        for m in M:
            got = evaluate(spec, out, min(m, len(x)))
            assert (np.abs(got - exact[:m]) <= terms[:m] * EPS * (k / 2 + 4)).all()


# ---- quantisation --------------------------------------------------------------------------------


def identity(k: int) -> Weight:
    """A Q8_0 weight that multiplies by one, exactly."""
    raw = np.zeros((k, k // 32, 34), np.uint8)
    raw[:, :, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    for i in range(k):
        raw[i, i // 32, 2 + i % 32] = 1
    return packed("Q8_0", raw, (k, k))


@pytest.mark.parametrize("extreme", ["none", *EXTREMES])
def test_quantised_activations_are_the_references(extreme: str) -> None:
    x = normal(9, 96) if extreme == "none" else EXTREMES[extreme](normal(9, 96))
    x = x.astype(np.float32)
    got = on_all_isas(lambda isa: matmul(isa, x, [identity(96)], Q8))
    codes, scales = refmath.quantise_activations(x)
    np.testing.assert_array_equal(got, codes * np.repeat(scales, 32, axis=1))


def test_rounding_ties_go_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    got = on_all_isas(lambda isa: matmul(isa, x, [identity(32)], Q8))
    assert got[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_second_quantisation_takes_what_the_first_left() -> None:
    x = normal(9, 96)
    got = on_all_isas(lambda isa: matmul(isa, x, [identity(96)], Q8X2))
    first, both = seen(x, Q8), seen(x, Q8X2)
    np.testing.assert_array_equal(got, first.astype("f4") + (both - first).astype("f4"))
    step = np.abs(x).reshape(9, 3, 32).max(2).repeat(32, 1) / 127 / 254
    assert (np.abs(got - x) <= step * 0.51).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [Q8, Q8X2])
def test_group_that_is_not_finite_makes_nan(form: int, value: float) -> None:
    x = normal(2, 96)
    x[1, 40] = value
    got = on_all_isas(lambda isa: matmul(isa, x, [identity(96)], form))
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).all()


# ---- vectors -------------------------------------------------------------------------------------


def norm(
    isa: str,
    x: np.ndarray,
    weights: np.ndarray | tuple[np.ndarray, np.ndarray],
    eps: float,
    form: int = F32,
    *,
    centred: bool = False,
) -> np.ndarray:
    """A norm, by a weight or by a weight and a bias, read back through an identity when it is
    quantised."""
    spec = Spec(isa)
    k, held = x.shape[1], weights if isinstance(weights, tuple) else (weights,)
    attrs = {"eps": float(eps), "centred": int(centred)}
    vectors = [vector(weight) for weight in held]
    out = spec.op("norm", (spec.given(x),), spec.buffer(form, k), vectors, **attrs)
    if form != F32:
        out = spec.op("matmul", (out,), spec.buffer(F32, k), [identity(k)])
    return evaluate(spec, out, len(x))


@pytest.mark.parametrize("k", [1, 15, 16, 33, 96, 576])
def test_norm(k: int) -> None:
    x, weight = normal(9, k) * 3, normal(k, seed=1)
    got = on_all_isas(lambda isa: norm(isa, x, weight, 1e-5))
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(got, exact, rtol=2e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("k", [1, 15, 16, 33, 96, 576])
def test_layer_norm(k: int, biased: bool) -> None:
    x, weight, bias = normal(9, k) * 3 + 2, normal(k, seed=1), normal(k, seed=2)
    weights = (weight, bias) if biased else weight
    got = on_all_isas(lambda isa: norm(isa, x, weights, 1e-5, centred=True))
    exact = refgraph.centred(x.astype(np.float64), 1e-5) * weight + (bias if biased else 0)
    np.testing.assert_allclose(got, exact, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["rms", "layer", "layer and bias"])
@pytest.mark.parametrize("form", [Q8, Q8X2])
@pytest.mark.parametrize("extreme", ["none", *EXTREMES])
def test_norm_then_quantize_in_one(extreme: str, form: int, kind: str) -> None:
    x = (normal(9, 96) if extreme == "none" else EXTREMES[extreme](normal(9, 96))).astype("f4")
    weight = normal(96, seed=1)
    weights = (weight, normal(96, seed=2)) if "bias" in kind else weight
    options: dict[str, Any] = {"centred": kind != "rms"}
    got = on_all_isas(lambda isa: norm(isa, x, weights, 1e-6, form, **options))
    plain = on_all_isas(lambda isa: norm(isa, x, weights, 1e-6, **options))
    apart = matmul("scalar", plain, [identity(96)], form)
    np.testing.assert_array_equal(got, apart)


#: Of norms of heads: first element, number, elements of each.
HEADS = [(0, 1, 1), (3, 4, 17), (0, 6, 16), (1, 2, 256)]


def by_row(
    kind: str,
    x: np.ndarray,
    weights: Sequence[Weight] = (),
    y: np.ndarray | None = None,
    **attrs: Any,
) -> np.ndarray:
    """An op that may run in place: the same bits in place, apart, and everywhere."""

    def run(isa: str, in_place: bool) -> np.ndarray:
        spec = Spec(isa)
        inputs = [spec.given(rows) for rows in ((x,) if y is None else (x, y))]
        out = inputs[0] if in_place else spec.buffer(F32, x.shape[1])
        spec.weight(vector(np.ones(1)))  # a plan has at least one
        return evaluate(spec, spec.op(kind, inputs, out, weights, **attrs), len(x))

    apart = on_all_isas(lambda isa: run(isa, False))
    np.testing.assert_array_equal(on_all_isas(lambda isa: run(isa, True)), apart)
    return apart


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    "heads, weight",
    [
        *((heads, weight) for heads in HEADS for weight in ("none", "vector", "matrix")),
        *(((16, 1, 576), weight) for weight in ("none", "vector")),
    ],
)
def test_head_norm(heads: tuple[int, int, int], weight: str, centred: bool) -> None:
    first, n_heads, head_dim = heads
    x, n = normal(9, first + n_heads * head_dim + 5) * 3 + 1, n_heads * head_dim
    w = normal(*((n_heads, head_dim) if weight == "matrix" else (head_dim,)), seed=1)
    held = {"none": [], "vector": [vector(w.ravel()[:head_dim])], "matrix": []}[weight]
    held = [rows_weight(w)] if weight == "matrix" else held
    attrs = {"column": first, "n_heads": n_heads, "head_dim": head_dim, "eps": 1e-5}
    got = by_row("head_norm", x, held, centred=int(centred), **attrs)
    parts = x[:, first : first + n].reshape(9, n_heads, head_dim).astype(np.float64)
    root = np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
    want = refgraph.centred(parts, 1e-5) if centred else parts / root
    want = want if weight == "none" else want * w
    part = got[:, first : first + n].reshape(want.shape)
    np.testing.assert_allclose(part, want, rtol=5e-6, atol=2e-6)
    np.testing.assert_array_equal(got[:, :first], x[:, :first])
    np.testing.assert_array_equal(got[:, first + n :], x[:, first + n :])


@pytest.mark.parametrize("sizes", [(1,), (17, 33), (16, 5, 64)])
@pytest.mark.parametrize("first", [0, 7])
def test_bias(sizes: tuple[int, ...], first: int) -> None:
    x, biases = normal(9, first + sum(sizes) + 3), [normal(n, seed=n) for n in sizes]
    want = x.copy()
    want[:, first : first + sum(sizes)] += np.concatenate(biases)
    got = by_row("bias", x, [vector(bias) for bias in biases], column=first)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dim", [1, 17, 300])
def test_products(dim: int) -> None:
    x, y = normal(9, dim), normal(9, dim, seed=1)
    np.testing.assert_array_equal(by_row("gain", x, [vector(y[0])], n=x.shape[1]), x * y[0])
    np.testing.assert_array_equal(by_row("gain", x, [vector(y[0, :1])], n=x.shape[1]), x * y[0, :1])
    np.testing.assert_array_equal(by_row("multiply", x, y=y), x * y)
    np.testing.assert_array_equal(by_row("multiply", x, y=y[:, :1]), x * y[:, :1])
    factor = np.float32(0.3)
    np.testing.assert_array_equal(by_row("scale", x, scale=float(factor)), x * factor)


@pytest.mark.parametrize("first, n", [(0, 1), (3, 17), (0, 40), (39, 1)])
def test_slice(first: int, n: int) -> None:
    x = normal(9, 40)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        out = spec.op("slice", (spec.given(x),), spec.buffer(F32, n), column=first)
        return evaluate(spec, out, len(x))

    np.testing.assert_array_equal(on_all_isas(run), x[:, first : first + n])


def test_logits_change_in_place() -> None:
    """Bias, scale and softcap behind the output head."""
    x, (weight, _), bias = normal(9, 32), moderate("F32", 21, 32), normal(21, seed=1)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        last = spec.op("gather", (spec.given(x),), spec.buffer(F32, 32, logit_rows=True))
        out = spec.op("matmul", (last,), spec.buffer(LOGITS, 21), [weight])
        spec.op("bias", (out,), out, [vector(bias)])
        spec.op("scale", (out,), out, scale=0.5)
        spec.op("softcap", (out,), out, softcap=3.0)
        return Plan(spec).run(range(9), n_logits=4)

    logits = (matmul("scalar", x, [weight])[5:] + bias) * np.float32(0.5)
    np.testing.assert_array_equal(on_all_isas(run), by_row("softcap", logits, softcap=3.0))


def of_each(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of floats, of each element."""
    return np.vectorize(function, otypes=[np.float64])


#: In float64, without the cancellation of the referee's.
EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **refgraph.ACTIVATIONS,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / (1 + np.exp(-np.sqrt(8 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": of_each(lambda x: x / 2 * math.erfc(-x / math.sqrt(2))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def numbers(most: float) -> np.ndarray:
    """(1, n) float32 from -most to most, and those near 0."""
    near = np.geomspace(1e-30, min(1, most), 200)
    return np.concatenate([np.linspace(-most, most, 3001), near, -near])[None].astype(np.float32)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activate(activation: Activation) -> None:
    """Close to the true function; its argument's rounding counts where exp is far from 1."""
    for most, ulps in ((1.0, 4), (5.0, 16), (9.0, 80)):
        x = numbers(most)
        got = by_row("activate", x, activation=_number_of(activation))
        want = EXACT[activation](x.astype(np.float64))
        np.testing.assert_allclose(got, want, rtol=ulps * EPS, atol=1e-37)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activate_far_from_zero(activation: Activation) -> None:
    far = np.array([10, 14, 50, 88, 200, 1e4, 1e15, 1e30, 3e38], np.float32)
    x = np.concatenate([far, -far])[None]
    got = by_row("activate", x, activation=_number_of(activation))
    with np.errstate(over="ignore"):
        want = EXACT[activation](x.astype(np.float64)).astype(np.float32)
    most = 2 if activation == "silu" else 1e-33  # exp ends at 2e38
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=most)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap(cap: float) -> None:
    for x in (numbers(3), numbers(100), numbers(3e38)):
        got = by_row("softcap", x, softcap=cap)
        exact = cap * np.tanh(x.astype(np.float64) / cap)
        np.testing.assert_allclose(got, exact, rtol=5 * EPS, atol=1e-37)
        assert (np.abs(got) <= cap).all()


@pytest.mark.parametrize("eps", [-1e-6, -0.25, 0.0])
def test_xielu(eps: float) -> None:
    args = {"alpha_p": 0.75, "alpha_n": 0.5, "beta": 0.5, "eps": eps}
    for x in (numbers(3), numbers(80), numbers(1e15)):
        got, exact = by_row("xielu", x, **args), x.astype(np.float64)
        above = 0.75 * exact**2 + 0.5 * exact
        below = 0.5 * (np.expm1(np.minimum(exact, eps)) - exact) + 0.5 * exact
        terms = np.abs(exact) + np.minimum(np.abs(np.expm1(np.minimum(exact, eps))), 1)
        off = np.abs(got - np.where(exact > 0, above, below))
        assert (off <= np.where(exact > 0, above, terms) * 3 * EPS + 1e-37).all()


@pytest.mark.parametrize("kind", ["activate", "softcap", "xielu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_functions_of_what_is_no_number(kind: str, value: float) -> None:
    x = normal(3, 40)
    x[1, 20] = value
    calls: list[dict[str, Any]] = [{"softcap": 5.0, "alpha_p": 0.7, "alpha_n": 0.6, "beta": 0.5}]
    if kind == "activate":
        calls = [{"activation": _number_of(name)} for name in get_args(Activation)]
    for attrs in calls:
        got, without = by_row(kind, x, **attrs), x.copy()
        without[1, 20] = 0
        others = np.ones(x.shape, bool)
        others[1, 20] = False
        np.testing.assert_array_equal(got[others], by_row(kind, without, **attrs)[others])
        assert not np.isnan(value) or np.isnan(got[1, 20])


def gated(isa: str, x: np.ndarray, activation: GateActivation = "silu") -> np.ndarray:
    """activation(gate) * up of x = [gate | up]."""
    spec = Spec(isa)
    out, number = spec.buffer(F32, x.shape[1] // 2), _number_of(activation)
    return evaluate(spec, spec.op("gated", (spec.given(x),), out, activation=number), len(x))


@pytest.mark.parametrize("activation", get_args(GateActivation))
@pytest.mark.parametrize("dim", [1, 15, 16, 96])
def test_gated(dim: int, activation: GateActivation) -> None:
    x = normal(9, 2 * dim) * 8
    got = on_all_isas(lambda isa: gated(isa, x, activation))
    gate, up = np.split(x.astype(np.float64), 2, 1)
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        want = gate / (1 + np.exp(-1.702 * gate)) * up
    else:
        with np.errstate(over="ignore"):
            want = EXACT[activation](gate) * up
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-33)


@pytest.mark.parametrize("activation", get_args(GateActivation))
def test_gated_matmul_of_every_activation(activation: GateActivation) -> None:
    x, gate_up, number = normal(9, 64), moderate("Q4_0", 96, 64)[0], _number_of(activation)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        source, out = spec.quantized(spec.given(x)), spec.buffer(F32, 48)
        spec.op("gated_matmul", (source,), out, [gate_up], activation=number)
        return evaluate(spec, out, len(x))

    apart = gated("scalar", matmul("scalar", x, [gate_up], Q8), activation)
    np.testing.assert_array_equal(on_all_isas(run), apart)


def test_gated_far_from_zero() -> None:
    gate = np.array([-1e30, -200, -88, -87, -1e-40, 0, 1e-40, 88, 200, 1e30], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    got = on_all_isas(lambda isa: gated(isa, x))[0]
    np.testing.assert_allclose(got[3:], refgraph.silu(gate[3:].astype("f8")), rtol=1e-5, atol=1e-35)
    assert (np.abs(got[1:3]) < 1e-34).all()
    assert np.isfinite(got).all()


@pytest.mark.parametrize("dim", [1, 17, 64])
def test_add(dim: int) -> None:
    x, y = normal(9, dim), normal(9, dim, seed=1)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        out = spec.op("add", (spec.given(x), spec.given(y)), spec.buffer(F32, dim))
        return evaluate(spec, out, len(x))

    np.testing.assert_array_equal(on_all_isas(run), x + y)


@pytest.mark.parametrize("kind", KINDS)
def test_embed_reads_rows_of_panels(kind: str) -> None:
    type_name, k = kind.partition("-")[0], wide(kind, 96)
    raw = random_blocks(type_name, 37 * k // SIZES[type_name].block)
    (weight, values), tokens = pack(kind, raw, (37, k)), [36, 0, 15, 16, 36, 31, 1]

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        out = spec.op("embed", (), spec.buffer(F32, k), [weight])
        plan = Plan(spec)
        plan.run(tokens)
        return plan.read(out, len(tokens))

    np.testing.assert_array_equal(on_all_isas(run).view("u4"), values[tokens].view("u4"))


def test_gather_takes_the_last_rows() -> None:
    x = normal(20, 33)
    spec = Spec()
    out = spec.op("gather", (spec.given(x),), spec.buffer(F32, 33, logit_rows=True))
    spec.op("matmul", (out,), spec.buffer(LOGITS, 5), [rows_weight(normal(5, 33))])
    plan = Plan(spec)
    for n in (0, 1, 3, 9, 20):
        plan.run(range(20), n_logits=n)
        np.testing.assert_array_equal(plan.read(out, n), x[20 - n :])


# ---- positions and keys --------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("start", [0, 1000, 131_000])
def test_angles(start: int, factors: bool) -> None:
    n_rot, base, scale, magnitude = 96, 10_000.0, 0.25, 1.19
    divisors = np.linspace(1, 64, n_rot // 2, dtype=np.float32)
    attrs = {"n_rot": n_rot, "base": base, "scale": scale, "magnitude": magnitude}

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa)
        spec.weight(vector(divisors))  # a plan has at least one
        weights = [vector(divisors)] if factors else []
        out = spec.op("angles", (), spec.buffer(F32, n_rot), weights, **attrs)
        plan = Plan(spec, start + 20)
        plan.run(range(20), start=start)
        return plan.read(out, 20)

    frequency = scale * base ** (-2.0 * np.arange(n_rot // 2) / n_rot)
    angle = (start + np.arange(20))[:, None] * frequency / (divisors if factors else 1)
    want = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(20, n_rot) * magnitude
    np.testing.assert_allclose(on_all_isas(run), want, rtol=1e-6, atol=1e-7)


# ---- results that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind, form", FORMS)
def test_bad_activation_reaches_the_logits(kind: str, form: int, value: float) -> None:
    k = wide(kind, 96)
    weight, x = moderate(kind, 17, k)[0], normal(9, k)
    x[4, 50] = value

    def logits(isa: str, n: int) -> np.ndarray:
        spec = Spec(isa)
        source = spec.given(x)
        last = spec.op("gather", (source,), spec.buffer(F32, k, logit_rows=True))
        last = last if form == F32 else spec.quantized(last, form)
        spec.op("matmul", (last,), spec.buffer(LOGITS, 17), [weight])
        return Plan(spec).run(range(9), n_logits=n)

    for isa in native.isas():
        assert np.isfinite(logits(isa, 4)).all()  # of the rows behind it
        with pytest.raises(NativeError, match="NaN or infinite") as caught:
            logits(isa, 5)
        assert caught.value.code == lib.EDGE_NOT_FINITE


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_numbers_do_not_crash(value: float) -> None:
    x = normal(20, 96)
    x[3, 40] = value
    on_all_isas(lambda isa: norm(isa, x, np.ones(96), 1e-5))
    on_all_isas(lambda isa: norm(isa, x, np.ones(96), 1e-5, centred=True))
    by_row("head_norm", x, n_heads=6, head_dim=16, eps=1e-5)
    for activation in get_args(GateActivation):
        on_all_isas(lambda isa, name=activation: gated(isa, x, name))


# ---- numbers for the sampler ---------------------------------------------------------------------


def sampled(function: str, x: np.ndarray) -> np.ndarray:
    """edge_softmax or edge_log_softmax, on every instruction set."""

    def run(isa: str) -> np.ndarray:
        out = np.full_like(x, np.nan)
        getattr(lib, f"edge_{function}")(isa_index(isa), floats(x), x.size, floats(out))
        return out

    return on_all_isas(run)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 1000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e4])
def test_softmax(n: int, spread: float) -> None:
    x = normal(n) * np.float32(spread)
    exact = refgraph.softmax(x.astype(np.float64))
    got = sampled("softmax", x)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-35)
    np.testing.assert_array_equal(native.softmax(x), got)
    exact = refgraph.log_softmax(x.astype(np.float64))
    got = sampled("log_softmax", x)
    np.testing.assert_allclose(got, exact, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(native.log_softmax(x), got)


def test_softmax_of_impossible_tokens() -> None:
    x = np.array([0, -np.inf, 0], np.float32)
    np.testing.assert_allclose(sampled("softmax", x), [0.5, 0, 0.5], atol=1e-35)
    assert sampled("log_softmax", x)[1] == -np.inf


def test_softmax_of_nothing() -> None:
    assert native.softmax(np.empty(0, np.float32)).shape == (0,)
