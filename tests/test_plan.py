"""Lowering: what is fused, where buffers lie; and the native check of what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import refgraph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_plan import (
    ISAS,
    Cache,
    Plan,
    Spec,
    evaluate,
    on_all_isas,
    rows_weight,
    shared_threads,
    vector,
)
from test_kernels import moderate, normal
from test_models import built

from edge import native
from edge.engine.engine import Engine
from edge.engine.ops import (
    F32,
    LOGITS,
    Q8,
    Q8X2,
    Buffer,
    PlanMatmul,
    PlanNorm,
    PlanOp,
)
from edge.engine.plan import Lowered, _lay_out, _number_of, lower
from edge.errors import NativeError
from edge.graph.graph import Graph
from edge.graph.ops import Activation, GateActivation, Heads, Rope
from edge.native import ffi, lib

TOKENS = 64


def buffer_bytes(kind: int, dim: int) -> int:
    """Of TOKENS tokens."""
    return int(lib.edge_buffer_bytes(kind, dim, TOKENS))


def lowered(takes_q8: Callable[[str], bool] = lambda name: True, **options: Any) -> Lowered:
    """The plan of a tiny model."""
    return lower(built(**options)[0], takes_q8, buffer_bytes)


# ---- fusion --------------------------------------------------------------------------------------

LAYER = ["norm", "matmul", "store", "attention", "quantize", "matmul"]
MLP = ["norm", "gated_matmul", "quantize", "matmul"]


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_layers_are_fused(arch: str) -> None:
    """No add, no gated; norms quantise; the last layer works on the wanted rows alone."""
    plan = lowered(arch=arch, n_layers=2)
    first = [*LAYER[:2], "angles", *LAYER[2:], *MLP]
    last = [*LAYER[:4], "gather", "quantize", "gather", "matmul", *MLP]
    kinds = [op.kind for op in plan.ops]
    assert kinds[: 1 + len(first)] == ["embed", *first]
    assert Counter(kinds[1 + len(first) : -2]) == Counter(last)
    assert kinds[-2:] == ["norm", "matmul"]
    wanted = [plan.buffers[op.output].logit_rows for op in plan.ops]
    assert wanted == sorted(wanted)
    assert kinds.index("gather") == wanted.index(True)
    assert [i for i, b in enumerate(plan.buffers) if b.kind == LOGITS] == [plan.ops[-1].output]


def test_residuals_are_added_by_matmuls() -> None:
    plan = lowered(n_layers=2)
    residual = [op for op in plan.ops if op.kind == "matmul" and len(op.inputs) == 2]
    assert [op.weights[0].split(".")[2] for op in residual] == ["attn_output", "ffn_down"] * 2
    assert all(plan.buffers[op.inputs[1]].kind == F32 for op in residual)


def test_float_weights_need_no_quantised_input() -> None:
    plan = lowered(lambda name: False)
    assert {b.kind for b in plan.buffers} == {F32, LOGITS}
    assert not any(op.kind == "quantize" for op in plan.ops)


def test_output_head_reads_two_quantisations() -> None:
    plan = lowered()
    assert plan.buffers[plan.ops[-1].inputs[0]].kind == Q8X2
    assert sum(b.kind == Q8X2 for b in plan.buffers) == 1


def test_mixed_forms_split_a_matmul() -> None:
    plan = lowered(lambda name: "attn_k" not in name, n_layers=1)
    parts = [op for op in plan.ops if op.weights and ".attn_" in op.weights[0]]
    parts = [op for op in parts if isinstance(op, PlanMatmul) and len(op.inputs) == 1]
    assert [op.column for op in parts] == [0, 64, 96]
    assert [plan.buffers[op.inputs[0]].kind for op in parts] == [Q8, F32, Q8]
    assert len({op.output for op in parts}) == 1


def test_gate_that_does_not_end_with_a_panel_is_not_fused() -> None:
    """One weight whose halves share a panel."""
    shapes = {"e": (9, 32), "gate_up": (40, 32), "down": (9, 20)}
    g = Graph(shapes)
    g.matmul(g.gated(g.matmul(g.embed("e"), "gate_up"), "silu"), "down")
    plan = lower(g, lambda name: False, buffer_bytes)
    assert [op.kind for op in plan.ops] == ["embed", "matmul", "gated", "matmul"]


def test_logits_need_no_attention() -> None:
    g = Graph({"e": (9, 32), "out": (9, 32)})
    g.matmul(g.embed("e"), "out")
    plan = lower(g, lambda name: False, buffer_bytes)
    assert [op.kind for op in plan.ops] == ["embed", "matmul"]


def test_layer_norms_quantise_like_others() -> None:
    g = Graph({"e": (9, 32), "w": (32,), "b": (32,), "out": (9, 32)})
    g.matmul(g.layer_norm(g.embed("e"), "w", 1e-5, "b"), "out")
    plan = lower(g, lambda name: True, buffer_bytes)
    assert [op.kind for op in plan.ops] == ["embed", "norm", "matmul"]
    norm = plan.ops[1]
    assert isinstance(norm, PlanNorm) and norm.centred and norm.weights == ("w", "b")
    assert plan.buffers[norm.output].kind == Q8X2


#: Ops that run in place: appended to a graph's x of 32 elements.
IN_PLACE_OPS: dict[str, Callable[[Graph, str], str]] = {
    "head_norm": lambda g, x: g.head_norm(x, "n", 1e-5, (0, 2, 16)),
    "bias": lambda g, x: g.bias(x, "b"),
    "gain": lambda g, x: g.gain(x, "b"),
    "scale": lambda g, x: g.scale(x, 0.5),
    "activate": lambda g, x: g.activate(x, "relu2"),
    "xielu": lambda g, x: g.xielu(x, 0.8, 0.8, 0.5, -1e-6),
    "softcap": lambda g, x: g.softcap(x, 30.0),
}


@pytest.mark.parametrize("kind", IN_PLACE_OPS)
@pytest.mark.parametrize("read_twice", [False, True])
def test_ops_run_in_place_where_nothing_else_reads_the_input(kind: str, read_twice: bool) -> None:
    g = Graph({"e": (9, 32), "n": (16,), "b": (32,), "out": (9, 32)})
    x = g.embed("e")
    y = IN_PLACE_OPS[kind](g, x)
    g.matmul(g.add(x, y) if read_twice else y, "out")
    plan = lower(g, lambda name: False, buffer_bytes)
    op = plan.ops[1]
    assert op.kind == kind and (op.output == op.inputs[0]) == (not read_twice)


def test_logits_are_changed_in_place() -> None:
    """The head before it still reads two quantisations."""
    g = Graph({"e": (9, 32), "out": (9, 32), "b": (9,)})
    g.softcap(g.scale(g.bias(g.matmul(g.embed("e"), "out"), "b"), 0.5), 30.0)
    plan = lower(g, lambda name: True, buffer_bytes)
    kinds = ["embed", "quantize", "matmul", "bias", "scale", "softcap"]
    assert [op.kind for op in plan.ops] == kinds
    assert plan.buffers[plan.ops[1].output].kind == Q8X2
    assert {op.output for op in plan.ops[2:]} == {plan.ops[-1].output}
    assert plan.buffers[plan.ops[-1].output].kind == LOGITS


def bad_graphs() -> dict[str, Graph]:
    """Graphs that cannot be lowered: name -> graph."""
    shapes = {"e": (9, 64), "qkv": (64, 64), "n": (64,), "o": (64, 32)}
    graphs = {
        name: Graph(shapes)
        for name in ("no logits", "no head", "some heads", "rotated for nothing", "read twice")
    }
    x = {name: g.embed("e") for name, g in graphs.items()}
    rope = Rope(16, 1e4, True)
    graphs["no logits"].rms_norm(x["no logits"], "n", 1e-5)
    graphs["no head"].scale(x["no head"], 0.5)
    g = graphs["some heads"]
    g.attention(g.rope(g.matmul(x["some heads"], "qkv"), 2, 16, rope), 0, Heads(2, 1, 16))
    graphs["rotated for nothing"].rope(x["rotated for nothing"], 3, 16, rope)
    g = graphs["read twice"]
    qkv = g.matmul(x["read twice"], "qkv")
    g.matmul(g.attention(g.rope(qkv, 3, 16, rope), 0, Heads(2, 1, 16)), "o")
    g.add(qkv, g.output)
    return graphs


@pytest.mark.parametrize("name", bad_graphs())
def test_graph_that_the_plan_cannot_run(name: str) -> None:
    with pytest.raises(NativeError):
        lower(bad_graphs()[name], lambda name: False, buffer_bytes)


def test_plan_prints_as_a_table() -> None:
    plan = lowered(n_layers=1)
    lines = str(plan).splitlines()
    assert len(lines) == 1 + len(plan.ops)
    assert lines[0].split() == ["op", "kind", "in", "out", "weights"]
    assert lines[1].split() == ["0", "embed", "0", "token_embd"]


# ---- what the library is told ----


@pytest.mark.parametrize("kind", get_args(PlanOp))
def test_fields_of_an_op(kind: Any) -> None:
    own = [field.name for field in fields(kind)[3:]]
    values = range(10, 10 + len(own))
    op = ffi.new(
        "edge_op *", kind((3, 4), 5, ("v", "w"), *values).native({"v": 8, "w": 7}, {10: (3, 10)})
    )
    assert op.kind == getattr(lib, f"EDGE_OP_{kind.kind.upper()}")
    assert (getattr(op, "in"), op.in2, op.out, list(op.w)) == (3, 4, 5, [8, 7, -1])
    assert [getattr(op, name) for name in own] == list(values)
    assert op.group == (3 if "layer" in own else 0)
    op = ffi.new("edge_op *", kind((), 5, (), *values).native({}, {10: (3, 10)}))
    assert (getattr(op, "in"), op.in2, op.out, list(op.w)) == (-1, -1, 5, [-1, -1, -1])


def test_ops_and_activations_are_those_of_the_library() -> None:
    kinds = {getattr(lib, f"EDGE_OP_{kind.kind.upper()}") for kind in get_args(PlanOp)}
    assert kinds == set(range(lib.EDGE_N_OPS))
    activations = {_number_of(name) for name in get_args(GateActivation)}
    assert activations == set(range(lib.EDGE_N_ACTIVATIONS))
    assert refgraph.ACTIVATIONS.keys() == set(get_args(Activation))


# ---- the arena -----------------------------------------------------------------------------------


def assert_apart(buffers: list[Buffer], arena_bytes: int, size: Callable[[Buffer], int]) -> None:
    """Buffers that live at the same op share no byte, and all lie in the arena."""
    for i, a in enumerate(buffers):
        assert a.offset % 64 == 0 and 0 <= a.offset <= arena_bytes - size(a)
        for b in buffers[:i]:
            lives = a.first <= b.last and b.first <= a.last
            overlap = a.offset < b.offset + size(b) and b.offset < a.offset + size(a)
            assert not (lives and overlap)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 300)), max_size=20))
def test_buffers_that_live_together_lie_apart(lives: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer(F32, dim, False, min(a, b), max(a, b)) for a, b, dim in lives]
    total = _lay_out(buffers, lambda kind, dim: dim)
    assert_apart(buffers, total, lambda b: b.dim)


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_arena_of_a_model_is_shared(arch: str) -> None:
    plan, deeper = lowered(arch=arch, n_layers=2), lowered(arch=arch, n_layers=9)
    assert_apart(plan.buffers, plan.arena_bytes, lambda b: buffer_bytes(b.kind, b.dim))
    assert deeper.arena_bytes == plan.arena_bytes
    assert plan.arena_bytes < sum(buffer_bytes(b.kind, b.dim) for b in plan.buffers)


def test_laying_out_takes_time_by_the_number_of_buffers() -> None:
    """Were each compared with all others, this would take a minute."""
    buffers = [Buffer(F32, 16, False, i, i + 2) for i in range(20000)]
    assert _lay_out(buffers, lambda kind, dim: 4 * dim) == 3 * 64


# ---- right results whatever the forms ------------------------------------------------------------

MIXES: dict[str, Callable[[str], str]] = {
    "k": lambda name: "F32" if "attn_k" in name else "Q8_0",
    "gate": lambda name: "F16" if "ffn_gate" in name else "Q8_0",
    "down": lambda name: "BF16" if "down" in name or "attn_output" in name else "Q8_0",
    "embedding": lambda name: "Q8_0" if "token_embd" in name else "F32",
    "every other": lambda name: ("F32", "Q8_0")[len(name) % 2],
}


@pytest.mark.native
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_mixed_weights_give_the_referees_logits(
    tiny_gguf: Callable[..., Path], arch: str, mix: str
) -> None:
    engine = Engine.load(tiny_gguf(arch, type=MIXES[mix]))
    tokens = np.random.default_rng(0).integers(0, engine.n_vocab, 40).tolist()
    try:
        logits = engine.run(engine.cache(), tokens, logits="all")
        quantised = {name for name, layout in engine.layouts.items() if layout[0] == "c"}
        weights = refgraph.load_weights(engine.gguf)
        want = refgraph.run(
            engine.graph, weights, tokens, dtype=np.float64, quantised=quantised, cache=np.float16
        )
    finally:
        engine.close()
    assert 0 < len(quantised) < len(engine.layouts)
    # Codes may round either way; in float64 the referee is the same with every BLAS.
    assert np.abs(logits - want).max() < 0.05
    assert np.sqrt(((logits - want) ** 2).mean()) < 0.01


def any_graph(shapes: dict[str, tuple[int, ...]]) -> Graph:
    """Every kind of op that works on rows."""
    g = Graph(shapes)
    x = g.scale(g.embed("embd"), 1.5)
    h = g.layer_norm(x, "norm", 1e-5, "norm.b")
    h = g.bias(g.matmul(h, "q", "k", "v"), "q.b", "k.b", "v.b", dims=[64, 32, 32])
    h = g.head_norm(h, "q.n", 1e-5, (0, 4, 16), is_centred=True)
    h = g.head_norm(h, "k.n", 1e-5, (64, 1, 32))
    h = g.attention(g.rope(h, 6, 16, Rope(16, 1e4, False)), 0, Heads(4, 2, 16))
    x = g.add(x, g.gain(g.bias(g.matmul(h, "o"), "o.b"), "one"))
    h = g.gated(g.matmul(g.rms_norm(x, "norm", 1e-5), "gate_up"), "swiglu_oai")
    x = g.add(x, g.gain(g.matmul(h, "down"), "norm"))
    h = g.activate(g.matmul(g.head_norm(x, None, 1e-5, (0, 1, 64)), "up"), "gelu_erf")
    h = g.multiply(h, g.activate(g.slice(x, 5, 1), "sigmoid"))
    h = g.multiply(g.xielu(g.slice(h, 0, 48), 0.8, 0.7, 0.5, -1e-6), g.slice(h, 16, 48))
    x = g.add(x, g.matmul(h, "down"))
    h = g.bias(g.matmul(g.layer_norm(x, "norm", 1e-5), "head"), "head.b", dims=[40], first=3)
    g.softcap(g.scale(g.gain(h, "one"), 0.5), 5.0)
    assert g.fault is None
    return g


SHAPES: dict[str, tuple[int, ...]] = {
    **{"embd": (50, 64), "norm": (64,), "norm.b": (64,), "q": (64, 64), "k": (32, 64)},
    **{"v": (32, 64), "q.b": (64,), "k.b": (32,), "v.b": (32,), "q.n": (4, 16), "k.n": (32,)},
    **{"o": (64, 64), "o.b": (64,), "one": (1,), "gate_up": (96, 64), "down": (64, 48)},
    **{"up": (64, 64), "head": (50, 64), "head.b": (40,)},
}


@pytest.mark.native
@pytest.mark.all_isas
def test_every_op_of_rows_gives_the_referees_logits() -> None:
    """Lowered and run, of all tokens and of the last ones."""
    g = any_graph(SHAPES)
    held = {
        name: normal(*shape, seed=i) / np.float32(shape[-1] ** 0.5 if len(shape) > 1 else 1)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    plan, tokens = lower(g, lambda name: False, buffer_bytes), [3, 49, 0, 7, 7, 21, 8]
    weights = [rows_weight(w) if w.ndim == 2 else vector(w) for w in held.values()]
    index = {name: i for i, name in enumerate(held)}

    def run(isa: str, n: int) -> np.ndarray:
        spec = Spec(isa, TOKENS, (1, 2, 16), weights=weights, arena_bytes=plan.arena_bytes)
        spec.ops = [dict(op.native(index, {0: (0, 0)})) for op in plan.ops]
        spec.buffers = [
            {"kind": b.kind, "dim": b.dim, "is_logit_rows": int(b.logit_rows), "offset": b.offset}
            for b in plan.buffers
        ]
        return Plan(spec).run(tokens, n_logits=n)

    logits = on_all_isas(lambda isa: run(isa, 7))
    want = refgraph.run(g, held, tokens, dtype=np.float64, cache=np.float16)
    np.testing.assert_allclose(logits, want, atol=2e-3)
    np.testing.assert_array_equal(on_all_isas(lambda isa: run(isa, 2)), logits[5:])


# ---- the native check ----------------------------------------------------------------------------

HEADS = {"layer": 0, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16}
EMBED, ANGLES, STORE, ATTENTION, GATHER, NORM, QUANTIZE, GATED_MATMUL, ADD, GATED = range(10)
HEAD_NORM, BIAS, GAIN, SCALE, ACTIVATE, XIELU, SOFTCAP, MULTIPLY, SLICE, HEAD = range(10, 20)
N_OPS = HEAD + 1
#: Ops whose output may be their input, or apart.
IN_PLACE = (HEAD_NORM, BIAS, GAIN, SCALE, ACTIVATE, XIELU, SOFTCAP)


def every_op() -> Spec:
    """A right spec with every kind of op, numbered as above; 64 wide, 5 logits."""
    spec = Spec(ISAS[-1], max_tokens=8)
    x = spec.given(normal(9, 64) / 8)
    rotary = {"n_rot": 16, "base": 1e4, "scale": 1.0, "magnitude": 1.0}
    angles = spec.op("angles", (), spec.buffer(F32, 16), [vector(np.ones(8))], **rotary)
    spec.op("store", (x, angles), x, n_rot=16, interleaved=1, **HEADS)
    h = spec.op("attention", (x,), spec.buffer(F32, 32), window=5, **HEADS)
    h = spec.op("gather", (h,), spec.buffer(F32, 32, logit_rows=True))
    n = spec.op("norm", (h,), spec.buffer(Q8, 32, logit_rows=True), [vector(np.ones(32))], eps=1e-5)
    q = spec.quantized(h)
    gate_up = [moderate("Q4_0", 32, 32, seed)[0] for seed in (1, 2)]
    m = spec.buffer(F32, 32, logit_rows=True)
    spec.op("gated_matmul", (n,), m, gate_up, activation=0)
    s = spec.op("add", (h, m), spec.buffer(F32, 32, logit_rows=True))
    g = spec.op("gated", (s,), spec.buffer(F32, 16, logit_rows=True), activation=0)
    heads = {"column": 2, "n_heads": 2, "head_dim": 7, "eps": 1e-5}
    spec.op("head_norm", (g,), g, [rows_weight(normal(2, 7))], **heads)
    spec.op("bias", (g,), g, [vector(normal(5)), vector(normal(8))], column=3)
    spec.op("gain", (g,), g, [vector(normal(16))], n=16)
    spec.op("scale", (g,), g, scale=0.5)
    spec.op("activate", (g,), g, activation=1)
    spec.op("xielu", (g,), g, alpha_p=0.7, alpha_n=0.6, beta=0.5, eps=-1e-6)
    spec.op("softcap", (g,), g, softcap=30.0)
    g = spec.op("multiply", (g, g), spec.buffer(F32, 16, logit_rows=True))
    g = spec.op("slice", (g,), spec.buffer(F32, 9, logit_rows=True), column=7)
    spec.op("matmul", (g,), spec.buffer(LOGITS, 5), [rows_weight(normal(5, 9))])
    assert q != n and [op["kind"] for op in spec.ops] == [
        *(lib.EDGE_OP_EMBED, lib.EDGE_OP_ANGLES, lib.EDGE_OP_STORE, lib.EDGE_OP_ATTENTION),
        *(lib.EDGE_OP_GATHER, lib.EDGE_OP_NORM, lib.EDGE_OP_QUANTIZE, lib.EDGE_OP_GATED_MATMUL),
        *(lib.EDGE_OP_ADD, lib.EDGE_OP_GATED, lib.EDGE_OP_HEAD_NORM, lib.EDGE_OP_BIAS),
        *(lib.EDGE_OP_GAIN, lib.EDGE_OP_SCALE, lib.EDGE_OP_ACTIVATE, lib.EDGE_OP_XIELU),
        *(lib.EDGE_OP_SOFTCAP, lib.EDGE_OP_MULTIPLY, lib.EDGE_OP_SLICE, lib.EDGE_OP_MATMUL),
    ]
    return spec


@pytest.mark.native
def test_right_spec_runs() -> None:
    plan = Plan(every_op())
    plan.run(range(8), n_logits=3)
    assert plan.run([8], start=8, n_logits=1).shape == (1, 5)


#: An op's index, its field, a wrong value.
WRONG_OPS: list[tuple[int, str, Any]] = [
    *((i, "out", value) for i in range(N_OPS) for value in (-1, 99)),
    *((i, "kind", value) for i in (EMBED, HEAD) for value in (-1, lib.EDGE_N_OPS)),
    *((i, "in", 99) for i in range(N_OPS)),
    *((i, "in", -1) for i in range(STORE, HEAD + 1)),
    *((i, "in2", 99) for i in range(N_OPS)),
    *((i, "w", [-1, -1, -1]) for i in (EMBED, NORM, GATED_MATMUL, BIAS, GAIN, HEAD)),
    *((i, "w", [99, -1, -1]) for i in range(N_OPS)),
    (EMBED, "w", [1, -1, -1]),  # a vector
    (EMBED, "out", 2),  # another width
    *((ANGLES, "n_rot", value) for value in (0, -2, 15, 18)),
    *((ANGLES, "base", value) for value in (0.0, 1.0, np.nan, np.inf)),
    *((ANGLES, "scale", value) for value in (0.0, -1.0, np.nan, 1e5)),
    *((ANGLES, "magnitude", value) for value in (0.0, np.nan, 1e5)),
    (ANGLES, "w", [0, -1, -1]),
    (ANGLES, "w", [2, -1, -1]),  # factors of another width
    *((STORE, "n_rot", value) for value in (0, -2, 15, 18, 2**30)),
    (STORE, "out", 2),
    (STORE, "in2", 0),
    *((i, "layer", value) for i in (STORE, ATTENTION) for value in (-1, 1)),
    *((i, "n_heads", value) for i in (STORE, ATTENTION) for value in (0, -2, 1, 3, 2**30)),
    *((i, "n_kv_heads", value) for i in (STORE, ATTENTION) for value in (0, -1, 2)),
    *((i, "head_dim", value) for i in (STORE, ATTENTION) for value in (0, -16, 8, 32)),
    (ATTENTION, "window", -1),
    *((ATTENTION, "attention_scale", value) for value in (-1.0, np.nan, np.inf, 1e4)),
    (ATTENTION, "out", 0),  # its own input
    (GATHER, "in", 3),
    (GATHER, "out", 2),  # of all rows
    *((NORM, "eps", value) for value in (-1.0, 1.0, np.nan)),
    (NORM, "w", [0, -1, -1]),
    *((NORM, "w", [2, value, -1]) for value in (0, 1)),  # the bias: a matrix, another width
    (NORM, "out", 3),
    (QUANTIZE, "out", 3),
    *(
        (i, "activation", value)
        for i in (GATED_MATMUL, GATED, ACTIVATE)
        for value in (-1, lib.EDGE_N_ACTIVATIONS)
    ),
    (ACTIVATE, "activation", lib.EDGE_ACTIVATION_SWIGLU_OAI),  # it needs a gate
    (GATED_MATMUL, "in", 3),  # float32 for 4-bit codes
    (GATED_MATMUL, "w", [3, -1, -1]),
    (GATED_MATMUL, "w", [3, 4, 4]),
    (ADD, "in2", -1),
    (ADD, "in2", 2),
    (ADD, "in", 0),
    (GATED, "in", 0),
    *((i, "in", value) for i in (*IN_PLACE, MULTIPLY) for value in (0, 3, 5)),
    *((SLICE, "in", value) for value in (0, 5)),
    *((i, "out", value) for i in IN_PLACE for value in (0, 3, 5)),
    *((HEAD_NORM, "column", value) for value in (-1, 3, 2**31 - 1)),
    *((HEAD_NORM, "n_heads", value) for value in (-1, 0, 1, 3, 2**30)),
    *((HEAD_NORM, "head_dim", value) for value in (-1, 0, 6, 8, 2**30)),
    *((HEAD_NORM, "eps", value) for value in (-1.0, 1.0, np.nan)),
    *((HEAD_NORM, "w", [value, -1, -1]) for value in (1, 3)),
    *((BIAS, "column", value) for value in (-1, 4, 2**31 - 1)),
    *((BIAS, "w", w) for w in ([5, -1, -1], [6, 7, 6], [-1, 6, -1], [8, -1, -1])),
    *((GAIN, "w", [value, -1, -1]) for value in (2, 3, 6)),
    *((SCALE, "scale", value) for value in (-1e9, np.nan, np.inf)),
    *((XIELU, name, v) for name in ("alpha_p", "alpha_n", "beta") for v in (-1e4, np.nan, np.inf)),
    *((XIELU, "eps", value) for value in (-1.0, 1.0, np.nan)),
    *((SOFTCAP, "softcap", value) for value in (-1.0, 0.0, np.nan, np.inf)),
    *((MULTIPLY, "in2", value) for value in (-1, 0, 3, 5, 6)),
    *((SLICE, "column", value) for value in (-1, 8, 2**31 - 1)),
    *((SLICE, "out", value) for value in (0, 3, 5, 9)),
    *((HEAD, "column", value) for value in (-1, 1, 2**31 - 1)),
    (HEAD, "in", 5),
]


@pytest.mark.native
@pytest.mark.parametrize("op, name, value", WRONG_OPS, ids=str)
def test_wrong_op_is_refused(op: int, name: str, value: Any) -> None:
    spec = every_op()
    spec.ops[op][name] = value
    with pytest.raises(NativeError, match=rf"^op {op} \(kind -?\d+\) needs ") as caught:
        Plan(spec)
    assert (caught.value.code, caught.value.op) == (lib.EDGE_BAD_PLAN, op)


def in_place_ops() -> Spec:
    """A right spec of the ops around an attention that overwrite their input; 64 wide."""
    spec = Spec(ISAS[-1], max_tokens=8)
    x = spec.given(normal(9, 64) / 8)
    rotary = {"n_rot": 16, "base": 1e4, "scale": 0.5, "magnitude": 1.0}
    ramp = {"has_ramp": 1, "ramp_low": 1.0, "ramp_high": 5.0}
    angles = spec.op("angles", (), spec.buffer(F32, 16), **rotary, **ramp)
    spec.op("rotate", (x, angles), x, n_heads=3, head_dim=16, n_rot=16, interleaved=1)
    spec.op("temperature", (x,), x, n=32, length=4, beta=0.5)
    spec.op("store", (x,), x, **HEADS)
    h = spec.buffer(F32, 32)
    spec.op("attention", (x,), h, [vector(np.zeros(2))], softcap=5.0, **HEADS)
    spec.op("attention", (h,), spec.buffer(F32, 32), [vector(np.zeros(2))], **HEADS)
    spec.op("gather", (h,), spec.buffer(F32, 32, logit_rows=True))
    spec.op("matmul", (4,), spec.buffer(LOGITS, 5), [rows_weight(normal(5, 32))])
    return spec


@pytest.mark.native
def test_right_ops_in_place_run() -> None:
    plan = Plan(in_place_ops())
    plan.run(range(8), n_logits=3)
    assert plan.run([8], start=8, n_logits=1).shape == (1, 5)


@pytest.mark.native
@pytest.mark.parametrize(
    "op, name, value",
    [
        *((1, "has_ramp", value) for value in (-1, 2)),
        *((1, name, value) for name in ("ramp_low", "ramp_high") for value in (np.nan, 1e7)),
        *((2, "n_rot", value) for value in (0, -2, 15, 18)),
        *((2, "n_heads", value) for value in (0, -1, 5, 2**31 - 1)),
        *((2, "head_dim", value) for value in (0, -16, 32, 2**31 - 1)),
        *((2, "in2", value) for value in (-1, 0, 2)),
        *((i, "out", 2) for i in (2, 3)),
        *((i, "in", value) for i in (2, 3) for value in (-1, 2)),
        *((3, "n", value) for value in (0, -1, 65)),
        *((3, "length", value) for value in (0, -1)),
        *((3, "beta", value) for value in (np.nan, np.inf, 1e5)),
        *((i, "softcap", value) for i in (5, 6) for value in (-1.0, np.nan, np.inf)),
        *((i, "w", [0, -1, -1]) for i in (5, 6)),
        (6, "in", 1),  # neither q alone nor q, k and v
        (6, "out", 2),  # its own input
    ],
    ids=str,
)
def test_wrong_op_in_place_is_refused(op: int, name: str, value: Any) -> None:
    spec = in_place_ops()
    spec.ops[op][name] = value
    with pytest.raises(NativeError, match=rf"^op {op} \(kind -?\d+\) needs "):
        Plan(spec)


WRONG_BUFFERS: list[tuple[str, Any]] = [
    *(("kind", value) for value in (-1, 4, 2**31 - 1)),
    *(("dim", value) for value in (0, -1, 2**24 + 1, 2**31 - 1)),
    *(("offset", value) for value in (-64, 1, 2**40, 2**63 - 64, -(2**63))),
    *(("is_logit_rows", value) for value in (-1, 2)),
]


@pytest.mark.native
@pytest.mark.parametrize("name, value", WRONG_BUFFERS)
def test_wrong_buffer_is_refused(name: str, value: int) -> None:
    for i in range(len(every_op().buffers) - 1):
        spec = every_op()
        spec.buffers[i][name] = value
        with pytest.raises(NativeError, match="needs") as caught:
            Plan(spec)
        assert caught.value.code == lib.EDGE_BAD_PLAN


@pytest.mark.native
def test_overlapping_buffers_are_refused() -> None:
    """An op's output over its input, wholly or by one line."""
    for op in (ATTENTION, GATHER, NORM, QUANTIZE, GATED_MATMUL, GATED, SLICE):
        for shift in (0, 64, -64):
            spec = every_op()
            source, out = (spec.buffers[spec.ops[op][key]] for key in ("in", "out"))
            out["offset"] = source["offset"] + shift
            spec.arena_bytes += 4096
            with pytest.raises(NativeError) as caught:
                Plan(spec)
            assert caught.value.code == lib.EDGE_BAD_PLAN
            assert op <= caught.value.op  # a later reader may be hit too


