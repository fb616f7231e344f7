"""LoRA adapters: against PEFT, in every part that must know of them, and files that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora
import numpy as np
import pytest
import refgraph
from arches import CASES as MODELS
from arches.common import Case, Tiny
from fake_model import run
from lora import CASES, EVERYTHING, Lora, with_type, write_lora
from tiny import write_tiny

import edge
from edge import native
from edge.engine import describe
from edge.engine.engine import DescribedFile, Engine
from edge.errors import InputError, ModelFileError, SessionFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.loading import NativeOptions
from edge.models import build
from edge.session.sampler import SamplingOptions

GREEDY = SamplingOptions(temperature=0)
TINY = Tiny(seed=1, type="Q4_0")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama in Q4_0."""
    return write_tiny(tmp_path / "m.gguf", **vars(TINY))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of all its matrices and of its embedding."""
    return write_lora(tmp_path / "a.gguf", TINY, EVERYTHING)


def logits_of(path: Path, tokens: list[int], **options: Any) -> np.ndarray:
    """(tokens, vocab)."""
    engine = Engine.load(path, **options)
    try:
        logits = engine.run(engine.cache(), tokens, logits="all")
        assert logits is not None
        return logits
    finally:
        engine.close()


@pytest.mark.native
@pytest.mark.parametrize("name", CASES)
def test_logits_match_peft(name: str, tmp_path: Path) -> None:
    case, own = CASES[name]
    path = write_tiny(tmp_path / "m.gguf", **vars(case.model))
    file = write_lora(tmp_path / "a.gguf", case.model, own)
    logits = logits_of(path, case.tokens.tolist(), lora=file)[case.positions]
    plain = logits_of(path, case.tokens.tolist())[case.positions]
    with np.load(lora.REFERENCES) as kept:
        difference = np.abs(logits - kept[name]).max()
    print(f"{name}: max abs difference {difference:.1e}")
    assert difference < 1e-3 < 0.1 < np.abs(logits - plain).max()


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama"])  # its head is tied
def test_a_product_beside_is_a_product_merged(name: str, tmp_path: Path) -> None:
    case, own = CASES[name]
    path = write_tiny(tmp_path / "m.gguf", **vars(case.model))
    file = write_lora(tmp_path / "a.gguf", case.model, own)
    options = NativeOptions(lora=((str(file), -0.5),))
    with DescribedFile.open(path, options) as described, GGUF.open(path) as plain:
        graph = described.description.graph
        shapes = {t.name: t.shape for t in plain.tensors.values()}
        base, _ = build(plain.metadata, shapes)
        weights = refgraph.load_weights(plain)
    named = {f"lora0.{key}": data for key, data in lora.in_file(case.model, own).items()}
    merged = lora.merged(case.model, own, -0.5)
    double = {"dtype": np.float64}
    beside = refgraph.run(graph, {**weights, **named}, case.tokens, **double)
    assert np.abs(beside - refgraph.run(base, merged, case.tokens, **double)).max() < 1e-9


@pytest.mark.native
@pytest.mark.all_isas
@pytest.mark.parametrize("isa", native.isas())
def test_the_bits_are_the_same_everywhere(
    isa: str, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any instruction set, chunks and threads."""
    tokens = Case(TINY).tokens.tolist()
    wanted = logits_of(model, tokens, lora=adapter, threads=1)
    monkeypatch.setenv("EDGE_ISA", isa)
    for threads, chunk in ((1, 1), (2, 9), (3, 64)):
        engine = Engine.load(model, lora=adapter, threads=threads)
        cache = engine.cache()
        parts = [
            engine.run(cache, tokens[i : i + chunk], logits="all")
            for i in range(0, len(tokens), chunk)
        ]
        engine.close()
        assert np.array_equal(np.concatenate(parts), wanted)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("rank", [1, 5, 32])
