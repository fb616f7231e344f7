"""Metadata keys `<architecture>.*`: each is honoured, or changes nothing, or is refused by name."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ggufbytes as raw
import numpy as np
import pytest
import refgraph
from arches import CASES
from arches.common import Tiny
from fake_model import run
from ggufbytes import ARRAY, BOOL, I32, STRING, U8, U32, key
from test_models import built, described
from tiny import tensors, whole_key, write_tiny

from edge.errors import ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.ops import Rope
from edge.models import architectures, build
from edge.models.keys import EXPERTS, HARMLESS, NEUTRAL, READ, SAME

FACTOR, TYPE = "rope.scaling.factor", "rope.scaling.type"
LLAMA, PHI3 = {"arch": "llama"}, {"arch": "phi3", "original_context": 64}


def rope_with(change: dict[str, Any], **options: Any) -> Rope:
    """The rotary embedding of a tiny model with these keys."""
    graph, _ = built(change, **options)
    (rope,) = graph.ropes
    return rope


@pytest.mark.parametrize(
    "change, scale",
    [
        ({FACTOR: 4.0}, 0.25),
        ({FACTOR: 4.0, TYPE: "linear"}, 0.25),
        ({FACTOR: 4.0, TYPE: "none"}, 1),
        ({FACTOR: 0.0}, 1),
        ({TYPE: "linear"}, 1),
        ({"rope.scale_linear": 4.0}, 0.25),
        ({"rope.scale_linear": 4.0, TYPE: "linear"}, 0.25),
        ({"rope.scale_linear": 4.0, FACTOR: 2.0}, 0.5),
    ],
)
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_positions_are_scaled(arch: str, change: dict[str, Any], scale: float) -> None:
    assert rope_with(change, arch=arch).scale == scale


@pytest.mark.parametrize("options", [LLAMA, {"arch": "phi3"}, PHI3])
def test_attention_factor(options: dict[str, Any]) -> None:
    assert rope_with({"rope.scaling.attn_factor": 1.25}, **options).magnitude == 1.25


YARN = {TYPE: "yarn", FACTOR: 8.0, "rope.scaling.original_context_length": 4096}


@pytest.mark.parametrize(
    "change, magnitude",
    [
        ({}, 1 + 0.1 * math.log(8)),
        ({FACTOR: 0.5}, 1),
        ({"rope.scaling.yarn_log_multiplier": 1.0}, 1),
        (
            {"rope.scaling.yarn_log_multiplier": 0.5},
            (1 + 0.1 * math.log(8)) / (1 + 0.05 * math.log(8)),
        ),
        ({"rope.scaling.yarn_attn_factor": 1.5}, 1.5),
        ({"rope.scaling.attn_factor": 1.25}, 1.25 * (1 + 0.1 * math.log(8))),
    ],
)
def test_magnitude_of_yarn(change: dict[str, Any], magnitude: float) -> None:
    rope = rope_with(YARN | change, arch="llama", head_dim=128)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize("fast, slow, original", [(32.0, 1.0, 4096), (16.0, 2.0, 256), (8.0, 4, 9)])
def test_ramp_of_yarn(fast: float, slow: float, original: int) -> None:
    """As Peng et al. write it; it is computed by decimal logarithms."""
    change = {
        "rope.scaling.yarn_beta_fast": fast,
        "rope.scaling.yarn_beta_slow": slow,
        "rope.scaling.original_context_length": original,
    }
    rope = rope_with(YARN | change, arch="llama", head_dim=128)

    def pair(turns: float) -> float:
        return 128 * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10000))

    assert rope.ramp == (max(0, math.floor(pair(fast))), max(0, math.ceil(pair(slow))))
    assert rope.scale == 1 / 8


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow", "log_multiplier", "attn_factor"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", True, [1.0]])
def test_keys_of_yarn_that_are_no_numbers(key: str, value: Any) -> None:
    field = f"rope.scaling.yarn_{key}"
    with pytest.raises(ModelFileError) as caught:
        built(YARN | {field: value})
    assert caught.value.field == f"llama.{field}"


#: What llama.cpp (October 2026) makes of the 100 ids below: the likeliest token, its logarithm.
PEER = {
    "nothing": (3, {}, 98, -3.1998),
    "no type": (3, {FACTOR: 4.0}, 187, -3.5076),
    "the old key": (3, {"rope.scale_linear": 4.0}, 187, -3.5076),
    "attn_factor": (5, {"rope.scaling.attn_factor": 2.0}, 42, -2.9320),
}


@pytest.mark.parametrize("seed, change, token, logprob", PEER.values(), ids=PEER)
def test_as_llama_cpp_reads_them(
    seed: int, change: dict[str, Any], token: int, logprob: float, tmp_path: Path
) -> None:
    extra = tuple((f"llama.{key}", value) for key, value in change.items())
    path = write_tiny(tmp_path / "m.gguf", seed=seed, tied=False, extra=extra)
    ids = np.array([(7 * i * i + 3 * i + 11) % 280 for i in range(100)])
    with GGUF.open(path) as file:
        graph, _ = build(file.metadata, {t.name: t.shape for t in file.tensors.values()})
        logits = refgraph.run(graph, refgraph.load_weights(file), ids, cache=np.float16)[-1]
    found = logits - np.log(np.exp(logits).sum())
    assert found.argmax() == token and found[token] == pytest.approx(logprob, abs=2e-3)


CHANGES = {  # what llama and phi3 do not do -> a value that asks for it
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.key_length_swa": 32,
    "attention.max_alibi_bias": 8.0,
    "attention.recurrent_layers": [True, False],
    "attention.temperature_scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "embedding_length_out": 32,
    "embedding_scale": 12.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu",
    "logit_scale": 0.5,
    "nextn_predict_layers": 1,
    "residual_scale": 0.22,
    "rope.dimension_sections": [2, 3, 3, 0],
    "rope.freq_base_swa": 1e6,
    "rope.scaling.alpha": 1000.0,
    "tensor_data_layout": "other",
    "use_parallel_residual": True,
    "num_loops": 1,
    "ssm.state_size": 16,
}


@pytest.mark.parametrize("options", [LLAMA, PHI3], ids=["llama", "phi3"])
@pytest.mark.parametrize("key", CHANGES)
def test_refused_by_name(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=key) as caught:
        built({key: CHANGES[key]}, **options)
    assert "\n" not in str(caught.value) and key in caught.value.what


def test_unknown_keys_are_named() -> None:
    assert built({"rope.freq_base": 1e6})[1].keys.notes == ()
    (note,) = built({"a_key.of_tomorrow": 1, "another": "x\n"})[1].keys.notes
    assert "'llama.a_key.of_tomorrow', 'llama.another'" in note and "\n" not in note
    (note,) = built({f"key_{i}\n": i for i in range(1000)})[1].keys.notes
    assert note.endswith(" and 992 more") and "\n" not in note and len(note) < 500


@pytest.mark.parametrize("key", NEUTRAL)
def test_neutral_values_are_taken(key: str) -> None:
    plain = str(built()[0])
    for value in NEUTRAL[key]:
        assert str(built({key: value})[0]) == plain
        if not isinstance(value, str):
            assert str(built({key: [value] * 2})[0]) == plain


@pytest.mark.parametrize("value", [0, 1, "yes", [True, False]])
def test_true_is_not_one(value: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"attention\.causal"):
        built({"attention.causal": value})


def test_what_changes_nothing_is_taken() -> None:
    same = {
        "attention.key_length": 16,
        "attention.key_length_swa": 16,
        "attention.scale": float(np.float32(0.25)),
        "attention.sliding_window_pattern": 4,  # of a window that is not there
        "embedding_length_out": 64,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e6,
    }
    built(same | dict.fromkeys(HARMLESS, 7))


WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


@pytest.mark.parametrize("options", [LLAMA, PHI3], ids=["llama", "phi3"])
@pytest.mark.parametrize(
    "pattern, windows",
    [
        (None, [24, 24]),
        (0, [24, 24]),
        (True, [24, 24]),
        ([0, 0], [0, 0]),
        ([1, 0], [24, 0]),
        (1, [0, 0]),
        (2, [24, 0]),
        (3, [24, 24]),
        ([True, True], [24, 24]),
        ([True, False], [24, 0]),
        ([False, True], [0, 24]),
        ([False, False], [0, 0]),
    ],
)
def test_windows_of_some_layers(pattern: Any, windows: list[int], options: dict[str, Any]) -> None:
    graph, _ = built({WINDOW: 24, PATTERN: pattern}, **options)
    assert [op.window for op in graph.attentions] == windows


def test_patterns_of_windows_that_are_refused() -> None:
    for pattern in (False, "all", -1, [0, True, 2], [True], [False] * 3):
        with pytest.raises(ModelFileError) as caught:
            built({WINDOW: 24, PATTERN: pattern})
        assert caught.value.field == f"llama.{PATTERN}"


@pytest.mark.parametrize("options", [LLAMA, PHI3], ids=["llama", "phi3"])
def test_scale_of_scores(options: dict[str, Any]) -> None:
    for value, scale in ((0, 0), (0.25, 0), (float(np.float32(0.25)), 0), (0.5, 0.5), (1, 1)):
        graph, _ = built({"attention.scale": value}, **options)  # heads of 16: 0.25 is the usual
        assert {op.scale for op in graph.attentions} == {scale}
    for wrong in (-1.0, float("nan"), float("inf"), 1e4, "1", [1, 1]):
        with pytest.raises(ModelFileError) as caught:
            built({"attention.scale": wrong}, **options)
        assert caught.value.field == f"{options['arch']}.attention.scale"


@pytest.mark.parametrize("field, value", [("xielu.beta", 0.5), ("diffusion.shift_logits", True)])
def test_keys_beside_the_architecture(field: str, value: Any) -> None:
    metadata, shapes = described()
    with pytest.raises(UnsupportedError, match=field):
        build(metadata | {field: value}, shapes)


def test_quantization_version() -> None:
    metadata, shapes = described()
    build(metadata | {"general.quantization_version": 2}, shapes)
    with pytest.raises(UnsupportedError, match="quantization version 1"):
        build(metadata | {"general.quantization_version": 1}, shapes)


class Asked(Mapping[str, Any]):
    """Metadata that knows which keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_, self.asked = values, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.values_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def asked_by(t: Tiny) -> set[str]:
    """The keys that are asked for when a tiny model is built."""
    metadata, shapes = described(**vars(t))
    asked = Asked(metadata)
    build(asked, shapes)
    return asked.asked


