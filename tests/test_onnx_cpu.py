"""Dialect cpu against the numpy referee: every architecture, type, rotation and window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refgraph

from edge import models
from edge.errors import UnsupportedError
from edge.files.gguf import GGUF
from edge.onnx.export import cpu

Array = np.ndarray[Any, np.dtype[Any]]

TOKENS = np.random.default_rng(1).integers(0, 256, 20)
TYPES = ("F32", "Q4_0", "Q4_K", "IQ3_S", "Q6_K")
WHOLE = {"dim": 256, "ffn": 256}  # rows for blocks of 256


def both(key: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A key of attention, of any architecture."""
    return tuple((f"{arch}.attention.{key}", value) for arch in ("llama", "phi3"))


ROPES: dict[str, dict[str, Any]] = {
    "whole": {},
    "half": {"head_dim": 32, "n_rot": 16},
    "a quarter": {"head_dim": 32, "n_rot": 8},  # not for GroupQueryAttention
    "6 of 16": {"n_rot": 6},
    "window": {"window": 5},
    "a window of one layer": {"window": 5, "extra": both("sliding_window_pattern", (True, False))},
    "scale": {"extra": both("scale", 0.4)},
    "one head": {"n_heads": 2, "n_kv_heads": 1, "head_dim": 48},
}


class Exported:
    """A model and its graph of dialect cpu. level: accuracy of the products, None: as written."""

    def __init__(self, path: Path, folder: Path, context: int = 64, level: int | None = 0) -> None:
        folder.mkdir()
        with GGUF.open(path) as model:
            shapes = {t.name: t.shape for t in model.tensors.values()}
            self.graph, config = models.build(
                model.metadata, shapes, context=context, path=str(path)
            )
            cpu.write(model, self.graph, config, folder, lambda op: None)
            self.weights = refgraph.load_weights(model)
        self.file = folder / cpu.GRAPH
        if level is not None:
            set_level(self.file, level)
        self.session = open_session(self.file)
        self.context = context

    def referee(self, tokens: Sequence[int] | Array = TOKENS, **options: Any) -> Array:
        """Logits of all positions, (tokens, vocab)."""
        return refgraph.run(self.graph, self.weights, list(tokens), dtype=np.float64, **options)

    def run(self, steps: Sequence[int], *, shared: bool = True) -> Array:
        """Logits after each step of so many of TOKENS, (steps, vocab).

        shared: present is written into the buffer of past; else it becomes the next past.
        """
        out: list[Array] = []
        end = 0
        cache = self.empty(self.context if shared else 0)
        for n in steps:
            ids, end = TOKENS[None, end : end + n], end + n
            binding = self.session.io_binding()
            binding.bind_cpu_input("input_ids", ids)
            binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
            binding.bind_output("logits")
            for name, value in cache.items():
                binding.bind_ortvalue_input(name, value)
                present = name.replace("past_key_values", "present")
                if shared:
                    binding.bind_ortvalue_output(present, value)
                else:
                    binding.bind_output(present)
            self.session.run_with_iobinding(binding)
            logits, *presents = binding.get_outputs()
            assert logits.shape() == [1, 1, self.graph.dims[self.graph.output]]
            out.append(logits.numpy()[0, 0].copy())
            if not shared:
                cache = dict(zip(cache, presents, strict=True))
        return np.stack(out)

    def empty(self, n: int) -> dict[str, Any]:
        """Buffers of n positions."""
        import onnxruntime as ort

        return {
            value.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((1, value.shape[1], n, value.shape[3]), np.float32)
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values")
        }


def set_level(file: Path, level: int) -> None:
    """The accuracy level of all products: 0 is float32, 4 has activations of int8."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    onnx.save(model, file)


def open_session(file: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def exported(tmp_path: Path, tiny_gguf: Callable[..., Path]) -> Callable[..., Exported]:
    """exported(arch, context=..., level=..., **options of a tiny model)."""

    def make(arch: str, context: int = 64, level: int | None = 0, **options: Any) -> Exported:
        return Exported(tiny_gguf(arch, **options), tmp_path / "out", context, level)

    return make


def worst(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_logits_are_the_referees(
    exported: Callable[..., Exported], arch: str, kind: str, tied: bool
) -> None:
    model = exported(arch, type=kind, tied=tied, **WHOLE)
    assert worst(model.run([20])[0], model.referee()[-1]) < 1e-4


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_a_prompt_in_any_pieces(exported: Callable[..., Exported], arch: str, rope: str) -> None:
    model = exported(arch, **ROPES[rope])
    referee = model.referee()
    for steps in ([20], [1] * 20, [7, 1, 12]):
        for shared in (True, False):
            logits = model.run(steps, shared=shared)
            assert worst(logits, referee[np.cumsum(steps) - 1]) < 1e-4


@pytest.mark.parametrize("context", [64, 128])  # the short factors, the long
def test_longrope(exported: Callable[..., Exported], context: int) -> None:
    model = exported("phi3", context, original_context=64)
    assert worst(model.run([13, 7]), model.referee()[[12, 19]]) < 1e-4


def test_divisors_of_frequencies(exported: Callable[..., Exported]) -> None:
    model = exported("llama", rope_freqs=True)
    assert worst(model.run([13, 7]), model.referee()[[12, 19]]) < 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "IQ3_S", "Q6_K"])
@pytest.mark.parametrize("arch", ("llama", "phi3"))
def test_int8_activations_cost_what_ours_cost(
    exported: Callable[..., Exported], arch: str, kind: str
) -> None:
    model = exported(arch, level=None, type=kind, **WHOLE)
    exact = model.referee()
    matrices = [name for op in model.graph.ops for name in op.weights]
    ours = model.referee(quantised=matrices) - exact
    theirs = model.run([1] * 20) - exact
    assert 0 < theirs.std() < 1.5 * ours.std()


def test_only_the_last_token_goes_on_after_the_last_attention(
    exported: Callable[..., Exported],
) -> None:
    import onnx

    model = onnx.load(exported("llama").file, load_external_data=False)
    nodes = [node.op_type for node in model.graph.node]
    last = len(nodes) - nodes[::-1].index("GroupQueryAttention")
    assert nodes[last] == "Gather"
    assert nodes.count("Add") == 0  # norms add by themselves
    assert nodes.count("Identity") == 1  # logits: a cache goes through none


def test_heads_that_the_kernel_does_not_have(
    tmp_path: Path, tiny_gguf: Callable[..., Path]
) -> None:
    path = tiny_gguf("llama", head_dim=24)
    with pytest.raises(UnsupportedError, match="heads of 24: dialect cpu has multiples of 16"):
        Exported(path, tmp_path / "out")