@pytest.mark.native
@pytest.mark.parametrize(
    "op, name",
    [
        *((STORE, "in2"), (ADD, "in"), (ADD, "in2"), (HEAD, "in2"), (MULTIPLY, "in2")),
        *((op, "in") for op in (*IN_PLACE, MULTIPLY)),
    ],
)
@pytest.mark.parametrize("shift", [64, -64])
def test_buffers_that_overlap_in_part_are_refused(op: int, name: str, shift: int) -> None:
    """Element by element in one place is fine for sums, a line apart is not."""
    spec = every_op()
    if op == HEAD:
        spec.ops[op]["out"] = spec.buffer(F32, 5, logit_rows=True)
        spec.ops[op]["in2"] = spec.buffer(F32, 5, logit_rows=True)
    elif op in IN_PLACE:
        spec.ops[op]["out"] = spec.buffer(F32, 16, logit_rows=True)
    other, out = (spec.buffers[spec.ops[op][key]] for key in (name, "out"))
    other["offset"] = out["offset"] + shift
    spec.arena_bytes += 4096
    with pytest.raises(NativeError) as caught:
        Plan(spec)
    assert caught.value.code == lib.EDGE_BAD_PLAN


@pytest.mark.native
def test_logits_of_two_widths_are_refused() -> None:
    """The caller gives room for rows of one length."""
    spec = every_op()
    spec.buffer(LOGITS, 6)
    with pytest.raises(NativeError, match="needs") as caught:
        Plan(spec)
    assert caught.value.code == lib.EDGE_BAD_PLAN