def test_ranks_and_types(kind: str, rank: int, model: Path, tmp_path: Path) -> None:
    exact = Lora(EVERYTHING.targets, rank, alpha=1.0)
    files = [
        write_lora(tmp_path / f"{i}.gguf", TINY, own)
        for i, own in enumerate((exact, with_type(exact, kind)))
    ]
    tokens = Case(TINY).tokens.tolist()[:9]
    a, b = (logits_of(model, tokens, lora=file) for file in files)
    assert 0 < np.abs(a - b).max() < 0.3 * np.abs(a).max()


@pytest.mark.native
def test_scale_and_alpha(model: Path, tmp_path: Path) -> None:
    """Scale 0 is no adapter; alpha 0 is alpha = rank; two adapters of half the scale are one."""
    tokens = Case(TINY).tokens.tolist()[:9]
    own = Lora(("attn_q", "attn_v", "ffn_gate"), alpha=0)
    file = write_lora(tmp_path / "a.gguf", TINY, own)
    other = write_lora(tmp_path / "b.gguf", TINY, Lora(own.targets, alpha=own.rank))
    assert np.array_equal(logits_of(model, tokens, lora=(file, 0)), logits_of(model, tokens))
    whole = logits_of(model, tokens, lora=file)
    assert np.array_equal(whole, logits_of(model, tokens, lora=[(other, 1.0)]))
    both = logits_of(model, tokens, lora=[(file, 0.5), (str(other), 0.5)])
    assert np.abs(both - whole).max() < 2e-2  # the quantised input of the next matrix may differ
    assert np.abs(whole - logits_of(model, tokens)).max() > 0.1