def test_what_is_read_is_what_the_table_says() -> None:
    found = {"attention.layer_norm_epsilon"}  # of architectures with layer norms
    for arch in architectures():
        module = importlib.import_module(f"edge.models.{arch.replace('-', '_')}")
        tinies = [case.model for case in CASES.values() if case.model.arch == arch]
        asked = set[str]().union(*map(asked_by, tinies))
        of_arch = {key.removeprefix(f"{arch}.") for key in asked if key.startswith(f"{arch}.")}
        own = set(getattr(module, "KEYS", ())) - set(getattr(module, "IGNORED", ()))
        assert own <= of_arch | asked, f"{arch} claims to read {own - of_arch - asked}"
        found |= of_arch - own
    assert found - NEUTRAL.keys() - SAME.keys() - EXPERTS.keys() == READ


def test_the_table_names_a_key_once() -> None:
    parts = (READ, HARMLESS.keys(), NEUTRAL.keys(), SAME.keys())
    assert sum(map(len, parts)) == len(frozenset().union(*parts))


# ---- one value for each layer ----


@pytest.mark.parametrize(
    "key, value", [("attention.head_count", 4), ("attention.head_count_kv", 2),
                   ("feed_forward_length", 96)],
)  # fmt: skip
def test_a_number_for_each_layer(key: str, value: int) -> None:
    graph, config = built({key: [value] * 2})
    plain, same = built()
    assert str(graph) == str(plain) and vars(config) | {"keys": 0} == vars(same) | {"keys": 0}
    with pytest.raises(ModelFileError, match="the model needs") as error:
        built({key: [value, 2 * value], "attention.key_length": 16})
    assert error.value.field.startswith("tensor blk.1.")
    for wrong in ([], [value], [value] * 3, [str(value)] * 2, [[value]] * 2, [-1, -1]):
        with pytest.raises(ModelFileError) as error:
            built({key: wrong})
        assert error.value.field == f"llama.{key}"