@pytest.mark.native
def test_weights_off_a_cache_line_are_refused() -> None:
    spec = every_op()
    spec.weights[0].entry.data = ffi.cast("uint8_t *", spec.weights[0].entry.data) + 32
    with pytest.raises(NativeError, match="ALIGNMENT"):
        Plan(spec)


@pytest.mark.native
def test_sum_in_place_is_right() -> None:
    x, y = normal(8, 64), normal(8, 64, seed=1)
    spec = Spec(max_tokens=8)
    a, b = spec.given(x), spec.given(y)
    spec.op("add", (a, b), b)
    assert np.array_equal(evaluate(spec, b, 8), x + y)


WRONG_WEIGHTS: list[tuple[str, Any]] = [
    *(("layout", value) for value in (-2, 6, 2**31 - 1)),
    *(("n", value) for value in (0, -1, 2**31, 2**62)),
    *(("k", value) for value in (0, -32, 33, 2**31, 2**62)),
    *(("n_bytes", value) for value in (0, -1, 1, 2**62)),
    ("data", ffi.NULL),
]


@pytest.mark.native
@pytest.mark.parametrize("name, value", WRONG_WEIGHTS, ids=str)
def test_wrong_weight_is_refused(name: str, value: Any) -> None:
    for i in range(len(every_op().weights)):
        spec = every_op()
        setattr(spec.weights[i].entry, name, value)
        with pytest.raises(NativeError, match="needs") as caught:
            Plan(spec)
        assert caught.value.code == lib.EDGE_BAD_PLAN


