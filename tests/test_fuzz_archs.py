"""Damaged models of all kinds of ops: a result or a typed error, never a crash, a hang or a bug.

A family is the models that have some kind of op. Its mutants have wrong keys, wrong, missing and
added tensors, tensors of other types, and any bytes as data; NaN and infinity, too.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lora
import mutants
import numpy as np
import pytest
import tiny
from arches import gemma3n, gemma4
from arches.common import Tiny, yarn
from lora import Lora
from mutants import Model, Stored

from edge import models
from edge.device import cores, memory
from edge.engine.engine import Engine
from edge.errors import EdgeError, ModelFileError, NativeError
from edge.files.tensor_types import TYPE_NUMBERS

N_MUTANTS = 2000
#: The bytes that a family's mutants may take beyond what the tests have.
ROOM = 512 << 20

SMALL: dict[str, Any] = {"dim": 32, "n_heads": 2, "n_kv_heads": 1, "ffn": 32, "vocab": 40}
WIDE = {"dim": 256, "ffn": 256, "tied": False}


def small(arch: str, n_layers: int = 1, **options: Any) -> Tiny:
    """The smallest model of an architecture that has what is special about it."""
    return Tiny(arch, **{**SMALL, "n_layers": n_layers, **options})


def mixed(name: str) -> str:
    """Two types of the matrices of experts."""
    return "TQ2_0" if "up_exps" in name else "Q4_0" if "_exps" in name else "F32"


def gemma_4(n_layers: int, n_shared: int, input_dim: int) -> Tiny:
    """Gemma 4: layers that read others' keys, inputs of each layer."""
    return small("gemma4", n_layers, window=4, extra=gemma4.extra(n_shared, input_dim))


#: The model that adapters are for.
BASE = small("llama", tied=False)

#: Family of ops -> models that have them.
FAMILIES: dict[str, list[Tiny]] = {
    "norms": [
        small("phi2"),
        small("stablelm", extra=(("stablelm.use_parallel_residual", True),)),
        small("olmo2"),
        small("qwen2"),
        small("command-r", head_dim=16),
        small("bitnet", 2),
        small("hunyuan-dense"),
        gemma_4(3, 0, 0),
    ],
    "activations": [
        small("apertus", 2),
        small("arcee"),
        small("starcoder2"),
        small("gemma"),
        small("bitnet"),
        small("gemma3n", 2, window=4, extra=gemma3n.extra([0.95, 0.5], 1, 32)),
    ],
    "scales": [
        small("granite"),
        small("minicpm", original_context=16),
        small("gemma2", window=4),
        small("cohere2", window=4),
        small("mistral3", extra=yarn("mistral3")),
        gemma_4(2, 0, 32),
    ],
    "ropes": [
        small("mistral3", extra=yarn("mistral3")),
        small("llama", rope_freqs=True, extra=yarn("llama")),
        small("phi3", original_context=16, n_rot=8),
        small("gemma3", 2, window=4),
        small("olmo2", 2, window=4, extra=yarn("olmo2")),
        small("glm4", n_rot=8),
        gemma_4(3, 0, 0),
    ],
    "attention": [
        small("gemma2", 2, window=4),
        small("gpt-oss", 2, window=4),
        small("exaone4", 2, window=4, extra=(("exaone4.attention.sliding_window_pattern", 2),)),
        small("cohere2", 2, window=4),
        gemma_4(4, 1, 32),
    ],
    "experts": [
        small("qwen2moe"),
        small("ernie4_5-moe", 2),
        small("gpt-oss", type="MXFP4", window=4),
        small("granitemoe"),
        small("hunyuan-moe", type="Q4_0"),
        small("olmoe", type="NVFP4", dim=64, ffn=64),
        small("qwen3moe", type=mixed, dim=256),
    ],
    "types": [
        small("llama", type=kind, **WIDE)
        for kind in ("Q1_0", "Q2_0", "Q2_0_128", "NVFP4", "TQ1_0", "TQ2_0", "MXFP4")
    ],
}