# ---- arrays, when a file is opened ----


def write_keys(folder: Path, *keys: bytes) -> Path:
    """A file of keys alone."""
    path = folder / "keys.gguf"
    path.write_bytes(raw.gguf(list(keys)))
    return path


@pytest.mark.parametrize("kind", [U8, I32, BOOL])
def test_scores_that_are_no_floats(tmp_path: Path, kind: int) -> None:
    scores = key("tokenizer.ggml.scores", ARRAY, (kind, [1, 0]))
    with pytest.raises(ModelFileError, match="floats") as e:
        GGUF.open(write_keys(tmp_path, scores))
    assert e.value.field == "key tokenizer.ggml.scores"


def test_long_list_of_an_architecture(tmp_path: Path) -> None:
    """What has a number for each layer is not decoded when there are a million."""
    architecture = key("general.architecture", STRING, "llama")
    for n, fits in ((4096, True), (1 << 20, False)):
        counts = key("llama.attention.head_count", ARRAY, (U32, [1] * n))
        path = write_keys(tmp_path, architecture, counts)
        if fits:
            with GGUF.open(path) as file:
                assert len(file.metadata["llama.attention.head_count"]) == n
            continue
        with pytest.raises(ModelFileError, match="limit of 65536"):
            GGUF.open(path)


