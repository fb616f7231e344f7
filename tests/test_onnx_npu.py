"""Dialect npu: static graphs on the CPU provider, on the simulator of HTP and on OpenVINO."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import refgraph
from onnxrun import Runner, write_npu

import edge
from edge import models
from edge.errors import InputError, UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import Attention, Heads, Rotate
from edge.onnx.export import npu
from edge.onnx.export.blocks import form_of
from edge.onnx.export.step import shape_of
from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers.providers import PROVIDERS, RUNNERS, Target, choose
from edge.onnx.providers.sessions import open_graph

TOKENS = [(7 * i * i + 3 * i) % 280 for i in range(16)]
PROMPT = 10  # the rest goes through one by one
CHUNK = 4  # the last chunk of the prompt is padded

WIDE: dict[str, Any] = {"dim": 256, "n_kv_heads": 4, "ffn": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "all heads": ("llama", {"n_kv_heads": 4, "tied": False}),
    "one key head": ("llama", {"n_kv_heads": 1, "head_dim": 32}),
    "window": ("llama", {"window": 5}),
    "scale": ("llama", {"extra": (("llama.attention.scale", 0.4),)}),
    "divisors": ("llama", {"rope_freqs": True, "n_layers": 1}),
    "phi3": ("phi3", {}),
    "partial": ("phi3", {"n_rot": 8, "tied": False}),
    "longrope short": ("phi3", {"original_context": 64}),
    "longrope long": ("phi3", {"original_context": 16, "window": 7}),
}
QUANTISED = {"Q4_0": {}, "Q8_0": {}, "Q4_1": {}, "IQ3_S": WIDE, "Q6_K": WIDE, "Q4_K": WIDE}

Tinies = Callable[..., Path]


@pytest.fixture
def export(tiny_gguf: Tinies, tmp_path: Path) -> Callable[..., Path]:
    """export(arch, model options, **options of the export) -> its folder."""

    def make(arch: str = "llama", tiny: dict[str, Any] | None = None, **options: Any) -> Path:
        options = {"provider": "cpu", "chunk": CHUNK, **options}
        return write_npu(tiny_gguf(arch, **(tiny or {})), tmp_path / "export", **options)

    return make


class Referee:
    """logits: of the tokens from the prompt's last on, in float32; bounds: how far they may be
    from these with activations of int8, which is the error of rounding, carried through the model:
    the worst of 16 draws, and a half more.
    """

    def __init__(self, path: Path) -> None:
        with GGUF.open(path) as model:
            shapes = {t.name: t.shape for t in model.tensors.values()}
            self._graph, _ = models.build(model.metadata, shapes, context=32)
            self._weights = refgraph.load_weights(model)
            kinds = {t.type for t in model.tensors.values() if len(t.shape) == 2}
        forms = [form for form in map(form_of, kinds) if form]
        self._group = min((form.block for form in forms), default=0)
        self.logits = self._run()

    def _run(self, **options: Any) -> np.ndarray:
        return refgraph.run(self._graph, self._weights, TOKENS, **options)[PROMPT - 1 :]

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Of the mean square's root, of a single logit."""
        rng = np.random.default_rng(0)
        rounding = refgraph.any_rounding(rng, self._group)
        quantised = dict.fromkeys(self._weights, rounding)
        draws = [self._run(quantised=quantised) - self.logits for _ in range(16)]
        worst = max(rms(draw) for draw in draws), max(np.abs(draw).max() for draw in draws)
        return 1.5 * worst[0], 1.5 * worst[1]

    def require(self, found: np.ndarray) -> None:
        """They are those of float inputs, or of inputs in int8."""
        off = found - self.logits
        assert rms(off) < self.bounds[0] and np.abs(off).max() < self.bounds[1]


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).mean()))


def referee(path: Path) -> np.ndarray:
    """Logits of the tokens from the prompt's last on."""
    return Referee(path).logits


def logits(runner: Runner) -> np.ndarray:
    """The same of an export."""
    return np.stack([runner.run(TOKENS[:PROMPT]), *(runner.run([t]) for t in TOKENS[PROMPT:])])