WRONG_SPECS: list[tuple[str, Any]] = [
    *((name, ffi.NULL) for name in ("ops", "buffers", "weights")),
    *((f"n_{name}", value) for name in ("ops", "buffers", "weights") for value in (0, -1, 2**30)),
    *(("max_tokens", value) for value in (0, -1, 2**30)),
    *(("arena_bytes", value) for value in (0, -64, 64, 2**62)),
    ("arena", ffi.NULL),
    ("arena", ffi.cast("void *", 96)),
    *(("kv.head_dim", value) for value in (0, 8, 24, 528)),
    *((f"kv.{name}", value) for name in ("n_layers", "n_kv_heads") for value in (0, 4097)),
    ("kv", ffi.NULL),
    *(("n_kv_groups", value) for value in (0, -1, 2**30)),
    *(("kv.type", value) for value in (-1, lib.EDGE_N_KV_TYPES)),
]


@pytest.mark.native
@pytest.mark.parametrize("name, value", WRONG_SPECS, ids=str)
def test_wrong_spec_is_refused(name: str, value: Any) -> None:
    struct, alive = every_op().struct()
    setattr(struct.kv[0] if name.startswith("kv.") else struct, name.removeprefix("kv."), value)
    out, error = ffi.new("edge_plan **"), ffi.new("edge_error *")
    assert lib.edge_plan_new(struct, out, error) == error.code == lib.EDGE_BAD_PLAN
    assert out[0] == ffi.NULL and error.op == -1 and native.text(error.text)
    assert lib.edge_plan_new(struct, out, ffi.NULL) == lib.EDGE_BAD_PLAN
    del alive