@cache
def models_of(family: str) -> list[Model]:
    """The models of a family."""
    return [Model.of(t) for t in FAMILIES[family]]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to write mutants to. What loading finds in the machine is found once."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    for module, name in ((models, "architectures"), (cores, "choose"), (memory, "available")):
        monkeypatch.setattr(module, name, cache(getattr(module, name)))
    path = tmp_path / "model.gguf"
    path.touch()
    return path


def try_mutants(family: str, n: int, path: Path) -> None:
    """n mutants of a family, which must be run or refused."""
    sources, before = models_of(family), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def attempt(number: int) -> str:
        rng = random.Random(f"{family} {number}")
        return outcome(mutants.mutant(sources[number % len(sources)], rng), path)

    found = mutants.tried(range(n), attempt)
    assert not found.fault
    assert found.most_bytes < (before << 10) + ROOM
    outcomes = found.outcomes  # were all refused, the damage would tell nothing
    assert outcomes.total() == n and outcomes["ran"] > n / 10 and outcomes["ModelFileError"] > n / 4


def raise_value_error() -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize(
    "end, fault",
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "mutant 3: SIGKILL"),
        (lambda: time.sleep(60), "mutant 3: SIGALRM"),
        (raise_value_error, "mutant 3: exit code 1 ValueError: a bug"),
    ],
)
def test_a_mutant_that_crashes_is_told(
    end: Callable[[], None], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "SECONDS", 1)
    found = mutants.tried(range(5), lambda number: str(end()) if number == 3 else "ran")
    assert found.fault.strip() == fault and not found.outcomes


@pytest.mark.parametrize("family", FAMILIES)
def test_mutants_run_or_are_refused(family: str, path: Path) -> None:
    try_mutants(family, N_MUTANTS, path)


@pytest.mark.native
@pytest.mark.parametrize("family", FAMILIES)
def test_some_mutants_run_or_are_refused(family: str, path: Path) -> None:
    """As many as there is time for under the sanitizers, and for each instruction set."""
    try_mutants(family, 60, path)


def adapters() -> list[Model]:
    """Adapters of a small model, in two types."""
    found = []
    for kind in ("F32", "Q8_0"):
        own = Lora(("attn", "ffn", "token_embd"), rank=32, type=kind)
        data = lora.in_file(BASE, own).items()
        tensors = {
            name: Stored(a.shape, TYPE_NUMBERS[kind], tiny.quantise(a, kind).tobytes())
            for name, a in data
        }
        keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 2.0}
        others = ("adapter.alora.invocation_tokens", "general.alignment")
        found.append(Model({"general.architecture": BASE.arch} | keys, tensors, others))
    return found


@pytest.mark.parametrize(
    "n", [pytest.param(N_MUTANTS, id="many"), pytest.param(60, id="some", marks=pytest.mark.native)]
)
def test_mutants_of_adapters_run_or_are_refused(n: int, path: Path, tmp_path: Path) -> None:
    base, sources = tmp_path / "base.gguf", adapters()
    base.write_bytes(Model.of(BASE).content)

    def attempt(number: int) -> str:
        rng = random.Random(f"adapters {number}")
        return outcome(mutants.mutant(sources[number % 2], rng), path, base)

    found = mutants.tried(range(n), attempt)
    assert not found.fault
    outcomes = found.outcomes
    assert outcomes.total() == n and outcomes["ran"] > n / 10 and outcomes["ModelFileError"] > n / 4


def outcome(model: Model, path: Path, base: Path | None = None) -> str:
    """How loading a model and running it ended: "ran", or the error's type. base: the model, where
    this is an adapter of one.
    """
    with path.open("r+b") as file:  # some file systems are slow to make a file anew
        file.write(model.content)
        file.truncate()
    try:
        load_and_run(path) if base is None else load_and_run(base, lora=path)
    except EdgeError as error:
        assert not isinstance(error, NativeError), error
        assert "\n" not in str(error).removeprefix(str(path))
        return type(error).__name__
    return "ran"


def load_and_run(path: Path, **options: Any) -> None:
    """More tokens than a window has, in two calls."""
    engine = Engine.load(path, threads=1, **options)
    try:
        cache, n = engine.cache(), engine.n_vocab
        tokens = [i % n for i in range(9)]
        logits = engine.run(cache, tokens[:-1], logits="all")
        logits = np.concatenate([logits, engine.run(cache, tokens[-1:])])
        assert logits.shape == (len(tokens), n) and np.isfinite(logits).all()
    finally:
        engine.close()


