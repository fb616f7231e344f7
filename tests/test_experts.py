"""Experts: routes, the order of the pairs, matmuls by expert; wrong plans and wrong files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refgraph
import tiny
from arches import experts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_plan import ISAS, Plan, Spec, Weight, evaluate, on_all_isas, rows_weight, vector
from test_kernels import matmul, moderate, normal, seen
from test_models import built

from edge.engine import predict
from edge.engine.describe import describe, pack
from edge.engine.engine import Engine
from edge.engine.ops import F32, LOGITS, Q8
from edge.errors import EdgeError, ModelFileError, NativeError, UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.ops import Route
from edge.models import build
from edge.native import ffi, lib
from edge.weights.model_file import open_model

Tiny = Callable[..., Path]

GIVEN, SOFTMAX, OF_CHOSEN = range(3)
SCORES = {"given": GIVEN, "softmax": SOFTMAX, "softmax_of_chosen": OF_CHOSEN}


# ---- routes --------------------------------------------------------------------------------------


def routes(
    isa: str, x: np.ndarray, n_used: int, bias: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """(m, 2 n_used): what ROUTE makes of scores x (m, n_experts)."""
    spec = Spec(isa, max_tokens=len(x))
    weights = [] if bias is None else [vector(bias)]
    numbers = {"n_experts": x.shape[1], "n_used": n_used, "expert_scale": 1.0, **options}
    out = spec.op("route", (spec.given(x),), spec.buffer(F32, 2 * n_used), weights, **numbers)
    return evaluate(spec, out, len(x))


@pytest.mark.native
@pytest.mark.all_isas
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("n_experts, n_used", [(1, 1), (4, 4), (8, 2), (33, 5), (1024, 64)])
def test_routes_are_the_referees(n_experts: int, n_used: int, score: str) -> None:
    for is_normed, with_bias in ((False, False), (True, True)):
        x = np.abs(normal(9, n_experts)) if score == "given" else normal(9, n_experts) * 3
        bias = normal(n_experts, seed=1) / 4 if with_bias else None
        numbers = {"score": SCORES[score], "is_normed": int(is_normed), "expert_scale": 2.5}
        got = on_all_isas(lambda isa, x=x, b=bias, o=numbers: routes(isa, x, n_used, b, **o))
        op = Route(("x",), "r", ("b",) if with_bias else (), n_used, score, is_normed, 2.5)  # type: ignore[arg-type]
        held = {} if bias is None else {"b": bias}
        want = refgraph.route(refgraph.Run(np.zeros(0), held, {}, np.float32), op, x)
        assert np.array_equal(got[:, :n_used], want[:, :n_used])
        np.testing.assert_allclose(got[:, n_used:], want[:, n_used:], rtol=1e-5)


@pytest.mark.native
@pytest.mark.all_isas
def test_equal_scores_go_by_index() -> None:
    x = np.zeros((1, 8), np.float32)
    x[0, [3, 6]] = 1
    got = on_all_isas(lambda isa: routes(isa, x, 4, score=SOFTMAX))
    assert got[0, :4].tolist() == [3, 6, 0, 1]


@pytest.mark.native
@pytest.mark.all_isas
@pytest.mark.parametrize("score", SCORES.values())
def test_nan_is_chosen_last_and_makes_all_weights_nan(score: int) -> None:
    x = normal(3, 8)
    x[1, 2], x[2] = np.nan, np.nan
    got = on_all_isas(lambda isa: routes(isa, x, 3, score=score))
    assert np.isfinite(got[0]).all() and np.isnan(got[1:, 3:]).all()
    ids = got[:, :3].astype(int)
    assert ((ids >= 0) & (ids < 8)).all() and all(len(set(row)) == 3 for row in ids.tolist())
    assert score == SOFTMAX or 2 not in ids[1]


# ---- experts -------------------------------------------------------------------------------------


def chosen(counts: Sequence[int], n_used: int) -> np.ndarray:
    """Scores (m, n_experts) by which expert e is used by counts[e] tokens."""
    n_experts, left = len(counts), list(counts)
    assert sum(counts) % n_used == 0
    x = np.zeros((sum(counts) // n_used, n_experts), np.float32)
    for row in x:
        for j, e in enumerate(sorted(range(n_experts), key=lambda e: -left[e])[:n_used]):
            left[e] -= 1
            row[e] = n_used - j + 0.25
    assert not any(left)
    return x


@pytest.fixture(scope="module")
def of_types() -> Callable[[str, str, bool], Stack]:
    """The experts of two types (gate and up; down), made once."""
    made: dict[tuple[str, str, bool], Stack] = {}

    def make(gate: str, down: str, fused: bool = False) -> Stack:
        key = gate, down, fused
        if key not in made:
            made[key] = Stack(gate, down, fused)
        return made[key]

    return make


class Stack:
    """Experts of width WIDTH on vectors of DIM, biases and scales included."""

    DIM, WIDTH, N = 256, 256, 6

    def __init__(self, gate: str, down: str, fused: bool) -> None:
        n, w, d = self.N, self.WIDTH, self.DIM
        shapes = [(n * 2 * w, d)] if fused else [(n * w, d)] * 2
        pairs = [moderate(gate, *shape, seed=i) for i, shape in enumerate(shapes)]
        self.gate_up: list[Weight] = [pair[0] for pair in pairs]
        self.values = np.concatenate([v.reshape(n, -1, d) for _, v in pairs], 1)
        self.down, values = moderate(down, n * d, w, seed=7)
        self.down_values = values.reshape(n, d, w)
        self.biases = [normal(n * size, seed=i) for i, size in enumerate((w, w, d))]
        self.scales = [normal(n, seed=i) for i in range(3)]
        self.is_float = [t in ("F32", "F16", "BF16") for t in (gate, down)]

    def spec(
        self, isa: str, x: np.ndarray, scores: np.ndarray, n_used: int, has_more: bool = False
    ) -> tuple[Spec, int]:
        """The ops of a layer, and the buffer of its output. has_more: biases and scales, too."""
        counts = {"n_experts": self.N, "n_used": n_used}
        spec = Spec(isa, max_tokens=len(x))
        source, logits = spec.given(x), spec.given(scores)
        route = spec.buffer(F32, 2 * n_used)
        spec.op("route", (logits,), route, expert_scale=1.0, is_normed=1, **counts)
        forms = [F32 if is_float else Q8 for is_float in self.is_float]
        columns = spec.buffer(forms[0], n_used * self.DIM)
        spec.op("expert_columns", (source, route), columns, **counts)
        both = spec.buffer(F32, n_used * 2 * self.WIDTH)
        spec.op("expert_matmul", (columns,), both, self.gate_up, **counts)
        for i in range(2 if has_more else 0):
            at = {"column": i * self.WIDTH, "n": self.WIDTH}
            spec.op("expert_gain", (both,), both, [vector(self.scales[i])], **at, **counts)
        h = spec.buffer(forms[1], n_used * self.WIDTH)
        first, second, third = map(vector, self.biases)
        added = [first, second] if has_more else []
        spec.op("expert_gated", (both,), h, added, activation=0, **counts)
        each = spec.buffer(F32, n_used * self.DIM)
        spec.op("expert_matmul", (h,), each, [self.down], **counts)
        if has_more:
            spec.op("expert_gain", (each,), each, [vector(self.scales[2])], n=self.DIM, **counts)
        added = [third] if has_more else []
        return spec, spec.op(
            "expert_sum", (each, route), spec.buffer(F32, self.DIM), added, **counts
        )

    def run(self, isa: str, *args: Any, **options: Any) -> np.ndarray:
        """(m, DIM) of x (m, DIM) and scores (m, N)."""
        spec, out = self.spec(isa, *args, **options)
        return evaluate(spec, out, len(args[0]))

    def exact(self, x: np.ndarray, scores: np.ndarray, n_used: int, has_more: bool) -> np.ndarray:
        """The same in float64, but for what the kernels quantise."""
        forms = [F32 if is_float else Q8 for is_float in self.is_float]
        read, out = seen(x, forms[0]), np.zeros(x.shape)
        for i, row in enumerate(scores):
            ids = np.argsort(-row, kind="stable")[:n_used]
            for e, weight in zip(ids, row[ids] / row[ids].sum(), strict=True):
                gate, up = np.split(self.values[e] @ read[i], 2)
                if has_more:
                    gate = gate * self.scales[0][e] + self.biases[0].reshape(self.N, -1)[e]
                    up = up * self.scales[1][e] + self.biases[1].reshape(self.N, -1)[e]
                h = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
                y = self.down_values[e] @ seen(h[None], forms[1])[0]
                if has_more:
                    y = y * self.scales[2][e] + self.biases[2].reshape(self.N, -1)[e]
                out[i] += weight * y
        return out


TYPES = [
    ("Q4_0", "Q4_0"),
    ("IQ3_S", "IQ3_S"),
    ("MXFP4", "MXFP4"),
    ("F16", "F32"),
    ("Q4_K", "F16"),
    ("BF16", "Q6_K"),
]
#: Experts that no token uses, one, as many as fill a tile but one, a tile, more, many.
COUNTS = [(0, 1, 7, 8, 9, 11), (3, 3, 3, 3, 3, 3), (0, 0, 18, 18, 0, 0), (1, 1, 0, 0, 0, 0)]


@pytest.mark.native
@pytest.mark.all_isas
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("types", TYPES, ids="-".join)
def test_experts(types: tuple[str, str], counts: tuple[int, ...], of_types: Any) -> None:
    stack, scores = of_types(*types), chosen(counts, 2)
    x = normal(len(scores), Stack.DIM, seed=sum(counts))
    for has_more in (False, True):
        got = on_all_isas(lambda isa, more=has_more: stack.run(isa, x, scores, 2, has_more=more))
        want = stack.exact(x, scores, 2, has_more)
        # a code of h may round to its neighbour
        assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()


@pytest.mark.native
@pytest.mark.all_isas
def test_gate_and_up_may_be_one_weight(of_types: Any) -> None:
    stack, scores = of_types("Q4_0", "Q4_0", True), chosen((0, 1, 7, 8, 9, 11), 2)
    x = normal(len(scores), Stack.DIM)
    got = on_all_isas(lambda isa: stack.run(isa, x, scores, 2))
    want = stack.exact(x, scores, 2, False)
    assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()


@pytest.mark.native
@pytest.mark.parametrize("types", TYPES[:4], ids="-".join)
def test_bits_do_not_depend_on_chunks_and_threads(types: tuple[str, str], of_types: Any) -> None:
    stack = of_types(*types)
    scores = chosen((2, 30, 7, 16, 9, 26), 3)
    m = len(scores)
    x = normal(m, Stack.DIM)
    for isa in ISAS:
        spec, out = stack.spec(isa, x, scores, 3, has_more=True)
        plan = Plan(spec)
        plan.run(range(m))
        want = plan.read(out, m)
        for threads in (2, 3):
            plan.run(range(m), threads=threads)
            assert np.array_equal(plan.read(out, m), want)
        for size in (1, 4, 11):
            for first in range(0, m, size):
                rows = range(first, min(first + size, m))
                plan.run(rows, start=first, threads=2)
                assert np.array_equal(plan.read(out, len(rows)), want[rows.start : rows.stop])


@pytest.mark.native
def test_one_expert_is_a_dense_network(of_types: Any) -> None:
    """Bit for bit what MATMUL and GATED make."""
    stack, x = of_types("Q4_0", "Q4_0"), normal(5, Stack.DIM)
    scores = np.zeros((5, Stack.N), np.float32)
    scores[:, 4] = 1
    n, w, d = Stack.N, Stack.WIDTH, Stack.DIM
    dense = [part_of(weight, 4, n) for weight in (*stack.gate_up, stack.down)]
    both = matmul("scalar", x, dense[:2], Q8)
    gate_up = Spec()
    h = gate_up.op("gated", (gate_up.given(both),), gate_up.buffer(F32, w), activation=0)
    want = matmul("scalar", evaluate(gate_up, h, 5), dense[2:], Q8)
    assert np.array_equal(stack.run("scalar", x, scores, 1), want) and want.shape == (5, d)


def part_of(weight: Weight, i: int, n: int) -> Weight:
    """The rows of expert i of n, without a copy."""
    entry = type(weight)(weight.entry, weight.memory)
    size = len(weight.memory) // n
    part = ffi.new("edge_weight *", weight.entry[0])
    part.n, part.n_bytes = weight.entry.n // n, size
    part.data = ffi.cast("uint8_t *", weight.entry.data) + i * size
    entry.entry = part
    return entry


# ---- the check of a plan -------------------------------------------------------------------------

ROUTE, COLUMNS, GATE_UP, GATE_GAIN, UP_GAIN, GATED, DOWN, DOWN_GAIN, SUM = range(2, 11)
GAINS = (GATE_GAIN, UP_GAIN, DOWN_GAIN)


def right_spec(stack: Stack) -> Spec:
    """Every op of experts, numbered as above, and a head."""
    scores = chosen((1, 2, 3, 4, 5, 3), 2)
    spec, out = stack.spec(ISAS[-1], normal(len(scores), Stack.DIM), scores, 2, has_more=True)
    for op in spec.ops[ROUTE:]:
        spec.buffers[op["out"]]["is_logit_rows"] = 0
    spec.op("matmul", (out,), spec.buffer(LOGITS, 5), [rows_weight(normal(5, Stack.DIM))])
    spec.ops.insert(-1, dict(spec.ops[-1]))
    gather = spec.ops[-2]
    wanted = spec.buffer(F32, Stack.DIM, logit_rows=True)
    gather.update(kind=lib.EDGE_OP_GATHER, out=wanted, w=[-1, -1, -1])
    spec.ops[-1]["in"] = wanted
    return spec


WRONG: list[tuple[int, str, Any]] = [
    *((i, "out", value) for i in range(ROUTE, SUM + 1) for value in (-1, 99)),
    *((i, "out", 0) for i in range(ROUTE, SUM)),
    *((i, "in", value) for i in range(ROUTE, SUM + 1) for value in (-1, 99)),
    *((i, "in2", value) for i in (COLUMNS, SUM) for value in (-1, 0, 99)),
    *((i, "n_experts", value) for i in range(ROUTE, SUM + 1) for value in (0, -1, 1025, 2**30)),
    *((i, "n_experts", 1) for i in range(ROUTE, SUM + 1)),
    *((i, "n_used", value) for i in range(ROUTE, SUM + 1) for value in (0, -1, 1, 3, 7, 2**30)),
    *((ROUTE, "score", value) for value in (-1, 3)),
    *((ROUTE, "is_normed", value) for value in (-1, 2)),
    *((ROUTE, "expert_scale", value) for value in (0.0, -1.0, np.nan, np.inf)),
    (ROUTE, "w", [0, -1, -1]),
    (COLUMNS, "out", 4),
    *((GATE_UP, "w", value) for value in ([-1, 3, -1], [2, 3, 4], [0, 3, -1], [99, 3, -1])),
    *((i, "column", value) for i in (GATE_UP, DOWN) for value in (-1, 16, 2**31 - 1)),
    (GATE_UP, "in", 0),
    *((i, "w", value) for i in GAINS for value in ([-1] * 3, [0, -1, -1], [3, -1, -1])),
    *((i, "n", value) for i in GAINS for value in (0, -1, 513, 2**31 - 1)),
    *((i, "column", value) for i in GAINS for value in (-1, 257, 2**31 - 1)),
    *((i, "in", 0) for i in GAINS),
    *((GATED, "activation", value) for value in (-1, 99)),
    *((GATED, "w", value) for value in ([0, 7, -1], [6, 0, -1], [99, 7, -1])),
    (DOWN, "w", [0, -1, -1]),
    (SUM, "w", [0, -1, -1]),
]


@pytest.mark.native
@pytest.mark.parametrize("op, name, value", WRONG, ids=str)
def test_wrong_op_is_refused(op: int, name: str, value: Any, of_types: Any) -> None:
    spec = right_spec(of_types("Q4_0", "Q4_0"))
    Plan(spec).run(range(9), n_logits=3)
    spec.ops[op][name] = value
    with pytest.raises(NativeError, match="needs ") as caught:
        Plan(spec)
    assert caught.value.code == lib.EDGE_BAD_PLAN and caught.value.op >= op


@pytest.mark.native
def test_pairs_must_be_ordered_first(of_types: Any) -> None:
    spec = right_spec(of_types("Q4_0", "Q4_0"))
    del spec.ops[COLUMNS]
    with pytest.raises(NativeError, match="columns != NULL"):
        Plan(spec)


FIELDS = ["kind", "in", "in2", "out", "column", "n_experts", "n_used", "score", "is_normed", "n"]
SMALL, HARD = st.integers(-2, 20), st.sampled_from([32, 64, 2**24, 2**30, 2**31 - 1, -(2**31)])
CHANGE = st.one_of(
    st.tuples(st.just("op"), st.integers(0, 12), st.sampled_from(FIELDS), SMALL | HARD),
    st.tuples(st.just("weight"), st.integers(0, 12), st.integers(0, 2), SMALL),
    st.tuples(
        st.just("buffer"),
        st.integers(0, 9),
        st.sampled_from(["kind", "dim", "is_logit_rows", "offset"]),
        SMALL | HARD | st.integers(0, 400).map(lambda i: 64 * i),
    ),
)


@pytest.mark.native
@settings(
    max_examples=400,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(CHANGE, min_size=1, max_size=3))
def test_whatever_passes_the_check_runs(
    of_types: Any, changes: list[tuple[str, int, Any, int]]
) -> None:
    """Routes of any bytes, too: nothing may leave its buffer."""
    spec = right_spec(of_types("Q4_0", "Q4_0"))
    for what, i, name, value in changes:
        if what == "op":
            spec.ops[i][name] = value
        elif what == "weight":
            spec.ops[i]["w"][name] = value
        else:
            spec.buffers[i % len(spec.buffers)][name] = value
    try:
        plan = Plan(spec)
    except NativeError as error:
        assert error.code in (lib.EDGE_BAD_PLAN, lib.EDGE_BAD_ARGUMENT)
        return
    widest = max((b["dim"] for b in spec.buffers if b["kind"] == LOGITS), default=1)
    plan.spec.ops[-1]["out"] = len(spec.buffers)
    plan.spec.buffers.append({"dim": widest})
    try:
        plan.run(range(7), n_logits=3, threads=2)
        plan.run([0], start=7, n_logits=1)
    except NativeError as error:
        assert error.code == lib.EDGE_NOT_FINITE
    except EdgeError as error:  # the vocabulary may have shrunk
        assert "token" in str(error)


# ---- whole models --------------------------------------------------------------------------------

ARCH = "ernie4_5-moe"  # a dense layer, experts, a shared one, a bias of the choice


def logits(path: Path, tokens: list[int], **options: Any) -> np.ndarray:
    engine = Engine.load(path, **options)
    try:
        out = engine.run(engine.cache(), tokens, logits="all")
        assert out is not None
        return out
    finally:
        engine.close()


@pytest.mark.native
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_runs_as_the_referee(tiny_gguf: Tiny, kind: str) -> None:
    apart = apart_from_referee(tiny_gguf(ARCH, type=kind))
    assert np.sqrt((apart**2).mean()) < 0.02 and np.abs(apart).max() < 0.3


def apart_from_referee(path: Path) -> np.ndarray:
    """Logits of the engine minus the referee's, which rounds what the kernels round."""
    tokens = np.random.default_rng(1).integers(0, 288, 50).tolist()
    got = logits(path, tokens, threads=2)
    with GGUF.open(path) as file:
        described = describe(open_model(path))
        quantised = [n for n in described.graph.weights if described.weights.takes_q8(n)]
        want = refgraph.run(
            described.graph,
            refgraph.load_weights(file),
            tokens,
            dtype=np.float64,
            quantised=quantised,
            cache=np.float16,
        )
    return got - want