@pytest.mark.native
@pytest.mark.parametrize("isa", [-1, 99])
def test_unusable_isa_is_refused(isa: int) -> None:
    struct, alive = every_op().struct()
    struct.isa = isa
    error = ffi.new("edge_error *")
    assert lib.edge_plan_new(struct, ffi.new("edge_plan **"), error) == lib.EDGE_BAD_ARGUMENT
    assert not lib.edge_isa_usable(isa) and lib.edge_isa_name(isa) == ffi.NULL
    del alive


@pytest.mark.native
def test_null_pointers_are_refused() -> None:
    struct, alive = every_op().struct()
    out = ffi.new("edge_plan **")
    assert lib.edge_plan_new(ffi.NULL, out, ffi.NULL) == lib.EDGE_BAD_ARGUMENT
    assert lib.edge_plan_new(struct, ffi.NULL, ffi.NULL) == lib.EDGE_BAD_ARGUMENT
    lib.edge_plan_free(ffi.NULL)
    plan, step = Plan(every_op()), ffi.new("edge_step *")
    whole = [plan.handle, shared_threads(), plan.cache.handle, step]
    for i in range(4):
        given = [*whole[:i], ffi.NULL, *whole[i + 1 :]]
        assert lib.edge_run(*given, ffi.NULL) == lib.EDGE_BAD_ARGUMENT
    del alive