@pytest.mark.native
def test_the_packed_file_serves_with_and_without(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    tokens = Case(TINY).tokens.tolist()[:9]
    logits_of(model, tokens)
    adapted = logits_of(model, tokens, lora=adapter)
    assert len(list((tmp_path / "cache").rglob("*.gguf"))) == 1
    describe.pack(model, tmp_path / "packed.gguf")
    assert np.array_equal(logits_of(tmp_path / "packed.gguf", tokens, lora=adapter), adapted)


def test_the_ledger_counts_it(model: Path, adapter: Path) -> None:
    with DescribedFile.open(model) as plain:
        needed = plain.ledger.needed
        assert "adapters" not in plain.ledger.parts
    options = NativeOptions(lora=((str(adapter), 1.0),))
    with DescribedFile.open(model, options) as described:
        parts = described.ledger.parts
        assert parts["adapters"] >= sum(d.nbytes for d in lora.in_file(TINY, EVERYTHING).values())
        assert described.ledger.needed >= needed + parts["adapters"]
        engine = described.start()
    resident = engine.resident()["weights"]
    engine.close()
    assert resident is None or resident <= parts["weights"] + parts["adapters"] + 2 * 4096


def test_sessions_belong_to_the_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    saved = tmp_path / "s.edge"
    with edge.load(model, lora=adapter) as adapted:
        session = adapted.session(sampling=GREEDY)
        text = session.generate("the world", max_tokens=4).text
        session.save(saved)
        more = session.generate(" and", max_tokens=4).text
        assert "1 x a.gguf" in adapted.engine.facts()["model"]
    with edge.load(model, lora=adapter) as again:
        resumed = edge.resume(saved, again)
        assert resumed.generate(" and", max_tokens=4).text == more and text
    for other in (None, (adapter, 0.5)):
        with (
            edge.load(model, lora=other) as wrong,
            pytest.raises(SessionFileError, match=r"a\.gguf"),
        ):
            edge.resume(saved, wrong)


def test_info_and_plan(model: Path, adapter: Path) -> None:
    with edge.load(model, lora=[(adapter, 0.5)]) as adapted:
        (facts,) = adapted.info()["adapters"]
    assert facts == {"path": str(adapter), "scale": 0.5, "tensors": 15, "rank": 4}
    result = run("plan", str(model), "--lora", f"{adapter}:0.5", "-t", "1")
    assert result.exit_code == 0, result.output
    assert any(line.startswith("adapters") for line in result.output.splitlines())


def test_the_command_line(model: Path, adapter: Path) -> None:
    def text(*options: str) -> str:
        common = ["complete", str(model), "-p", "the world", "-n", "8", "--temperature", "0", "-q"]
        result = run(*common, *options)
        assert result.exit_code == 0, result.output
        return result.stdout

    with edge.load(model, lora=(adapter, 2.0)) as adapted:
        wanted = adapted.session(sampling=GREEDY).generate("the world", max_tokens=8).text
    assert wanted.strip() in text("--lora", f"{adapter}:2")
    assert text("--lora", f"{adapter}:0") == text() != text("--lora", str(adapter))


# ---- files and options that are wrong ------------------------------------------------------------


def refused(model: Path, file: Path, error: type[Exception], match: str) -> None:
    """Loading raises this error, and leaves nothing open."""
    with pytest.raises(error, match=match):
        edge.load(model, lora=file)


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        ({"general.type": None}, InputError, "is no LoRA adapter"),
        ({"general.type": "model"}, InputError, "is no LoRA adapter"),
        ({"adapter.type": "other"}, UnsupportedError, "adapter of type 'other'"),
        ({"adapter.type": None}, UnsupportedError, "adapter of type None"),
        ({"general.architecture": "qwen2"}, InputError, "models of architecture 'qwen2'"),
        ({"adapter.lora.alpha": float("nan")}, ModelFileError, "out of range"),
        ({"adapter.lora.alpha": -1.0}, ModelFileError, "out of range"),
        ({"adapter.lora.alpha": "2"}, ModelFileError, "must be one number"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, UnsupportedError, "activated LoRA"),
    ],
)
def test_wrong_keys(
    keys: dict[str, Any], error: type[Exception], match: str, model: Path, tmp_path: Path
) -> None:
    refused(model, write_lora(tmp_path / "a.gguf", TINY, EVERYTHING, keys=keys), error, match)


Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({f"{Q}.lora_a": None}, ModelFileError, "lora_a' is missing"),
        ({f"{Q}.lora_b": None}, ModelFileError, "lora_b' is missing"),
        ({f"{Q}.lora_a": np.ones((4, 32), "f4")}, ModelFileError, "those for"),
        ({f"{Q}.lora_b": np.ones((64, 3), "f4")}, ModelFileError, "those for"),
        ({f"{Q}.lora_b": np.ones((32, 4), "f4")}, ModelFileError, "those for"),
        ({f"{Q}.lora_a": np.ones((2, 4, 64), "f4")}, UnsupportedError, "only matrices"),
        ({"output_norm.weight": np.ones(64, "f4")}, UnsupportedError, "neither the A nor the B"),
        ({f"{Q}.lora_c": np.ones((4, 64), "f4")}, UnsupportedError, "neither the A nor the B"),
        ({f"{Q}.lora_a": np.full((4, 64), np.nan, "f4")}, ModelFileError, "NaN or infinite"),
        (
            {"blk.7.attn_q.weight.lora_a": np.ones((4, 64), "f4"),
             "blk.7.attn_q.weight.lora_b": np.ones((64, 4), "f4")},
            ModelFileError, "no such tensor",
        ),
        (
            {"output_norm.weight.lora_a": np.ones((4, 64), "f4"),
             "output_norm.weight.lora_b": np.ones((64, 4), "f4")},
            UnsupportedError, "only matrices",
        ),
    ],
)  # fmt: skip
def test_wrong_tensors(
    changed: dict[str, np.ndarray | None],
    error: type[Exception],
    match: str,
    model: Path,
    tmp_path: Path,
) -> None:
    file = write_lora(tmp_path / "a.gguf", TINY, EVERYTHING, changed=changed)
    refused(model, file, error, match)


