"""Architectures: logits against `transformers`, and metadata or tensors that are not right."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refgraph
import tiny
from arches import CASES, arch_of
from arches.common import Case, Tiny
from make_references import file_of, reference_of
from tiny import tensors, write_tiny

from edge.errors import ContextError, EdgeError, InputError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import Heads, Scale
from edge.models import architectures, build
from edge.models.common import DEFAULT_CONTEXT, Config


def write_case(path: Path, case: Case) -> Path:
    """The model of a reference case as a GGUF file."""
    return write_tiny(path, **vars(case.model))


def by_referee(path: Path, case: Case, **options: Any) -> np.ndarray:
    """(tokens, vocab) logits by numpy."""
    with GGUF.open(path) as file:
        shapes = {t.name: t.shape for t in file.tensors.values()}
        graph, _ = build(file.metadata, shapes, context=case.context)
        return refgraph.run(graph, refgraph.load_weights(file), case.tokens, **options)


def by_native(path: Path, case: Case) -> np.ndarray:
    """(tokens, vocab) logits by the engine."""
    from edge.engine.engine import Engine

    engine = Engine.load(path, context=case.context)
    try:
        return engine.run(engine.cache(), case.tokens.tolist(), logits="all")
    finally:
        engine.close()


#: Who runs it -> what it is held against: `transformers` in float32, or with a float16 cache.
RUNNERS: dict[str, tuple[Callable[[Path, Case], np.ndarray], str]] = {
    "referee": (by_referee, ""),
    "referee-f16-cache": (partial(by_referee, cache=np.float16), ".f16"),
    "native": (by_native, ".f16"),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name: str, runner: str, tmp_path: Path) -> None:
    case, (run, kind) = CASES[name], RUNNERS[runner]
    logits = run(write_case(tmp_path / "m.gguf", case), case)
    assert logits.shape == (case.n_tokens, case.model.vocab)
    difference = np.abs(logits[case.positions] - reference_of(name)[kind]).max()
    print(f"{name}, {runner}: max abs difference {difference:.1e}")
    assert difference < 1e-3


def test_every_architecture_has_a_reference() -> None:
    tested = {case.model.arch for case in CASES.values()}
    assert tested == set(architectures())
    assert {file_of(arch) for arch in tested} == set(file_of("any").parent.iterdir())


@pytest.mark.parametrize("arch", architectures())
def test_a_window_is_never_ignored(arch: str) -> None:
    """Whether or not the architecture's own models have one."""
    case = next(case for case in CASES.values() if case.model.arch == arch)
    metadata, shapes = described(**vars(case.model))
    graph, _ = build(metadata | {f"{arch}.attention.sliding_window": 16}, shapes)
    assert any(op.window == 16 for op in graph.attentions)


def test_referee_agrees_with_itself_in_float64(tmp_path: Path) -> None:
    case = CASES["phi3-longrope-long"]
    path = write_case(tmp_path / "m.gguf", case)
    exact = by_referee(path, case, dtype=np.float64)
    assert exact.dtype == np.float64
    assert np.abs(exact - by_referee(path, case)).max() < 1e-4


def test_longrope_sets_differ(tmp_path: Path) -> None:
    """The references would not notice a wrong set if both gave the same."""
    case = CASES["phi3-longrope-long"]
    path = write_case(tmp_path / "m.gguf", case)
    short = Case(case.model, case.n_tokens, context=64)
    assert np.abs(by_referee(path, short) - by_referee(path, case)).max() > 0.1


# --- What build makes of metadata and shapes, without a file -------------------------------------