@pytest.mark.native
@pytest.mark.parametrize(
    "name, value",
    [
        ("tokens", ffi.NULL),
        *(("n_tokens", value) for value in (0, -1, 9, 2**31 - 1)),
        *(("start", value) for value in (-1, 57, 510, 2**31 - 1)),
        *(("n_logits", value) for value in (-1, 9)),
        ("logits", ffi.NULL),
        *(("n_ops", value) for value in (-2, N_OPS + 1)),
    ],
    ids=str,
)
def test_wrong_step_is_refused(name: str, value: Any) -> None:
    plan = Plan(every_op())
    cache = Cache(plan.spec.cache_shape, 64)
    ids, logits = ffi.new("int32_t[8]"), ffi.new("float[]", 8 * 5)
    step = ffi.new("edge_step *", {"tokens": ids, "n_tokens": 8, "n_logits": 8, "n_ops": -1})
    step.logits = logits
    error = ffi.new("edge_error *")
    assert lib.edge_run(plan.handle, shared_threads(), cache.handle, step, error) == lib.EDGE_OK
    setattr(step, name, value)
    assert (
        lib.edge_run(plan.handle, shared_threads(), cache.handle, step, error)
        == lib.EDGE_BAD_ARGUMENT
    )


@pytest.mark.native
@pytest.mark.parametrize(
    "name, value",
    [
        *(("n_pages", value) for value in (-1, 0, 1, 2**31 - 1)),
        *((name, -1) for name in ("sink_pages", "window_pages")),
        ("pages", ffi.NULL),
    ],
    ids=str,
)
def test_wrong_cache_is_refused(name: str, value: Any) -> None:
    plan = Plan(every_op(), 128)
    setattr(plan.cache.group, name, value)
    with pytest.raises(NativeError):
        plan.run(range(8), start=64)


