"""Attention over the pages of a cache: every instruction set gives scalar's bits, and what numpy
says of the keys and values as the pages keep them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import refgraph
import refkv
import refmath
from native_plan import Plan, Spec, evaluate, on_all_isas, vector
from test_kernels import EXTREMES, normal

from edge import native
from edge.engine.ops import F32
from edge.graph import ops
from edge.kv.shape import kv_types

pytestmark = [pytest.mark.native, pytest.mark.all_isas]

CODES = [kv for kv in kv_types() if kv != "f16"]
#: Instruction set -> tokens in one call. Scalar is by far the slowest, above all under the
#: sanitizers, and has run once already, to compare with.
CHUNKS = dict.fromkeys(native.isas(), (1, 7, 64)) | {"scalar": (7,)}


@dataclass(frozen=True)
class Heads:
    """An attention over a cache."""

    n: int
    n_kv: int
    dim: int
    window: int = 0
    n_rot: int = 0
    interleaved: bool = False
    kv: str = "f16"
    sinks: int = 0  # pages
    sliding: int = 0  # pages, 0: all
    scale: float = 0.0  # of scores, 0: 1 / sqrt(dim)
    softcap: float = 0.0  # of scores, 0: none
    has_sinks: bool = False  # another score for each head

    @property
    def sink_scores(self) -> np.ndarray:
        """(n,): below, among and above the scores."""
        return np.resize(np.array([-3, 0, 1.5, 9], np.float32), self.n)

    def spec(self, isa: str, x: np.ndarray) -> tuple[Spec, int, int]:
        """store and attention of x = [q | k | v]; the spec, and the buffers of x and the result."""
        spec = Spec(isa, max_tokens=len(x), cache_shape=(2, self.n_kv, self.dim), kv=self.kv)
        heads = {"layer": 1, "n_heads": self.n, "n_kv_heads": self.n_kv, "head_dim": self.dim}
        source = spec.given(x)
        inputs = [source]
        if self.n_rot:
            angles = spec.buffer(F32, self.n_rot)
            attrs = {"n_rot": self.n_rot, "base": 1e4, "scale": 1.0, "magnitude": 1.0}
            inputs.append(spec.op("angles", (), angles, **attrs))
        rotary = {"n_rot": self.n_rot, "interleaved": int(self.interleaved)}
        spec.op("store", inputs, source, **heads, **rotary)
        out = spec.buffer(F32, self.n * self.dim)
        sight = {"window": self.window, "attention_scale": self.scale, "softcap": self.softcap}
        sinks = [vector(self.sink_scores)] if self.has_sinks else []
        spec.op("attention", (source,), out, sinks, **heads, **sight)
        return spec, source, out

    def run(self, isa: str, x: np.ndarray, chunk: int, threads: int = 1) -> np.ndarray:
        """All rows, `chunk` tokens at a time."""
        return self.plan(isa, x, chunk, threads)[1]

    def plan(
        self, isa: str, x: np.ndarray, chunk: int, threads: int = 1
    ) -> tuple[Plan, np.ndarray]:
        """The plan too, whose cache then holds the keys and values."""
        spec, _, out = self.spec(isa, x)
        plan, rows = Plan(spec), []
        plan.cache.group.sink_pages, plan.cache.group.window_pages = self.sinks, self.sliding
        for start in range(0, len(x), chunk):
            tokens = range(start, min(start + chunk, len(x)))
            plan.run(tokens, start=start, threads=threads)
            rows.append(plan.read(out, len(tokens)))
        return plan, np.concatenate(rows)

    def exact(self, x: np.ndarray) -> np.ndarray:
        """By the referee, in float64 with a float16 cache."""
        heads = ops.Heads(self.n, self.n_kv, self.dim)
        weights = {"sinks": self.sink_scores.astype("f8")} if self.has_sinks else {}
        scores = (self.window, self.scale, self.softcap)
        op = ops.Attention((), "", tuple(weights), 0, heads, *scores)
        run = refgraph.Run(np.arange(len(x)), weights, {}, np.float16)
        return refgraph.attention(run, op, x.astype(np.float64))

    def qkv(self, t: int) -> np.ndarray:
        """Random rows."""
        return normal(t, (self.n + 2 * self.n_kv) * self.dim, seed=t)


@pytest.mark.parametrize(
    "heads",
    [
        *(Heads(group * 2, 2, 16) for group in (1, 3, 8)),
        *(Heads(3, 1, dim) for dim in (64, 96, 128, 256, 512)),
        *(Heads(3, 1, 32, window) for window in (1, 5, 16, 64, 70, 500)),
        Heads(1, 1, 16),
        Heads(8, 1, 48, 33),
        Heads(2, 1, 32, scale=0.25),
        *(Heads(3, 1, 32, softcap=cap) for cap in (0.5, 2, 50)),
        *(Heads(6, 2, 32, window, has_sinks=True) for window in (0, 5)),
        Heads(4, 2, 64, 40, scale=0.5, softcap=3, has_sinks=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("t", [1, 17, 64, 65, 150])
def test_attention(heads: Heads, t: int) -> None:
    x = heads.qkv(t)
    whole = on_all_isas(lambda isa: heads.run(isa, x, t))
    np.testing.assert_allclose(whole, heads.exact(x), rtol=2e-5, atol=2e-6)
    for isa, chunks in CHUNKS.items():
        for chunk in chunks:
            np.testing.assert_array_equal(heads.run(isa, x, chunk), whole)


def test_attention_on_many_threads() -> None:
    heads = Heads(6, 2, 32, 40)
    x = heads.qkv(150)
    want = heads.run("scalar", x, 150)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(heads.run("scalar", x, 150, threads), want)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_attention_to_extremes(extreme: str) -> None:
    heads = Heads(3, 1, 32)
    x = EXTREMES[extreme](heads.qkv(70)).astype(np.float32)
    x[:, 128:] = heads.qkv(70)[:, 128:]  # values stay what they are
    got = on_all_isas(lambda isa: heads.run(isa, x, 70))
    if extreme != "huge":  # keys beyond float16 are infinite
        assert np.isfinite(got).all()


def test_values_beyond_float16_are_not_finite() -> None:
    heads = Heads(1, 1, 16)
    x = heads.qkv(20)
    x[10, 32:] = 1e6
    got = on_all_isas(lambda isa: heads.run(isa, x, 20))
    assert np.isfinite(got[:10]).all() and not np.isfinite(got[10:]).any()


@pytest.mark.parametrize("n_rot, interleaved", [(32, False), (32, True), (24, False), (2, True)])
def test_store_rotates_queries_and_keys(n_rot: int, interleaved: bool) -> None:
    heads = Heads(3, 1, 32, n_rot=n_rot, interleaved=interleaved)
    x = heads.qkv(70)

    def run(isa: str) -> np.ndarray:
        spec, source, _ = heads.spec(isa, x)
        plan = Plan(spec)
        plan.run(range(70))
        return plan.read(source, 70)

    op = ops.Rotate((), "", (), 4, 32, ops.Rope(n_rot, 1e4, interleaved))
    state = refgraph.Run(np.arange(70), {}, {}, np.float16)
    got = on_all_isas(run)
    np.testing.assert_allclose(got, refgraph.rope(state, op, x.astype("f8")), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(got[:, 4 * 32 :], x[:, 4 * 32 :])
    rotated = Heads(3, 1, 32).exact(got)
    attended = on_all_isas(lambda isa: heads.run(isa, x, 7))
    np.testing.assert_allclose(attended, rotated, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("n_rot, interleaved", [(32, False), (24, True), (2, False)])
@pytest.mark.parametrize("n_heads", [1, 3])
def test_rotate_in_place(n_heads: int, n_rot: int, interleaved: bool) -> None:
    x = normal(70, 4 * 32)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa, max_tokens=70)
        source, angles = spec.given(x), spec.buffer(F32, n_rot)
        spec.op("angles", (), angles, n_rot=n_rot, base=1e4, scale=1.0, magnitude=1.0)
        rotary = {"n_rot": n_rot, "interleaved": int(interleaved)}
        spec.op("rotate", (source, angles), source, n_heads=n_heads, head_dim=32, **rotary)
        return evaluate(spec, source, 70)

    op = ops.Rotate((), "", (), n_heads, 32, ops.Rope(n_rot, 1e4, interleaved))
    state = refgraph.Run(np.arange(70), {}, {}, np.float16)
    got = on_all_isas(run)
    np.testing.assert_allclose(got, refgraph.rope(state, op, x.astype("f8")), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(got[:, n_heads * 32 :], x[:, n_heads * 32 :])


@pytest.mark.parametrize("low, high", [(0, 0), (0, 15), (3, 3), (2, 9), (2.5, 9.25), (9, 2)])
def test_angles_of_a_ramp(low: float, high: float) -> None:
    x = normal(70, 32)
    rope = ops.Rope(32, 1e4, False, scale=0.125, magnitude=1.25, ramp=(low, high))

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa, max_tokens=70)
        source, angles = spec.given(x), spec.buffer(F32, 32)
        ramp = {"has_ramp": 1, "ramp_low": low, "ramp_high": high}
        numbers = {"n_rot": 32, "base": 1e4, "scale": 0.125, "magnitude": 1.25}
        spec.op("angles", (), angles, **numbers, **ramp)
        spec.op("rotate", (source, angles), source, n_heads=1, head_dim=32, n_rot=32)
        return evaluate(spec, source, 70)

    op = ops.Rotate((), "", (), 1, 32, rope)
    state = refgraph.Run(np.arange(70), {}, {}, np.float16)
    want = refgraph.rope(state, op, x.astype("f8"))
    np.testing.assert_allclose(on_all_isas(run), want, rtol=1e-5, atol=2e-6)


def test_temperature_of_far_positions() -> None:
    x = normal(70, 48)

    def run(isa: str) -> np.ndarray:
        spec = Spec(isa, max_tokens=70)
        source = spec.given(x)
        spec.op("temperature", (source,), source, n=33, beta=0.5, length=16)
        return evaluate(spec, source, 70)

    got = on_all_isas(run)
    want = refgraph.temperature(ops.Temperature((), "", (), 33, 0.5, 16), x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(got[:16], x[:16])
    np.testing.assert_array_equal(got[:, 33:], x[:, 33:])
    assert np.abs(got[:, :33] - x[:, :33]).max() > 0.1


def test_queries_alone_read_what_an_earlier_op_stored() -> None:
    """Queries of another matrix over the keys and values of a layer below."""
    heads = Heads(3, 1, 32, 40)
    x = heads.qkv(70)
    own = x[:, : 3 * 32]

    def run(isa: str) -> np.ndarray:
        spec, _, _ = heads.spec(isa, x)
        alone = spec.given(own[:, ::-1].copy())
        out = spec.buffer(F32, 3 * 32)
        numbers = {"layer": 1, "n_heads": 3, "n_kv_heads": 1, "head_dim": 32, "window": 40}
        spec.op("attention", (alone,), out, **numbers)
        return evaluate(spec, out, 70)

    want = heads.exact(np.hstack([own[:, ::-1], x[:, 3 * 32 :]]))
    np.testing.assert_allclose(on_all_isas(run), want, rtol=2e-5, atol=2e-6)


def test_cache_keeps_float16_to_nearest_even() -> None:
    """With one position in sight, attention gives the value as the cache keeps it."""
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, (64, 48), dtype=np.uint32).view(np.float32)
    near = normal(64, 48) * np.float32(2) ** rng.integers(-30, 17, (64, 48))
    ties = (np.arange(64 * 48).reshape(64, 48) * 2.0**-25).astype(np.float32)
    for x in (any_bits, near.astype(np.float32), ties, 1 + ties * 2**13):
        x = x.astype(np.float32)
        x[:, :32] = 0
        x[np.isnan(x)] = 0
        got = on_all_isas(lambda isa, x=x: Heads(1, 1, 16, window=1).run(isa, x, 64))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(got, x[:, 32:].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_bad_numbers_pass_through_attention(part: str, value: float) -> None:
    heads = Heads(1, 1, 16)
    x = heads.qkv(70)
    x[30, 16 * ["query", "key", "value"].index(part) + 5] = value
    x[:, 5] = np.where(np.isfinite(x[:, 5]), np.abs(x[:, 5]), x[:, 5])
    finite = np.isfinite(on_all_isas(lambda isa: heads.run(isa, x, 70))).all(1)
    if part == "query":
        assert finite.sum() == 69 and not finite[30]
    elif part == "key" and value == -np.inf:
        assert finite.all()  # a score of minus infinity weighs nothing
    else:
        assert finite[:30].all() and not finite[30:].any()


# ---- keys and values as codes --------------------------------------------------------------------


def kept(heads: Heads, plan: Plan, t: int) -> np.ndarray:
    """What the pages keep of t positions: (3, t, kv heads, dim), see refkv."""
    size = plan.cache.memory[0].size // (2 * heads.n_kv)
    pages = plan.cache.memory[: -(-t // 64)]
    both = [
        [
            refkv.keys_and_values(page[size * (heads.n_kv + h) :][:size], heads.kv, heads.dim)
            for h in range(heads.n_kv)  # of layer 1
        ]
        for page in pages
    ]
    out = np.array(both).transpose(2, 0, 3, 1, 4)  # from (page, head, 3, slot, dim)
    return out.reshape(3, -1, heads.n_kv, heads.dim)[:, :t]


def visible(heads: Heads, t: int) -> np.ndarray:
    """(t, t): whether position i sees position j."""
    i, j = np.arange(t)[:, None], np.arange(t)
    seen = j <= i
    if heads.window:
        seen &= j > i - heads.window
    if heads.sliding:
        seen &= (j // 64 < heads.sinks) | (j // 64 > i // 64 - heads.sliding)
    return seen


def attention_over(heads: Heads, x: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """In float64; queries are quantised for codes. pages: of `kept`."""
    t, group = len(x), heads.n // heads.n_kv
    codes, base, values = np.repeat(pages, group, axis=2)
    scale = np.float32(1) / np.sqrt(np.float32(heads.dim))
    q = (x[:, : heads.n * heads.dim] * scale).reshape(-1, heads.dim)
    rounded = q
    if heads.kv != "f16":
        turn = refkv.turn if heads.kv == "q4" else lambda x: x
        whole, scales = refmath.quantise_activations(turn(q).astype(np.float32))
        rounded = turn(whole * np.repeat(scales, 32, axis=1).astype(np.float64))
    q, rounded = (z.reshape(t, heads.n, heads.dim) for z in (q, rounded))
    scores = np.einsum("ihd,jhd->hij", rounded, codes) + np.einsum("ihd,jhd->hij", q, base)
    scores[:, ~visible(heads, t)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, values).reshape(t, -1)


#: How near a kernel comes to it: a turned query may round to another code here and there.
NEAR = {"f16": 1e-5, "q8": 2e-5, "q4": 6e-3}


@pytest.mark.parametrize("kv", CODES)
@pytest.mark.parametrize(
    "heads", [(6, 2, 32), (3, 1, 64), (2, 1, 96), (8, 1, 128), (1, 1, 256), (2, 1, 512)], ids=str
)
@pytest.mark.parametrize("t", [1, 17, 65, 150])
def test_attention_over_codes(heads: tuple[int, int, int], kv: str, t: int) -> None:
    """What the pages keep is near what came in; attention is exact over what they keep."""
    h = Heads(*heads, kv=kv)
    x = h.qkv(t)
    x[:, : (h.n + h.n_kv) * h.dim] += 2 * normal(1, (h.n + h.n_kv) * h.dim, seed=9)  # a mean
    whole = on_all_isas(lambda isa: h.run(isa, x, t))
    for isa, chunks in CHUNKS.items():
        for chunk in chunks:
            np.testing.assert_array_equal(h.run(isa, x, chunk, threads=2), whole)
    pages = kept(h, h.plan("scalar", x, t)[0], t)
    came_in = x[:, h.n * h.dim :].reshape(t, 2, h.n_kv, h.dim)
    for got, want in ((pages[0] + pages[1], came_in[:, 0]), (pages[2], came_in[:, 1])):
        error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
        assert error < {"q8": 0.01, "q4": 0.12}[kv]
    np.testing.assert_allclose(whole, attention_over(h, x, pages), atol=NEAR[kv])


@pytest.mark.parametrize("kv", kv_types())
@pytest.mark.parametrize("sinks, sliding", [(0, 1), (1, 1), (1, 2), (2, 3), (0, 9)])
def test_sliding_window(kv: str, sinks: int, sliding: int) -> None:
    heads = Heads(3, 1, 32, kv=kv, sinks=sinks, sliding=sliding)
    x = heads.qkv(400)
    whole = on_all_isas(lambda isa: heads.run(isa, x, 400))
    for isa, chunks in CHUNKS.items():
        for chunk in chunks:
            np.testing.assert_array_equal(heads.run(isa, x, chunk), whole)
    pages = kept(heads, heads.plan("scalar", x, 400)[0], 400)
    np.testing.assert_allclose(whole, attention_over(heads, x, pages), atol=NEAR[kv])


def test_mean_and_direction_make_keys_better() -> None:
    """Keys around a mean, queries that mostly point one way: where they point, little is missed."""
    heads, t = Heads(3, 1, 64, kv="q4"), 256
    x = heads.qkv(t)
    mean = 4 * normal(1, 64, seed=5)
    direction = normal(1, 64, seed=6) / 8
    x[:, : 3 * 64] += 40 * np.tile(direction, 3)
    x[:, 3 * 64 : 4 * 64] += mean
    codes, base, _ = kept(heads, heads.plan("scalar", x, t)[0], t)
    missed = (codes + base)[:, 0] - x[:, 3 * 64 : 4 * 64]
    first, later = missed[:64], missed[128:]
    assert np.sqrt((later**2).mean()) < 0.5 * np.sqrt((first**2).mean())  # page 0 has no mean
    across = normal(1, 64, seed=7) / 8
    assert np.abs(missed @ direction[0]).mean() < 0.3 * np.abs(missed @ across[0]).mean()


@pytest.mark.parametrize("kv", CODES)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_codes_of_extremes(kv: str, extreme: str) -> None:
    heads = Heads(3, 1, 32, kv=kv)
    x = EXTREMES[extreme](heads.qkv(130)).astype(np.float32)
    on_all_isas(lambda isa: heads.run(isa, x, 130))


@pytest.mark.parametrize("kv", CODES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["key", "value"])
def test_bad_numbers_pass_through_codes(kv: str, part: str, value: float) -> None:
    heads = Heads(1, 1, 32, kv=kv)
    x = heads.qkv(20)
    x[10, 40 if part == "key" else 70] = value
    for isa in native.isas():
        got = heads.run(isa, x, 20)
        assert np.isfinite(got[:10]).all() and np.isnan(got[10:]).any(axis=1).all()


@pytest.mark.parametrize("kv", kv_types())
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_numbers_do_not_crash(kv: str, value: float) -> None:
    x = Heads(4, 1, 32).qkv(70)
    x[3, 40] = value
    on_all_isas(lambda isa: Heads(4, 1, 32, kv=kv).run(isa, x, 70))