def exact(folder: Path) -> None:
    """Let no product quantise its input: what is left is what the weights stand for."""
    for name in ("chunk", "token"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
        onnx.save(graph, folder / f"{name}.onnx")


@pytest.mark.parametrize("name", MODELS)
def test_floats_equal_the_referee(
    name: str, tiny_gguf: Tinies, export: Callable[..., Path]
) -> None:
    arch, tiny = MODELS[name]
    found = logits(Runner(export(arch, tiny)))
    assert np.abs(found - referee(tiny_gguf(arch, **tiny))).max() < 1e-4


def test_large_scores_are_masked(tiny_gguf: Tinies, export: Callable[..., Path]) -> None:
    tiny = {"type": "IQ3_S", **WIDE}  # random blocks, whose scores go beyond 10000
    folder = export("llama", tiny)
    exact(folder)
    with edge.load(folder, threads=1) as model:
        cache = model.engine.cache()
        for i in range(0, PROMPT, CHUNK):
            found = model.engine.run(cache, TOKENS[i : min(i + CHUNK, PROMPT)])
    assert found is not None
    assert np.abs(found[-1] - referee(tiny_gguf("llama", **tiny))[0]).max() < 1e-3


@pytest.mark.parametrize("arch", ("llama", "phi3"))
@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_stand_for_what_the_file_says(
    kind: str, arch: str, tiny_gguf: Tinies, export: Callable[..., Path]
) -> None:
    tiny = {"type": kind, **QUANTISED[kind]}
    folder, wanted = export(arch, tiny), Referee(tiny_gguf(arch, **tiny))
    wanted.require(logits(Runner(folder)))
    exact(folder)
    spread = wanted.logits.std()
    assert np.abs(logits(Runner(folder)) - wanted.logits).max() < 1e-4 * max(1, spread)


@pytest.mark.parametrize(("form", "most"), [("float16", 0.01), ("int8", 0.2)])
@pytest.mark.parametrize("provider", ["cpu", "qnn"])
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_forms_of_htp(
    arch: str, provider: str, form: str, most: float, tiny_gguf: Tinies, export: Any
) -> None:
    found = logits(Runner(export(arch, weights=form, provider=provider)))
    assert np.abs(found - referee(tiny_gguf(arch))).max() < most


def test_chunks_leave_what_single_tokens_leave(export: Callable[..., Path]) -> None:
    folder = export("phi3", {"window": 3})
    chunks, steps = Runner(folder), Runner(folder)
    chunks.run(TOKENS)
    for token in TOKENS:
        steps.run([token])
    for name, cache in chunks.cache.items():
        np.testing.assert_allclose(cache, steps.cache[name], atol=1e-5)


@pytest.mark.parametrize("provider", RUNNERS)
def test_graphs_are_static_and_plain(provider: str, export: Callable[..., Path]) -> None:
    folder = export(provider=provider, weights=None, tiny={"type": "Q8_0"})
    for name, n in (("chunk", CHUNK), ("token", 1)):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        kinds = {(node.domain, node.op_type) for node in model.graph.node}
        contrib = {kind for domain, kind in kinds if domain}
        assert contrib == ({"MatMulNBits"} if PROVIDERS[provider].weights[0] == "blocks" else set())
        assert (("", "RMSNormalization") in kinds) == (provider == "qnn")
        shapes = {v.name: dims(v) for v in [*model.graph.input, *model.graph.output]}
        assert shapes["mask"] == [1, 1, n, 32 + n]
        assert shapes["past_key.0"] == [1, 2, 16, 32] and shapes["new_key.1"] == [1, 2, 16, n]
        assert ("logits" in shapes, "past_key.1" in shapes) == (n == 1, n == 1)
        made = onnx.shape_inference.infer_shapes(model).graph.value_info
        assert all(1 <= len(dims(v)) <= 4 and 0 not in dims(v) for v in made if not is_const(v))


def dims(value: Any) -> list[int]:
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def is_const(value: Any) -> bool:
    """Scales of products and the like: scalars."""
    return not value.type.tensor_type.shape.dim


def test_no_weight_is_written_as_float32(tiny_gguf: Tinies, export: Callable[..., Path]) -> None:
    tiny = {"type": "Q8_0", "tied": False, "vocab": 2048}
    with GGUF.open(tiny_gguf("llama", **tiny)) as model:
        n = sum(t.shape[0] * t.shape[1] for t in model.tensors.values() if len(t.shape) == 2)
    folder = export("llama", tiny, provider="qnn", weights="int8")
    embedding = 2048 * 64 * (1 + 4 / 32)
    assert (folder / npu.DATA).stat().st_size < n - 2048 * 64 + embedding + 50 * 4096


def test_edge_json(export: Callable[..., Path]) -> None:
    found = json.loads((export("phi3", {"window": 9}) / "edge.json").read_text())
    assert found == {
        "format": 1,
        "dialect": "npu",
        "provider": "cpu",
        "weights": "blocks",
        "name": "tiny phi3",
        "architecture": "phi3",
        "context": 32,
        "chunk": CHUNK,
        "window": 9,
        "n_layers": 2,
        "n_kv_heads": 2,
        "head_dim": 16,
        "n_vocab": 288,
        "bos_token_id": 285,
        "eos_token_ids": [285, 287],
    }


def test_graphs_share_their_weights(export: Callable[..., Path]) -> None:
    folder = export(provider="qnn", weights="float16")
    places = []
    for name in ("chunk", "token"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        stored = [t for t in model.graph.initializer if t.external_data]
        places.append({t.name: [(e.key, e.value) for e in t.external_data] for t in stored})
    assert places[0].items() < places[1].items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "tpu"}, "one of cpu, qnn, openvino, coreml"),
        ({"provider": "openvino", "weights": "int8"}, "openvino takes blocks, float16"),
        ({"chunk": 1}, "from 2"),
        ({"chunk": 64}, "the context has 32"),
        ({"weights": "int8", "calibration": "/nowhere"}, "/nowhere: No such file"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], message: str, export: Callable[..., Path]
) -> None:
    with pytest.raises(InputError, match=message):
        export(**options)