@pytest.mark.native
@pytest.mark.any_isa
def test_packed_file_keeps_the_stacks(tiny_gguf: Tiny, tmp_path: Path) -> None:
    source, path, tokens = tiny_gguf(ARCH, type="Q4_0"), tmp_path / "m.gguf", [5, 17, 200, 3, 77]
    pack(source, path)
    assert np.array_equal(logits(path, tokens), logits(source, tokens))
    with open_model(path) as packed, open_model(source) as raw:
        for name in ("blk.1.ffn_down_exps.weight", "blk.1.exp_probs_b.bias"):
            assert packed.tensors[name].shape == raw.tensors[name].shape
    engines = [Engine.load(p) for p in (source, path)]
    assert engines[0].fingerprint == engines[1].fingerprint
    for engine in engines:
        engine.close()


def test_a_token_reads_the_experts_that_it_uses(tiny_gguf: Tiny) -> None:
    with open_model(tiny_gguf(ARCH, type="Q4_0", n_layers=3), header_only=True) as file:
        described = describe(file)
    demand = predict.demand_of(described)
    stacks = sum(described.weight_bytes(n) for n in described.graph.weights if "_exps.w" in n)
    assert demand.all_experts == stacks > 0
    assert demand.experts == stacks * 3 // 8
    dense = sum(
        described.weight_bytes(n)
        for n, shape in described.graph.weights.items()
        if len(shape) == 2 and "token_embd" not in n
    )
    head = described.weight_bytes("token_embd.weight")
    assert demand.weights == dense + head + demand.experts


