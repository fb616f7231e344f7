"""Second moments of what matrices read, and of what attention makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import refgraph
from arches import CASES
from test_engine import referee_values

from edge.errors import CancelledError, InputError, MemoryBudgetError, UnsupportedError
from edge.graph.ops import Attention, Matmul
from edge.native.cancel import Cancel
from edge.quantizer import moments as module
from edge.quantizer.activations import Activations
from edge.quantizer.mixing import attention_weights, mixing, value_rows
from edge.quantizer.moments import collect, passes, wanted_tokens
from edge.windows import Windows

Q, K, V = (f"blk.0.attn_{part}.weight" for part in "qkv")
DOWN, GATE = "blk.1.ffn_down.weight", "blk.1.ffn_gate.weight"


def windows(n: int, context: int = 64) -> Windows:
    tokens = np.random.default_rng(0).integers(0, 256, (n, context)).tolist()
    return Windows(tuple(tokens), context)


@pytest.fixture(scope="module")
def llama(tiny_gguf: Callable[..., Path]) -> Iterator[Activations]:
    with Activations.open(tiny_gguf("llama"), context=64, threads=2) as activations:
        yield activations


# ---- what attention makes of the inputs of values ----


@pytest.mark.parametrize(
    "arch", ["llama", "phi3", "gemma2", "gpt-oss", "qwen2", "starcoder2", "exaone4"]
)
def test_mixed_inputs_give_what_attention_gives(tiny_gguf: Callable[..., Path], arch: str) -> None:
    """o = A V, and A X W_v.T plus the bias of v, are the same."""
    with Activations.open(tiny_gguf(arch, window=9), context=24, threads=1) as activations:
        graph, window = activations.graph, windows(1, 24).tokens[0]
        weights = refgraph.load_weights(activations.engine.gguf)
        rows = value_rows(graph)
        assert {r.attention.output for r in rows} == {op.output for op in graph.attentions}
        sites = {name: site for site in activations.sites for name in site.weights}
        outputs = {
            op.output: refgraph.attention(
                refgraph.Run(np.asarray(window), weights, {}, np.float32), op, x
            )
            for op, x in attentions(activations, window)
        }
        for _ in activations.run(window, [op.output for op in graph.attentions]):
            for r in rows:
                ((_, x),) = activations.inputs(sites[r.weight], 24)
                op, d = r.attention, r.attention.heads.head_dim
                heads = activations.queries(op.output, 24)
                sinks = weights[op.weights[0]] if op.weights else None
                v = x @ weights[r.weight][r.first : r.first + r.n].T
                v_at = (op.heads.n_heads + op.heads.n_kv_heads + r.head) * d
                bias = heads[0, v_at : v_at + d] - v[0]  # of v, the same at every token
                per_key = op.heads.n_heads // op.heads.n_kv_heads
                total = np.zeros((24, 24))
                for i, a in enumerate(attention_weights(op, heads, sinks, r.head)):
                    h = (r.head * per_key + i) * d
                    got = a @ x @ weights[r.weight][r.first : r.first + r.n].T
                    got += a.sum(axis=1, keepdims=True) * bias
                    want = outputs[op.output][:, h : h + d]
                    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
                    total += a.T @ a
                np.testing.assert_allclose(mixing(op, heads, sinks, r.head), total, atol=1e-4)


def attentions(
    activations: Activations, window: list[int]
) -> Iterator[tuple[Attention, np.ndarray]]:
    """Each attention and what it reads."""
    for _ in activations.run(window, [op.output for op in activations.graph.attentions]):
        for op in activations.graph.attentions:
            yield op, activations.queries(op.output, len(window))


def test_values_behind_a_norm_are_not_mixed(tiny_gguf: Callable[..., Path]) -> None:
    model = next(case.model for case in CASES.values() if case.model.arch == "gemma4")
    with Activations.open(tiny_gguf(**vars(model)), context=16) as activations:
        assert not value_rows(activations.graph)
    with Activations.open(tiny_gguf("qwen3"), context=16) as activations:  # of q and k alone
        assert len(value_rows(activations.graph)) == 2 * 2


# ---- moments ----


def read_by(activations: Activations, all_windows: Windows, weight: str) -> list[np.ndarray]:
    """What a weight reads in each window, by the referee."""
    op = next(op for op in activations.graph.ops if isinstance(op, Matmul) and weight in op.weights)
    tokens = (list(window) for window in all_windows.tokens)
    return [referee_values(activations.engine, t)[op.inputs[0]] for t in tokens]


def test_moments_are_those_of_the_referee(llama: Activations) -> None:
    text = windows(24)
    made = collect(llama, text, [Q, K, DOWN, GATE])
    assert made[Q][0].moments is made[K][0].moments
    for name in (Q, DOWN, GATE):
        (rows,) = made[name]
        read = read_by(llama, text, name)
        assert (rows.first, rows.n_rows) == (0, llama.graph.weights[name][0])
        assert (rows.moments.n_train, rows.moments.n_held) == (21 * 64, 3 * 64)
        for got, held in ((rows.moments.train, False), (rows.moments.held, True)):
            x = np.concatenate([r for i, r in enumerate(read) if (i % 8 == 7) == held])
            want = x.T @ x
            np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max(), err_msg=name)
            np.testing.assert_array_equal(got, got.T)


def test_slices_make_no_difference(llama: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(llama, windows(24), [DOWN, V])
    monkeypatch.setattr(module, "_SLICE", 24)
    cut = collect(llama, windows(24), [DOWN, V])
    for name in (DOWN, V):
        for a, b in zip(whole[name], cut[name], strict=True):
            np.testing.assert_allclose(a.moments.train, b.moments.train, rtol=1e-4, atol=1e-3)


def test_values_have_moments_of_each_key_head(llama: Activations) -> None:
    text = windows(20)
    made, read = collect(llama, text, [V])[V], read_by(llama, text, V)
    rows = [r for r in value_rows(llama.graph) if r.weight == V]
    assert (
        [(m.first, m.n_rows) for m in made] == [(r.first, r.n) for r in rows] == [(0, 16), (16, 16)]
    )
    assert made[0].moments.n_train == (20 - 2) * 64 * 2  # of two query heads each
    for r, own in zip(rows, made, strict=True):
        want = np.zeros((64, 64))
        for i, x in enumerate(read):
            if i % 8 != 7:
                heads = referee_values(llama.engine, list(text.tokens[i]))[r.attention.inputs[0]]
                want += x.T @ mixing(r.attention, np.float32(heads), None, r.head) @ x
        np.testing.assert_allclose(own.moments.train, want, atol=2e-3 * np.abs(want).max())


def test_a_fused_matrix_has_both(tiny_gguf: Callable[..., Path]) -> None:
    name = "blk.0.attn_qkv.weight"
    with Activations.open(tiny_gguf("phi3"), context=64) as activations:
        made = collect(activations, windows(16), [name])[name]
        n, op = activations.graph.weights[name][0], activations.graph.attentions[0]
    d, n_kv = op.heads.head_dim, op.heads.n_kv_heads
    first = n - n_kv * d
    assert [(m.first, m.n_rows) for m in made] == [
        (0, first), *((first + i * d, d) for i in range(n_kv))
    ]  # fmt: skip
    assert not np.allclose(made[0].moments.train, made[1].moments.train)


def test_experts_have_moments_of_their_own(tiny_gguf: Callable[..., Path]) -> None:
    names = ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"]
    with Activations.open(tiny_gguf("qwen3moe"), context=64) as activations:
        made = collect(activations, windows(24), names)
        router = collect(activations, windows(24), ["blk.0.ffn_gate_inp.weight"])
        shapes = [activations.graph.weights[name] for name in names]
        op = next(
            op for op in activations.graph.ops if hasattr(op, "n_used") and hasattr(op, "tensors")
        )
    for name, (n_experts, n, k) in zip(names, shapes, strict=True):
        assert [(m.first, m.n_rows) for m in made[name]] == [(i * n, n) for i in range(n_experts)]
        assert sum(m.moments.n_train for m in made[name]) == 21 * 64 * op.n_used
        assert made[name][0].moments.train.shape == (k, k)
    # each token reaches n_used experts with what the router reads
    (whole,) = router["blk.0.ffn_gate_inp.weight"]
    total = sum(m.moments.train for m in made[names[0]])
    np.testing.assert_allclose(total, op.n_used * whole.moments.train, rtol=1e-3, atol=1e-2)


def test_enough_is_enough(llama: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENOUGH_PER_COLUMN", 8)  # 512 of 64 columns, 768 of 96
    made = collect(llama, windows(32), [Q, V, DOWN])
    counts = {name: (m.n_train, m.n_held) for name in made for m in [made[name][0].moments]}
    assert counts[Q] == (7 * 64, 64)  # one group of four
    assert counts[V] == (7 * 64 * 2, 64 * 2)  # of two query heads
    assert counts[DOWN] == (2 * 7 * 64, 2 * 64)


def test_long_tokens_are_cut() -> None:
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    x[2] *= 1e4
    cut = module._capped(x)
    lengths = np.linalg.norm(x, axis=1)
    assert np.linalg.norm(cut[2]) == pytest.approx(100 * np.median(lengths), rel=1e-5)
    np.testing.assert_array_equal(np.delete(cut, 2, 0), np.delete(x, 2, 0))


def test_passes_go_by_layers_and_fit(llama: Activations) -> None:
    names = [GATE, V, DOWN, Q, K]
    assert passes(llama, names, None) == [[Q, K, V, GATE, DOWN]]
    sizes = [module._Sources(llama).n_bytes(group) for group in ([Q, K], [V], [DOWN])]
    groups = passes(llama, names, max(sizes))
    assert [name for group in groups for name in group] == [Q, K, V, GATE, DOWN]
    assert len(groups) > 1 and groups[0][:2] == [Q, K]
    assert passes(llama, names, sizes[0])[0] == [Q, K]
    assert passes(llama, names, 10) == passes(llama, ["output_norm.weight"], None) == []


def test_progress_and_cancel(llama: Activations) -> None:
    seen: list[tuple[int, int]] = []
    collect(llama, windows(16), [Q], progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 1024) and seen[-1] == (1024, 1024) and seen == sorted(seen)
    cancel = Cancel()
    cancel.set()
    with pytest.raises(CancelledError):
        collect(llama, windows(16), [Q], cancel=cancel)


@pytest.mark.parametrize("n", [4, 15])
def test_a_text_that_is_too_short(llama: Activations, n: int) -> None:
    assert wanted_tokens(llama, [Q, DOWN]) == 16 * 96
    with pytest.raises(InputError, match=rf"{n * 64} tokens.* 1024 at least, 1536 for the widest"):
        collect(llama, windows(n), [Q, DOWN])


def test_what_does_not_fit(llama: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = replace(llama.engine.ledger, budget=llama.engine.ledger.needed)
    monkeypatch.setattr(llama.engine, "ledger", ledger)
    monkeypatch.setattr(module, "_SLICE", 1 << 24)
    with pytest.raises(MemoryBudgetError, match="second moments"):
        collect(llama, windows(16), [Q])


def test_models_that_show_nothing(tmp_path: Path, tiny_gguf: Callable[..., Path]) -> None:
    from edge.engine.describe import pack

    pack(tiny_gguf(), tmp_path / "packed")
    with pytest.raises(InputError, match="is packed: name the GGUF"):
        Activations.open(tmp_path / "packed", context=16)
    with pytest.raises(UnsupportedError, match="ONNX"):
        Activations.open(tmp_path)