@pytest.mark.native
@pytest.mark.parametrize(
    ("window", "sliding", "wanted"),
    [
        (0, 0, [0, 1, 2, 3, 4]),
        (0, 2, [0, 3, 4]),  # the sinks, the window
        (1, 0, [3, 4]),  # its own page, and the one before it
        (80, 0, [3, 4]),
        (66, 0, [2, 3, 4]),
        (66, 2, [3, 4]),
        (500, 2, [0, 3, 4]),
    ],
)
def test_only_pages_in_sight_must_be_there(window: int, sliding: int, wanted: list[int]) -> None:
    spec = every_op()
    spec.ops[ATTENTION]["window"] = window
    plan = Plan(spec, 64 * 6)
    cache, start = plan.cache, 64 * 4 + (20 if window == 80 else 0)
    cache.group.sink_pages, cache.group.window_pages = bool(sliding), sliding
    for missing in range(6):
        pages = [*cache.pages]
        pages[missing] = ffi.NULL
        cache.group.pages = kept = ffi.new("void *[]", pages)
        if missing not in wanted:
            plan.run(range(8), start=start)
        else:
            with pytest.raises(NativeError, match=f"page {missing} is missing"):
                plan.run(range(8), start=start)
        del kept


@pytest.mark.native
def test_a_group_wants_what_its_widest_window_sees() -> None:
    """Two attentions of one group, in any order, or of two."""
    for windows, n_groups, missing in [((5, 0), 1, 0), ((0, 5), 1, 0), ((5, 0), 2, None)]:
        spec = every_op()
        spec.cache_shape = (2, 1, 16)
        second = dict(spec.ops[ATTENTION], layer=1)
        spec.ops.insert(ATTENTION + 1, second)
        spec.n_groups = n_groups
        if n_groups == 2:
            spec.cache_shape, second["group"], second["layer"] = (1, 1, 16), 1, 0
        for op, window in zip((spec.ops[ATTENTION], second), windows, strict=True):
            op["window"] = window
        plan = Plan(spec, 64 * 6)
        plan.cache.pages[0] = ffi.NULL  # of the first group
        if missing is None:
            plan.run(range(8), start=64 * 4)
        else:
            with pytest.raises(NativeError, match="page 0 is missing"):
                plan.run(range(8), start=64 * 4)