# ---- experts -------------------------------------------------------------------------------------


def expert_model(arch: str = "qwen2moe", **changes: Any) -> Model:
    """A model with experts, and with these keys; None: without the key."""
    model = Model.of(small(arch, 2, window=4))
    keys = {f"{arch}.{key}": value for key, value in changes.items()}
    model.metadata = {
        key: value for key, value in (model.metadata | keys).items() if value is not None
    }
    return model


@pytest.mark.parametrize("count, used", [(0, 0), (0, 3), (8, 0), (8, 9), (8, 65), (9, 3), (-1, 3)])
@pytest.mark.parametrize("arch", ["qwen2moe", "granitemoe", "gpt-oss", "ernie4_5-moe"])
def test_counts_of_experts_that_cannot_be(arch: str, count: int, used: int, path: Path) -> None:
    model = expert_model(arch, expert_count=count, expert_used_count=used)
    assert outcome(model, path) == "ModelFileError"


@pytest.mark.parametrize("count", [None, 0])
def test_experts_without_a_count(count: int | None, path: Path) -> None:
    """Llama is dense without it; others are not."""
    assert outcome(expert_model("llama", expert_count=count), path) == "ran"
    model = expert_model("llama", expert_count=count)
    experts = expert_model("qwen2moe").tensors
    model.tensors |= {name: t for name, t in experts.items() if "_exps" in name or "_inp." in name}
    assert outcome(model, path) == "UnsupportedError"
    assert outcome(expert_model("qwen2moe", expert_count=count), path) == "ModelFileError"


def test_a_count_without_experts(path: Path) -> None:
    model = expert_model("llama", expert_count=4, expert_used_count=2)
    assert outcome(model, path) == "UnsupportedError"  # of the dense tensors, which come first
    model.tensors = {
        name: t for name, t in model.tensors.items() if ".ffn_norm" in name or "ffn" not in name
    }
    assert outcome(model, path) == "ModelFileError"


def test_shared_experts_of_no_width(path: Path) -> None:
    """Granite has none then; Qwen's is as wide as `feed_forward_length`, half of these."""
    key = "expert_shared_feed_forward_length"
    for arch in ("granitemoe", "qwen2moe"):
        assert outcome(expert_model(arch, **{key: 0}), path) == "UnsupportedError"
    model = expert_model("granitemoe", **{key: 0})
    model.tensors = {name: t for name, t in model.tensors.items() if "shexp" not in name}
    assert outcome(model, path) == "ran"


@pytest.mark.native
@pytest.mark.parametrize("part", ["ffn_gate_inp.weight", "exp_probs_b.bias", "ffn_gate_inp.bias"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_routers_with_numbers_that_are_none(part: str, number: float, path: Path) -> None:
    """One is enough. Packing refuses it, and names the tensor."""
    arch = {"exp_probs_b.bias": "ernie4_5-moe", "ffn_gate_inp.bias": "gpt-oss"}.get(part)
    model = expert_model(arch or "qwen2moe")
    name = f"blk.1.{part}"
    old = model.tensors[name]
    values = np.frombuffer(old.data, np.float32).copy()
    values[-1] = number
    model.tensors[name] = Stored(old.shape, old.type, values.tobytes())
    with pytest.raises(ModelFileError, match=f"{name}.*NaN or infinite"):
        path.write_bytes(model.content)
        load_and_run(path)


@pytest.mark.native
@pytest.mark.parametrize("arch", ["qwen2moe", "gpt-oss", "ernie4_5-moe"])
def test_routers_whose_scores_overflow(arch: str, path: Path) -> None:
    """Scores of inf - inf: routes are in range, logits are not finite."""
    model = expert_model(arch)
    name = "blk.1.ffn_gate_inp.weight"
    old = model.tensors[name]
    values = np.full(old.shape, 3e38, np.float32)
    model.tensors[name] = Stored(old.shape, old.type, values.tobytes())
    assert outcome(model, path) == "ModelFileError"