EXPERTS = {"arch": ARCH, "n_layers": 2}
BAD: dict[str, dict[str, Any]] = {
    "no experts": {"expert_count": 0},
    "no experts are used": {"expert_used_count": 0},
    "more are used than there are": {"expert_used_count": 9},
    "more experts than tensors": {"expert_count": 9},
    "huge count": {"expert_count": 2**31 - 1},
    "more than may be": {"expert_count": 1025},
    "count as a list": {"expert_count": [8, 8]},
    "count as text": {"expert_count": "8"},
    "used, for another number of layers": {"expert_used_count": [2, 2, 2]},
    "used, one of them 0": {"expert_used_count": [2, 0]},
    "negative": {"expert_used_count": -1},
    "no width": {"expert_feed_forward_length": None},
    "another width": {"expert_feed_forward_length": 48},
    "width of 0": {"expert_feed_forward_length": 0},
    "weights normed by a number": {"expert_weights_norm": 1},
    "weights times NaN": {"expert_weights_scale": float("nan")},
    "no step": {"interleave_moe_layer_step": 0},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_contradictory_metadata(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        built(change, **EXPERTS)


@pytest.mark.parametrize(
    "change",
    [
        {"expert_group_count": 4},
        {"expert_gating_func": 4},
        {"moe_latent_size": 32},
        {"router_logit_softcapping": 30.0},
    ],
    ids=str,
)
def test_what_is_not_built_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(change))):
        built(change, **EXPERTS)


