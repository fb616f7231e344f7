"""Plans that keep the inputs of matrices and attentions in the arena."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from arches import CASES
from test_engine import referee_values

from edge.engine.engine import DescribedFile, Engine
from edge.errors import InputError
from edge.graph.ops import Attention, Experts, Matmul
from edge.loading import NativeOptions
from edge.weights.model_file import open_model


def started(path: Path, kept: int | None) -> Engine:
    described = DescribedFile(open_model(path), NativeOptions(threads=1), kept=kept)
    return described.start()


def bits(engine: Engine, tokens: list[int]) -> bytes:
    """The logits of all tokens, run in pieces of up to 24."""
    cache = engine.cache()
    rows = [engine.run(cache, tokens[i : i + 24], logits="all") for i in range(0, len(tokens), 24)]
    cache.close()
    return b"".join(row.tobytes() for row in rows if row is not None)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.model.n_layers < 10])
def test_logits_have_the_same_bits(tmp_path: Path, name: str) -> None:
    options = vars(CASES[name].model) | {"type": "Q4_0"}
    path = tiny.write_tiny(tmp_path / "m.gguf", **options)
    tokens = np.random.default_rng(0).integers(0, 256, 40).tolist()
    made = []
    for kept in (None, 24):
        engine = started(path, kept)
        made.append(bits(engine, tokens))
        engine.close()
    assert made[0] == made[1]


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma2", "qwen3moe"])
def test_inputs_are_those_of_the_referee(tiny_gguf: Callable[..., Path], arch: str) -> None:
    engine = started(tiny_gguf(arch), 32)
    tokens = np.random.default_rng(0).integers(0, 256, 20).tolist()
    values, cache = referee_values(engine, tokens), engine.cache()
    engine.run(cache, tokens, logits="all")
    for op in engine.graph.ops:
        names = op.weights if isinstance(op, Matmul) else ()
        names = (op.output,) if isinstance(op, Attention) else names
        names = op.tensors.gate_up if isinstance(op, Experts) else names
        for name in names:
            got = engine.kept(engine.lowered.kept[name].buffer, len(tokens))
            want = values[op.inputs[0]]
            scale = np.abs(want).max()
            np.testing.assert_allclose(got / scale, want / scale, atol=1e-3, err_msg=name)
    engine.close()


def test_only_the_ops_before_are_run(tiny_gguf: Callable[..., Path]) -> None:
    engine, tokens = started(tiny_gguf(), 16), list(range(16))
    first, last = (
        engine.lowered.kept[f"blk.{i}.ffn_down.weight"] for i in (0, engine.config.n_layers - 1)
    )
    cache = engine.cache()
    engine.run_before(first.op, cache, tokens)
    early = engine.kept(first.buffer, 16)
    before = engine.kept(last.buffer, 16)
    cache.trim(0)
    engine.run_before(last.op, cache, tokens)
    np.testing.assert_array_equal(engine.kept(first.buffer, 16), early)
    assert not np.array_equal(engine.kept(last.buffer, 16), before)
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.kept(first.buffer, 16)
