"""Ranges of activations, found on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refgraph
import tiny

from edge import models
from edge.errors import InputError, ModelFileError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.onnx.export import calibrate
from edge.onnx.export.calibrate import calibration_tokens
from edge.onnx.export.htp import Ranges
from edge.onnx.export.step import shape_of

TOKENS = [(11 * i * i + 5 * i) % 280 for i in range(70)]
Tinies = Callable[..., Path]


@pytest.fixture
def model(tiny_gguf: Tinies) -> Iterator[GGUF]:
    with GGUF.open(tiny_gguf()) as model:
        yield model


def graph_of(model: GGUF, context: int) -> Graph:
    shapes = {t.name: t.shape for t in model.tensors.values()}
    return models.build(model.metadata, shapes, context=context)[0]


def found(
    model: GGUF, folder: Path, tokens: Sequence[int], context: int = 128
) -> dict[str, Ranges]:
    graph = graph_of(model, context)
    shape = shape_of(graph, context, half_cache=True)
    return calibrate.calibrate(model, graph, shape, folder, tokens)


def expected(model: GGUF, texts: Sequence[Sequence[int]], context: int) -> dict[str, Ranges]:
    """Of the referee, which sees all activations of each text at once."""
    seen: dict[str, list[float]] = {}

    def matmul(r: Any, op: Any, x: Any) -> Any:
        y = plain(r, op, x)
        new = np.array([x.min(), -x.max(), y.min(), -y.max()])
        seen[op.output] = np.minimum(seen.get(op.output, np.inf), new)
        return y

    plain = refgraph.matmul
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refgraph, "matmul", matmul)
        for text in texts:
            refgraph.run(graph_of(model, context), refgraph.load_weights(model), text)
    return {name: np.array([a, -b, c, -d]) for name, (a, b, c, d) in seen.items()}


@pytest.mark.parametrize(
    ("arch", "options"),
    [("llama", {}), ("llama", {"window": 9}), ("phi3", {"n_rot": 8, "tied": False})],
)
def test_ranges_are_those_of_the_referee(
    arch: str, options: dict[str, Any], tiny_gguf: Tinies, tmp_path: Path
) -> None:
    with GGUF.open(tiny_gguf(arch, **options)) as model:
        ours, wanted = found(model, tmp_path, TOKENS), expected(model, [TOKENS], 128)
    assert ours.keys() == wanted.keys()
    for name, ranges in ours.items():
        np.testing.assert_allclose(np.ravel(ranges), wanted[name], atol=1e-4)


def test_a_long_text_begins_anew(
    model: GGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_CHUNK", 10)
    monkeypatch.setattr(calibrate, "_WINDOW", 30)
    wanted = expected(model, [TOKENS[:30], TOKENS[30:60], TOKENS[60:]], 128)
    for name, ranges in found(model, tmp_path, TOKENS).items():
        np.testing.assert_allclose(np.ravel(ranges), wanted[name], atol=1e-4)


def test_chunks_are_equal_and_what_is_left_is_left_out(
    model: GGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_CHUNK", 16)  # 50 tokens: 4 chunks of 12
    wanted = expected(model, [TOKENS[:48]], 128)
    for name, ranges in found(model, tmp_path, TOKENS[:50]).items():
        np.testing.assert_allclose(np.ravel(ranges), wanted[name], atol=1e-4)


@pytest.mark.parametrize(("n", "context"), [(1, 128), (5, 4), (70, 6)])
def test_short_texts_and_contexts(n: int, context: int, model: GGUF, tmp_path: Path) -> None:
    ranges = found(model, tmp_path, TOKENS[:n], context)
    assert all(np.isfinite(np.ravel(r)).all() and r.x.low <= r.x.high for r in ranges.values())


def test_no_activation_leaves_the_graph(
    model: GGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[tuple[str, int]] = []

    class Stage(calibrate._Stage):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            assert len([name for name in self.inputs if name.startswith("past_key")]) <= 1
            outputs.extend((v.name, v.shape[-1]) for v in self.session.get_outputs())

    monkeypatch.setattr(calibrate, "_Stage", Stage)
    found(model, tmp_path, TOKENS)
    assert [name for name, _ in outputs].count("ranges") == 2 * 2  # stages: 2 of a layer
    assert {dim for name, dim in outputs if name == "output"} == {64}
    kinds = {name.split(".")[0] for name, _ in outputs}
    assert kinds == {"ranges", "output", "new_key", "new_value"}


def test_weights_are_gone_afterwards(
    model: GGUF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(model, tmp_path, TOKENS)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(calibrate._Stage, "step", None)
    with pytest.raises(TypeError):
        found(model, tmp_path, TOKENS)
    assert not list(tmp_path.iterdir())


def test_a_model_that_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny.tensors

    def tensors(t: tiny.Tiny) -> dict[str, np.ndarray]:
        made = plain(t)
        large = made["blk.1.ffn_up.weight"].astype(np.float64) * 5e38
        return {**made, "blk.1.ffn_up.weight": large.astype(np.float32)}

    monkeypatch.setattr(tiny, "tensors", tensors)
    path = tiny.write_tiny(tmp_path / "large.gguf")
    with GGUF.open(path) as model, pytest.raises(ModelFileError, match="computes no numbers"):
        found(model, tmp_path, TOKENS)


def test_the_own_text(model: GGUF) -> None:
    tokens = calibration_tokens(model, None)
    assert len(tokens) > 400


def test_a_text_of_the_user(model: GGUF, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Hello and a world", encoding="utf-8")
    tokens = calibration_tokens(model, str(path))
    assert tokens == calibration_tokens(model, path)  # type: ignore[arg-type]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert calibration_tokens(model, str(path)) == tokens
    bad = {b"\xff\xfe\xfd": "is UTF-16", b"a\xfd": "is not UTF-8", b" \n": "no text"}
    for content, message in bad.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            calibration_tokens(model, str(path))