def test_keys_say_how_weights_are_made() -> None:
    def route(change: dict[str, Any]) -> Route:
        return next(op for op in built(change, **EXPERTS)[0].ops if isinstance(op, Route))

    plain = route({})
    assert (plain.score, plain.is_normed, plain.scale, plain.n_used) == ("softmax", True, 1, 3)
    assert route({"expert_weights_norm": False}).is_normed is False
    assert route({"expert_weights_scale": 2.5}).scale == 2.5
    assert route({"expert_gating_func": 2}).score == "given"
    assert route({"expert_gating_func": 3}).score == "softmax_of_chosen"
    assert route({"expert_used_count": [3, 2]}).n_used == 2


def test_gate_and_up_may_be_one_tensor() -> None:
    """As Granite's converter writes them now: of the experts, and of the shared one."""
    model = tiny.Tiny("granitemoe")
    weights, metadata = tiny.tensors(model), tiny.metadata(model)
    fused = dict(weights)
    for i in range(model.n_layers):
        for gate, up, both, axis in (
            ("gate_exps", "up_exps", "gate_up_exps", 1),
            ("gate_shexp", "up_shexp", "up_shexp", 0),
        ):
            names = [f"blk.{i}.ffn_{part}.weight" for part in (gate, up)]
            parts = [fused.pop(name) for name in names]
            fused[f"blk.{i}.ffn_{both}.weight"] = np.concatenate(parts, axis)
    metadata["general.architecture"] = model.arch
    got, want = (
        refgraph.run(build(metadata, {n: w.shape for n, w in held.items()})[0], held, range(20))
        for held in (fused, weights)
    )
    assert len(fused) == len(weights) - 2 * model.n_layers
    np.testing.assert_allclose(got, want, atol=1e-4)