def test_weights_beyond_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    tensors = tiny.tensors
    large = {"blk.1.ffn_down.weight": np.float32(1e6)}
    monkeypatch.setattr(
        tiny, "tensors", lambda t: {k: v * large.get(k, 1) for k, v in tensors(t).items()}
    )
    path = tiny.write_tiny(tmp_path / "large.gguf", type="BF16")
    with pytest.raises(UnsupportedError, match=r"blk\.1\.ffn_down\.weight .* export int8 weights"):
        write_npu(path, tmp_path / "export", provider="qnn", weights="float16", chunk=CHUNK)


@pytest.mark.parametrize(
    "change",
    [{"window": 3}, {"scale": 0.5}, {"heads": Heads(4, 1, 16)}, {"layer": 0}],
)
def test_layers_that_differ(change: dict[str, Any], tiny_gguf: Tinies) -> None:
    with GGUF.open(tiny_gguf()) as model:
        shapes = {t.name: t.shape for t in model.tensors.values()}
        graph: Graph = models.build(model.metadata, shapes)[0]
    i, op = max((i, op) for i, op in enumerate(graph.ops) if isinstance(op, Attention))
    graph.ops[i] = dataclasses.replace(op, **change)
    with pytest.raises(UnsupportedError, match="layers differ"):
        shape_of(graph, 32)


def test_keys_that_are_not_rotated(tiny_gguf: Tinies) -> None:
    with GGUF.open(tiny_gguf(n_layers=1)) as model:
        shapes = {t.name: t.shape for t in model.tensors.values()}
        graph = models.build(model.metadata, shapes)[0]
    i, op = next((i, op) for i, op in enumerate(graph.ops) if isinstance(op, Rotate))
    graph.ops[i] = dataclasses.replace(op, n_heads=4)
    with pytest.raises(UnsupportedError, match="not rotated alike"):
        shape_of(graph, 32)


def on(target: Target) -> Callable[[Path], Any]:
    """What opens graphs there, whole."""

    def open(path: Path) -> Any:
        opened = open_graph(OnnxFile.read(path), target)
        assert opened.partition.whole
        return opened.session

    return open


def steps_alike(folder: Path, target: Target, most: float, tie: float = 0) -> None:
    """A prompt and 8 tokens more, on a provider and on the CPU, which chooses the tokens.

    most: difference of a logit, in their spread; tie: of the best two, that either may win.
    """
    here, there = Runner(folder), Runner(folder, on(target))
    tokens = TOKENS[:PROMPT]
    for _ in range(9):
        wanted, found = here.run(tokens), there.run(tokens)
        assert np.abs(found - wanted).max() < most * max(1, wanted.std())
        assert wanted[found.argmax()] >= wanted.max() - tie
        tokens = [int(wanted.argmax())]


@pytest.mark.htp
@pytest.mark.parametrize("form", PROVIDERS["qnn"].weights)
@pytest.mark.parametrize("name", ["llama", "all heads", "partial", "window"])
def test_on_the_simulator_of_htp(name: str, form: str, export: Callable[..., Path]) -> None:
    arch, tiny = MODELS[name]
    folder = export(arch, {**tiny, "type": "Q8_0"}, provider="qnn", weights=form)
    exact(folder)
    steps_alike(folder, choose("qnn", "qnn", threads=1, soc="sm8650"), 0.03)


@pytest.mark.htp
@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_on_the_simulator_of_htp(kind: str, export: Callable[..., Path]) -> None:
    """4-bit blocks stay 4 bits wide there, those with an offset too."""
    tiny = {"type": kind, **QUANTISED[kind]}
    folder = export("llama", tiny, provider="qnn", weights="blocks")
    exact(folder)
    steps_alike(folder, choose("qnn", "qnn", threads=1, soc="sm8650"), 0.03, 0.02)


@pytest.mark.openvino
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_blocks_on_openvino(
    arch: str, kind: str, tiny_gguf: Tinies, export: Callable[..., Path]
) -> None:
    """It quantises inputs where the CPU has VNNI, and multiplies floats elsewhere."""
    tiny = {"type": kind, **QUANTISED[kind]}
    folder = export(arch, tiny, provider="openvino")
    target = choose("openvino", "openvino", threads=1)
    Referee(tiny_gguf(arch, **tiny)).require(logits(Runner(folder, on(target))))


@pytest.mark.openvino
@pytest.mark.parametrize("form", ["blocks", "float16"])  # of floats: they stay what they are
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_floats_on_openvino(
    arch: str, form: str, tiny_gguf: Tinies, export: Callable[..., Path]
) -> None:
    folder = export(arch, provider="openvino", weights=form)
    found = logits(Runner(folder, on(choose("openvino", "openvino", threads=1))))
    most = {"blocks": 1e-4, "float16": 0.01}[form]
    assert np.abs(found - referee(tiny_gguf(arch))).max() < most