def described(**options: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(metadata, shapes) of a tiny model, as a reader would give them."""
    t = Tiny(**options)
    metadata = {"general.architecture": t.arch} | tiny.metadata(t)
    return metadata, {name: w.shape for name, w in tensors(t).items()}


def built(
    change: dict[str, Any] | None = None, context: int | None = None, **options: Any
) -> tuple[Graph, Config]:
    """Build a tiny model; change: metadata key without its architecture -> value, None: absent."""
    metadata, shapes = described(**options)
    arch = metadata["general.architecture"]
    for key, value in (change or {}).items():
        metadata[f"{arch}.{key}"] = value
        if value is None:
            del metadata[f"{arch}.{key}"]
    return build(metadata, shapes, context=context, path="m.gguf")


def test_config_of_a_model() -> None:
    change = {
        "context_length": 8192,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.head_count_kv": None,  # as many as heads
        "rope.dimension_count": None,  # all of a head
    }
    graph, config = built(change, n_layers=3, n_kv_heads=4, head_dim=32)
    assert (config.n_layers, config.dim) == (3, 64)
    assert config.heads == (Heads(4, 4, 32),) * 3
    assert (config.n_context_train, config.n_context) == (8192, DEFAULT_CONTEXT)
    assert graph.dims[graph.output] == 288
    assert len(str(graph).splitlines()) == len(graph.ops)


@pytest.mark.parametrize("context, want", [(None, 256), (1, 1), (256, 256)])
def test_context_within_the_model(context: int | None, want: int) -> None:
    assert built(context=context)[1].n_context == want


def test_context_beyond_the_model() -> None:
    with pytest.raises(ContextError, match="made for 256") as caught:
        built(context=300)
    assert (caught.value.needed, caught.value.limit) == (300, 256)


@pytest.mark.parametrize("context", [0, -1])
def test_context_of_nothing(context: int) -> None:
    with pytest.raises(InputError, match="1 or more"):
        built(context=context)


@pytest.mark.parametrize(
    "context, factors", [(64, "rope_factors_short.weight"), (65, "rope_factors_long.weight")]
)
def test_context_decides_longrope(context: int, factors: str) -> None:
    graph, _ = built({"context_length": 512}, context, arch="phi3", original_context=64)
    (rope,) = graph.ropes
    assert rope.factors == factors
    assert rope.magnitude == pytest.approx(math.sqrt(1 + math.log(8) / math.log(64)))


@pytest.mark.parametrize("arch, n_layers", [("gemma2", 46), ("gemma3", 62)])
def test_scale_of_27b(arch: str, n_layers: int) -> None:
    """The largest Gemmas divide by the root of dim / n_heads, not of head_dim."""
    for n, scale in ((n_layers, 0.25), (n_layers - 1, 0)):
        graph, _ = built(arch=arch, n_layers=n, head_dim=32)
        assert {op.scale for op in graph.attentions} == {scale}


def test_layers_without_rotation() -> None:
    graph, _ = built(arch="smollm3", n_layers=8)
    assert sum(op.kind == "rope" for op in graph.ops) == 6
    graph, _ = built({"rope.scaling.finetuned": False}, arch="granite")
    assert not graph.ropes
    with pytest.raises(ModelFileError, match="true or false"):
        built({"rope.scaling.finetuned": 1}, arch="granite")


def test_old_minicpm_divides_its_logits() -> None:
    graph, _ = built({"logit_scale": None}, arch="minicpm", dim=64)
    assert isinstance(graph.ops[-1], Scale) and graph.ops[-1].factor == 4


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key(key: str) -> None:
    with pytest.raises(ModelFileError, match="missing") as caught:
        built({key: None})
    assert caught.value.field == f"llama.{key}"
    assert caught.value.path == "m.gguf"


@pytest.mark.parametrize("value", ["4", [4] * 3, True, 0, -4, 1.5, math.nan, math.inf, 2**31])
@pytest.mark.parametrize("key", [k for k in REQUIRED if not k.endswith("epsilon")])
def test_counts_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(ModelFileError) as caught:
        built({key: value})
    assert caught.value.field == f"llama.{key}"


BAD = {
    "heads that do not share": {"attention.head_count_kv": 3},
    "more key heads than heads": {"attention.head_count_kv": 8},
    "heads that do not divide the width": {"attention.head_count": 5},
    "heads of another size": {"attention.key_length": 32, "attention.value_length": 32},
    "negative epsilon": {"attention.layer_norm_rms_epsilon": -1e-5},
    "epsilon not a number": {"attention.layer_norm_rms_epsilon": math.nan},
    "negative window": {"attention.sliding_window": -1},
    "more layers than tensors of layers": {"block_count": 3},
    "more layers than tensors": {"block_count": 1000},
    "more layers than any model": {"block_count": 1025},
    "another width": {"embedding_length": 96},
    "odd rotated dimensions": {"rope.dimension_count": 15},
    "no rotated dimensions": {"rope.dimension_count": 0},
    "more rotated dimensions than a head": {"rope.dimension_count": 18},
    "rotated dimensions as text": {"rope.dimension_count": "16"},
    "base not a number": {"rope.freq_base": math.nan},
    "base of one": {"rope.freq_base": 1.0},
    "base as text": {"rope.freq_base": "10000"},
    "scaling by next to nothing": {"rope.scaling.factor": 1e-4},
    "scaling by a negative number": {"rope.scaling.factor": -4.0},
    "scaling by text": {"rope.scaling.type": "linear", "rope.scaling.factor": "4"},
    "another width of the feed-forward network": {"feed_forward_length": 64},
    "more tokens than rows": {"vocab_size": 289},
}


def test_many_layers_are_refused_soon() -> None:
    """A graph of this file would have a million ops."""
    metadata, shapes = described(arch="gemma3n")
    shapes |= {f"more.{i}": (1,) for i in range(1024)}
    metadata |= {"gemma3n.block_count": 1024, "gemma3n.altup.num_inputs": 16}
    metadata["gemma3n.activation_sparsity_scale"] = 0.0
    metadata["gemma3n.attention.sliding_window_pattern"] = [True] * 1024
    with pytest.raises(ModelFileError, match="more than 131072 operations"):
        build(metadata, shapes)


def test_values_of_too_many_numbers() -> None:
    """Gate and up are possible, each of them."""
    metadata, shapes = described()
    n = 1 << 24
    metadata["llama.feed_forward_length"] = n
    for name, shape in shapes.items():
        if "ffn_" in name and len(shape) == 2:
            shapes[name] = (64, n) if "down" in name else (n, 64)
    with pytest.raises(ModelFileError, match=r"matmul makes 33554432 numbers for a token"):
        build(metadata, shapes)


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_contradictory_metadata(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        built(change)


BAD_LONGROPE = {
    "no original length": {"rope.scaling.original_context_length": 0},
    "original length as text": {"rope.scaling.original_context_length": "64"},
    "magnitude as text": {"rope.scaling.attn_factor": "one"},
    "magnitude not a number": {"rope.scaling.attn_factor": math.nan},
    "magnitude of nothing": {"rope.scaling.attn_factor": 0.0},
    "another number of factors": {"rope.dimension_count": 8},
}


@pytest.mark.parametrize("change", BAD_LONGROPE.values(), ids=BAD_LONGROPE)
def test_contradictory_longrope(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        built(change, arch="phi3", original_context=64)


@pytest.mark.parametrize("name", ["gpt5", "common", "keys", "__init__", "", 7, ["llama"]])
def test_unknown_architecture(name: Any) -> None:
    metadata, shapes = described()
    metadata["general.architecture"] = name
    with pytest.raises(UnsupportedError, match=r"llama, .*phi3") as caught:
        build(metadata, shapes)
    assert caught.value.supported == tuple(architectures())


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "", 7])  # llama has no LongRoPE
def test_unknown_rope_scaling(kind: Any) -> None:
    with pytest.raises(UnsupportedError, match="scaling") as caught:
        built({"rope.scaling.type": kind})
    assert "linear" in caught.value.supported


@pytest.mark.parametrize(
    "key", ["block_count", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"]
)
def test_message_is_one_short_line(key: str) -> None:
    """Whatever the file holds where a number should be."""
    with pytest.raises(EdgeError) as caught:
        built({key: "1\n" * 1_000_000})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_keys_and_values_of_two_sizes() -> None:
    with pytest.raises(UnsupportedError, match="differ"):
        built({"attention.value_length": 32})


#: May be absent: tied output, no divisors; the short factors are not read for a long context.
SPARE = {"output.weight", "rope_freqs.weight", "rope_factors_short.weight"}


def largest(arch: str) -> dict[str, Any]:
    """Options of the model with every tensor that an architecture knows."""
    return {"arch": arch, "n_layers": 1, "tied": False} | getattr(arch_of(arch), "LARGEST", {})


@pytest.mark.parametrize("arch", architectures())
def test_missing_tensor(arch: str) -> None:
    spare = SPARE | getattr(arch_of(arch), "SPARE", set())
    metadata, complete = described(**largest(arch))
    for name in complete:
        shapes = {other: shape for other, shape in complete.items() if other != name}
        if name.endswith(".bias") or name.split(".", 2)[-1] in spare or name in spare:
            continue  # what is built without it may be another model, or none
        with pytest.raises(ModelFileError, match="missing") as caught:
            build(metadata, shapes)
        assert caught.value.field == f"tensor {name}"


@pytest.mark.parametrize("change", ["longer", "fewer dims", "more dims"])
@pytest.mark.parametrize("arch", architectures())
def test_wrong_shape(arch: str, change: str) -> None:
    metadata, right = described(**largest(arch))
    for name, shape in right.items():
        if name == "rope_factors_short.weight":  # not read for this context
            continue
        *rest, last = shape
        changed = {"longer": (*rest, last + 32), "fewer dims": (*rest,)}
        with pytest.raises(ModelFileError) as caught:
            build(metadata, right | {name: changed.get(change, (7, *shape))})
        assert caught.value.field == f"tensor {name}"


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_norm.bias", "blk.2.attn_norm.weight", "blk.0.attn_q_norm.weight", "surprise"],
)
def test_tensor_without_a_place(name: str) -> None:
    metadata, shapes = described()
    shapes[name] = (64,)
    with pytest.raises(UnsupportedError, match=name) as caught:
        build(metadata, shapes)
    assert caught.value.what == name


def test_scale_of_the_head() -> None:
    """As NVFP4's converter writes it."""
    t = Tiny(tied=False)
    weights = tensors(t) | {"output.scale": np.array([0.25], np.float32)}
    held = tiny.metadata(t) | {"general.architecture": t.arch}
    got, want = (
        refgraph.run(build(held, {n: w.shape for n, w in some.items()})[0], some, range(9))
        for some in (weights, tensors(t))
    )
    assert np.array_equal(got, want / 4)


def test_referee_with_the_kernels_activations(tmp_path: Path) -> None:
    """Int8 inputs move the logits a little."""
    case = CASES["llama"]
    path = write_case(tmp_path / "m.gguf", case)
    inexact = by_referee(path, case, quantised=list(tensors(case.model)))
    assert 1e-3 < np.abs(inexact - by_referee(path, case)).max() < 0.5