SCALES = [f"ffn_{name}_exps" for name in ("gate", "up", "down")]


@pytest.fixture
def with_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models of ARCH have scales of their experts, as NVFP4's converter writes them."""
    arch = tiny.arch_of(ARCH)
    plain, n = arch.tensors, experts.N_EXPERTS

    def tensors(t: tiny.Tiny) -> dict[str, Any]:
        names = [f"blk.1.{name}" for name in SCALES]
        inputs = {f"{name}.input_scale": (n,) for name in names}
        return plain(t) | {f"{name}.scale": (n,) for name in names} | inputs

    monkeypatch.setattr(arch, "tensors", tensors)


@pytest.mark.usefixtures("with_scales")
def test_scales_are_those_of_the_matrices() -> None:
    model = tiny.Tiny(ARCH)
    weights, metadata = tiny.tensors(model), tiny.metadata(model)
    folded = dict(weights)
    for name in SCALES:
        scale = folded.pop(f"blk.1.{name}.scale")
        folded[f"blk.1.{name}.weight"] = folded[f"blk.1.{name}.weight"] * scale[:, None, None]
    metadata["general.architecture"] = model.arch
    got, want = (
        refgraph.run(build(metadata, {n: w.shape for n, w in held.items()})[0], held, range(20))
        for held in (weights, folded)
    )
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.native
@pytest.mark.usefixtures("with_scales")
@pytest.mark.parametrize("kind", ["F32", "NVFP4"])
def test_scales_as_the_referee(kind: str, tmp_path: Path) -> None:
    def type_of(name: str) -> str:
        return kind if "gate_exps" in name or "up_exps" in name else "F32"  # blocks of 64

    apart = apart_from_referee(tiny.write_tiny(tmp_path / "m.gguf", ARCH, type=type_of))
    assert np.abs(apart).max() < 1e-3


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.usefixtures("with_scales")
def test_scales_of_another_shape(name: str) -> None:
    model = tiny.Tiny(ARCH)
    metadata = tiny.metadata(model) | {"general.architecture": ARCH}
    shapes = {tensor: w.shape for tensor, w in tiny.tensors(model).items()}
    with pytest.raises(ModelFileError, match="shape is") as caught:
        build(metadata, shapes | {f"blk.1.{name}.scale": (1,)})
    assert caught.value.field == f"tensor blk.1.{name}.scale"


def test_experts_that_end_within_a_panel_are_refused(tiny_gguf: Tiny) -> None:
    path = tiny_gguf(
        "llama", ffn=40, extra=(("llama.expert_count", 8), ("llama.expert_used_count", 2))
    )
    with open_model(path) as file, pytest.raises(UnsupportedError, match="experts of 40 rows"):
        describe(file)