# ---- metadata against tensors ----


@pytest.mark.parametrize(
    "heads", [(6, 1), (2, 3), (8, 2)], ids=["same rows in all", "uneven", "more"]
)
def test_heads_unlike_the_tensors(heads: tuple[int, int]) -> None:
    change = {"attention.head_count": heads[0], "attention.head_count_kv": heads[1]}
    with pytest.raises(ModelFileError):
        built(change | {"attention.key_length": 16, "attention.value_length": 16})


@pytest.mark.parametrize(
    "wider, narrower", [("attn_k", "attn_v"), ("ffn_gate", "ffn_up")]
)  # together they are as many as they should be
def test_rows_that_belong_to_another_tensor(wider: str, narrower: str) -> None:
    metadata, shapes = described()
    for name, more in ((wider, 16), (narrower, -16)):
        n, k = shapes[f"blk.0.{name}.weight"]
        shapes[f"blk.0.{name}.weight"] = (n + more, k)
    with pytest.raises(ModelFileError) as caught:
        build(metadata, shapes)
    assert caught.value.field == f"tensor blk.0.{wider}.weight"


# ---- what is not built is found before a tensor is missed ----


def with_experts(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model of four experts."""
    out = {}
    for name, shape in shapes.items():
        dense = name.removesuffix(".weight")
        is_expert = dense.endswith(("ffn_up", "ffn_down"))
        out[f"{dense}_exps.weight" if is_expert else name] = (4, *shape) if is_expert else shape
    return out | {"blk.0.ffn_gate_inp.weight": (4, 64)}


@pytest.mark.parametrize("stated", [True, False])
def test_experts(stated: bool) -> None:
    """Of an architecture that has none."""
    metadata, shapes = described(arch="phi3")
    if stated:
        metadata |= {"phi3.expert_count": 4, "phi3.expert_used_count": 2}
    with pytest.raises(UnsupportedError, match="4 experts" if stated else "_exps"):
        build(metadata, with_experts(shapes))


def test_experts_that_are_not_there() -> None:
    with pytest.raises(UnsupportedError, match="8 experts"):
        built({"expert_count": 8}, arch="phi3")
    built({"expert_count": 0, "expert_used_count": 2})


FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}


@pytest.mark.parametrize("fused", FUSED)
def test_fused_or_apart(fused: str) -> None:
    """Matrices side by side are the same model."""
    weights = tensors(Tiny())
    metadata, _ = described()
    parts = [weights.pop(f"blk.0.{name}.weight") for name in FUSED[fused]]
    weights[f"blk.0.{fused}.weight"] = np.concatenate(parts)
    graph, _ = build(metadata, {name: w.shape for name, w in weights.items()})
    together = refgraph.run(graph, weights, [1, 2, 3])
    assert np.abs(together - refgraph.run(built()[0], tensors(Tiny()), [1, 2, 3])).max() < 1e-5


@pytest.mark.parametrize("name", ["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"])
def test_half_of_what_may_be_fused(name: str) -> None:
    """The tensor that is missing is named, not what the others would be if they were fused."""
    metadata, shapes = described()
    del shapes[f"blk.0.{name}.weight"]
    with pytest.raises(ModelFileError, match="missing") as caught:
        build(metadata, shapes)
    assert caught.value.field == f"tensor blk.0.{name}.weight"


@pytest.mark.parametrize(
    "layer", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
)
def test_biases_where_the_file_has_them(layer: str) -> None:
    metadata, shapes = described()
    n = shapes[f"blk.0.{layer}.weight"][0]
    graph, _ = build(metadata, shapes | {f"blk.0.{layer}.bias": (n,)})
    assert f"blk.0.{layer}.bias" in graph.weights
    with pytest.raises(ModelFileError) as caught:
        build(metadata, shapes | {f"blk.0.{layer}.bias": (n + 1,)})
    assert caught.value.field == f"tensor blk.0.{layer}.bias"


# ---- files that are no models ----


@pytest.mark.parametrize(
    "metadata, what",
    [
        (
            {"general.type": "adapter", "general.architecture": "llama"},
            "is a LoRA adapter: name its model",
        ),
        ({"adapter.type": "lora", "general.architecture": "llama"}, "is a LoRA adapter"),
        ({"general.type": "imatrix"}, "is an importance matrix"),
        ({"imatrix.chunk_count": 3}, "is an importance matrix"),
        (
            {"general.type": "mmproj", "general.architecture": "clip"},
            "projector of pictures or sound",
        ),
        ({"general.architecture": "clip"}, "projector of pictures or sound"),
        ({"general.architecture": "controlvector"}, "is a control vector"),
        ({"general.type": "nothing"}, "is no model: its general.type is 'nothing'"),
        ({"general.type": ["model"]}, "is no model"),
        ({}, "names no architecture"),
    ],
)
def test_what_is_no_model_is_called_what_it_is(metadata: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        build(metadata, {"blk.0.attn_q.weight.lora_a": (8, 64)})


def test_vocabulary_alone() -> None:
    metadata, _ = described()
    with pytest.raises(UnsupportedError, match="a vocabulary without weights"):
        build(metadata | {"general.type": "model"}, {})


@pytest.mark.parametrize("command", ["info", "plan", "complete", "perplexity"])
def test_commands_say_what_a_file_is(command: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((8, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "text").write_text("The world " * 200)
    more = {"complete": ["-p", "x"], "perplexity": ["--file", str(tmp_path / "text")]}
    result = run(command, str(path), *more.get(command, []))
    assert "is a LoRA adapter" in (result.stdout if command == "info" else result.stderr)
    assert result.exit_code == (0 if command == "info" else 1)


def test_info_shows_equal_layers_as_one_number(tmp_path: Path) -> None:
    extra = (("llama.attention.head_count", [4, 4]), ("llama.attention.head_count_kv", [2, 1]))
    path = write_tiny(tmp_path / "m.gguf", extra=extra)
    facts = json.loads(run("info", str(path), "--json").stdout)
    assert (facts["heads"], facts["kv_heads"]) == (4, [2, 1])
    assert "tensor blk.1.attn_k.weight" in facts["why_not"]


def test_info_shows_a_type_that_is_not_known(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", type="F32")
    content, name = path.read_bytes(), b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at] == 0
    path.write_bytes(content[:at] + bytes([26]) + content[at + 1 :])
    facts = json.loads(run("info", str(path), "--json").stdout)
    assert facts["types"]["I32"]["tensors"] == 1 and not facts["runs"]
    assert "blk.1.ffn_up.weight is I32, which is not built" in facts["why_not"]
    result = run("plan", str(path))
    assert result.exit_code == 1 and "I32" in result.stderr


#: Numbers that are 0, or beyond the checks of a plan, as the float32 that native ops have.
BEYOND = [
    ("gemma2", "attn_logit_softcapping", 1e6),
    ("gemma2", "final_logit_softcapping", 1e-300),
    ("gemma3", "final_logit_softcapping", 1e9),
    ("gemma3n", "final_logit_softcapping", 1e-50),
    ("gemma4", "final_logit_softcapping", 1e-50),
    ("granite", "attention.scale", 1e-50),
    ("olmoe", "expert_weights_scale", 1e-50),
    ("mistral3", "rope.scaling.attn_factor", 100.0),
    ("mistral3", "rope.scaling.yarn_attn_factor", 100.0),
    ("gemma3n", "activation_sparsity_scale", -1e5),
    ("apertus", "xielu.eps", 1.0),
]


@pytest.mark.parametrize("arch, key, value", BEYOND)
def test_numbers_beyond_what_ops_take(arch: str, key: str, value: float) -> None:
    metadata, shapes = described(arch=arch)
    metadata[whole_key(Tiny(arch), key)] = value
    if "yarn" in key:
        metadata["mistral3.rope.scaling.type"] = "yarn"
    with pytest.raises(ModelFileError, match="is out of range"):
        build(metadata, shapes)


@pytest.mark.parametrize("arch", ["mistral3", "gpt-oss"])
@pytest.mark.parametrize("original, turns", [(2**31 - 1, 1e-3), (2, 1e6)])
def test_ramp_of_yarn_is_within_a_head(arch: str, original: int, turns: float) -> None:
    """Whatever the numbers: a plan takes up to a million."""
    change = {
        "rope.freq_base": 1.001,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": turns,
        "rope.scaling.yarn_beta_slow": turns,
    }
    rope = rope_with(YARN | change, arch=arch, head_dim=256, window=4, n_layers=1)
    assert rope.ramp == (((255, 255), (0, 0))[original == 2])