@pytest.mark.native
@pytest.mark.parametrize("token", [-1, 9, 2**31 - 1])
def test_wrong_token_is_refused(token: int) -> None:
    plan = Plan(every_op())
    with pytest.raises(Exception, match=f"token {token} at index 2"):
        plan.run([0, 8, token, -5])


@pytest.mark.native
@pytest.mark.parametrize("shape", [(2, 1, 16), (1, 2, 16), (1, 1, 32)])
def test_cache_of_another_model_is_refused(shape: tuple[int, int, int]) -> None:
    plan = Plan(every_op())
    plan.cache = Cache(shape)
    with pytest.raises(NativeError, match="another model"):
        plan.run([0])


@pytest.mark.native
def test_read_refuses_what_is_no_float_buffer() -> None:
    plan = Plan(every_op())
    out = ffi.new("float[]", 4096)
    kinds = [b["kind"] for b in plan.spec.buffers]
    for i, rows in [
        (-1, 1),
        (99, 1),
        (kinds.index(Q8), 1),
        (kinds.index(LOGITS), 1),
        (0, -1),
        (0, 9),
    ]:
        assert lib.edge_plan_read(plan.handle, i, rows, out) == lib.EDGE_BAD_ARGUMENT
    assert lib.edge_plan_read(plan.handle, 0, 8, ffi.NULL) == lib.EDGE_BAD_ARGUMENT
    assert lib.edge_plan_read(ffi.NULL, 0, 8, out) == lib.EDGE_BAD_ARGUMENT


#: Small numbers, those at limits, and neighbours of what stands there (added to it).
SMALL, HARD = st.integers(-2, 20), st.sampled_from([32, 64, 2**24, 2**30, 2**31 - 1, -(2**31)])
FIELDS = [
    "kind",
    "in",
    "in2",
    "out",
    "column",
    "group",
    "layer",
    "n_heads",
    "n_kv_heads",
    "head_dim",
]
FIELDS += ["window", "n_rot", "interleaved", "activation", "centred"]
CHANGE = st.one_of(
    st.tuples(st.just("op"), st.integers(0, HEAD), st.sampled_from(FIELDS), SMALL | HARD),
    st.tuples(st.just("weight of op"), st.integers(0, HEAD), st.integers(0, 2), SMALL),
    st.tuples(
        st.just("buffer"),
        st.integers(0, 11),
        st.sampled_from(["kind", "dim", "is_logit_rows", "offset"]),
        SMALL | HARD | st.integers(0, 40).map(lambda i: 64 * i),
    ),
    st.tuples(
        st.just("entry"),
        st.integers(0, 9),
        st.sampled_from(["layout", "table", "n", "k", "n_bytes"]),
        SMALL | HARD,
    ),
)


def change(spec: Spec, changes: list[tuple[str, int, Any, int]]) -> None:
    """Overwrite numbers of a spec."""
    for what, i, name, value in changes:
        if what == "op":
            spec.ops[i][name] = value
        elif what == "weight of op":
            spec.ops[i]["w"][name] = value
        elif what == "buffer":
            buffer = spec.buffers[i % len(spec.buffers)]
            buffer[name] = value
        else:
            setattr(spec.weights[i % len(spec.weights)].entry, name, value)


@pytest.mark.native
@settings(
    max_examples=600,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(CHANGE, min_size=1, max_size=3))
def test_whatever_passes_the_check_runs(changes: list[tuple[str, int, Any, int]]) -> None:
    spec = every_op()
    change(spec, changes)
    try:
        plan = Plan(spec)
    except NativeError as error:
        assert error.code in (lib.EDGE_BAD_PLAN, lib.EDGE_BAD_ARGUMENT)
        return
    widest = max(b["dim"] for b in spec.buffers if b["kind"] == LOGITS)
    plan.spec.ops[-1]["out"] = len(spec.buffers)
    plan.spec.buffers.append({"dim": widest})  # room for the widest result
    try:
        plan.run(range(7), n_logits=3)
        plan.run([0], start=7, n_logits=1)
    except NativeError as error:
        assert error.code == lib.EDGE_NOT_FINITE
    except Exception as error:  # the vocabulary may have shrunk
        assert "token" in str(error)