def test_experts_are_not_adapted(tmp_path: Path) -> None:
    t = MODELS["qwen3moe"].model
    path = write_tiny(tmp_path / "m.gguf", **vars(t))
    name = "blk.0.ffn_up_exps.weight"
    with GGUF.open(path) as file:
        n_experts, n, k = file.tensors[name].shape
    changed = {
        f"{name}.lora_a": np.ones((n_experts, 4, k), "f4"),
        f"{name}.lora_b": np.ones((n_experts, n, 4), "f4"),
    }
    own = write_lora(tmp_path / "a.gguf", t, Lora(("attn_q",)), changed=changed)
    refused(path, own, UnsupportedError, "only matrices")
    fine = write_lora(tmp_path / "b.gguf", t, Lora(("attn_q", "ffn_gate_inp")))
    assert np.isfinite(logits_of(path, [1, 2, 3], lora=fine)).all()


def test_a_matrix_with_a_scale_of_its_own(tmp_path: Path) -> None:
    t = MODELS["bitnet"].model
    path = write_tiny(tmp_path / "m.gguf", **vars(t))
    file = write_lora(tmp_path / "a.gguf", t, Lora(("attn_q",)))
    refused(path, file, UnsupportedError, "a scale of its own")


def test_keys_that_another_layer_keeps(tmp_path: Path) -> None:
    """The model's own tensors have no effect there, so nor has the adapter."""
    case = MODELS["gemma3n"]
    path = write_tiny(tmp_path / "m.gguf", **vars(case.model))
    with DescribedFile.open(path) as described:
        unused = [n for n in described.file.tensors if n not in described.description.graph.weights]
    assert any("attn_k" in name for name in unused)
    file = write_lora(tmp_path / "a.gguf", case.model, Lora(("attn_q", "attn_k")))
    assert np.isfinite(logits_of(path, [1, 2, 3], lora=file)).all()
    nothing = Lora((next(name for name in unused if "attn_k.weight" in name),))
    file = write_lora(tmp_path / "b.gguf", case.model, nothing)
    engine = Engine.load(path, lora=file)
    assert "adapters" not in engine.resident()
    engine.close()


def test_many_adapters_of_the_head(tmp_path: Path) -> None:
    t = Tiny(seed=1, tied=False, n_layers=1)
    path = write_tiny(tmp_path / "m.gguf", **vars(t))
    file = write_lora(tmp_path / "a.gguf", t, Lora(("output.weight",)))
    with DescribedFile.open(path, NativeOptions(lora=((str(file), 0.001),) * 1100)) as described:
        assert len(described.description.adapters) == 1100


def test_a_scale_that_is_too_large(model: Path, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a.gguf", TINY, Lora(EVERYTHING.targets, alpha=1e6))
    with pytest.raises(UnsupportedError, match="lower the scales of its adapters"):
        logits_of(model, [1, 2, 3], lora=(file, 1000.0))


def test_a_folder_is_no_adapter(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path, InputError, "is a folder: make a GGUF file")


def test_a_colon_in_the_name(model: Path, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a:1", TINY, EVERYTHING)
    result = run("plan", str(model), "--lora", str(file), "-t", "1")
    assert result.exit_code == 0, result.output


def test_a_model_is_no_adapter_and_an_adapter_no_model(model: Path, adapter: Path) -> None:
    refused(model, model, InputError, "is no LoRA adapter")
    with pytest.raises(UnsupportedError, match="name its model, and this file with --lora"):
        edge.load(adapter)


@pytest.mark.parametrize(
    "value",
    [3, ["a.gguf", 3, 4], ("a.gguf", "x", 1.5), ("a.gguf", float("nan")), ("a.gguf", True), [None]],
)
def test_wrong_options(value: Any, model: Path) -> None:
    with pytest.raises(InputError, match="lora"):
        edge.load(model, lora=value)


def test_a_missing_file_is_named(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path / "none.gguf", ModelFileError, "none.gguf")


def test_graphs_take_no_adapter(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    with pytest.raises(InputError, match="lora is an option of GGUF models"):
        edge.load(tmp_path / "graphs", lora=adapter)
