"""Every architecture in both ONNX dialects: the referee's logits, or an error that names what the
dialect lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refgraph
from arches import CASES
from onnxrun import Runner, write_npu
from test_onnx_cpu import open_session
from tiny import metadata, write_tiny

from edge import models
from edge.errors import UnsupportedError
from edge.files.gguf import GGUF
from edge.onnx.export import cpu

N_TOKENS = 24
#: In float32 both compute the same; norms of random weights make some logits large.
CLOSE = 1e-3

#: What both dialects lack, by the case: experts.
LACKS = {
    name: "route"
    for name, case in CASES.items()
    if f"{case.model.arch}.expert_count" in metadata(case.model)
}
#: What dialect cpu lacks.
LACKS_CPU = (
    LACKS
    | dict.fromkeys(("gpt-oss", "gpt-oss-yarn"), "sinks of an attention")
    | dict.fromkeys(("gemma3n", "gemma3n-25-layers"), "a stack of matrices")
    | {"gemma4": "keys and values of another layer"}
)
#: What dialect npu lacks: all its layers must see and rotate alike, and norm before they rotate.
LACKS_NPU = LACKS | dict.fromkeys(
    (
        *("cohere2", "exaone4-window", "exaone4-64-layers", "gpt-oss", "gpt-oss-yarn"),
        *("gemma2", "gemma2-defaults", "gemma3", "gemma3n", "gemma3n-25-layers", "gemma4"),
        *("gemma4-experts", "gemma4-keys", "granite-nope", "hunyuan-dense", "hunyuan-dense-alpha"),
        *("hunyuan-moe", "hunyuan-moe-untied", "olmo2-windows", "smollm3", "smollm3-untied"),
        *("mistral3", "mistral3-magnitude"),
    ),
    "dialect npu",
)


def by_cpu(path: Path, folder: Path, tokens: list[int]) -> np.ndarray:
    """Logits of the last token, by the graph of dialect cpu."""
    folder.mkdir()
    with GGUF.open(path) as model:
        shapes = {t.name: t.shape for t in model.tensors.values()}
        graph, config = models.build(model.metadata, shapes, context=64, path=str(path))
        cpu.write(model, graph, config, folder, lambda op: None)
    session = open_session(folder / cpu.GRAPH)
    feeds: dict[str, Any] = {
        "input_ids": np.array([tokens]),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0][0, 0]


def by_npu(path: Path, folder: Path, tokens: list[int]) -> np.ndarray:
    """The same, by the graphs of dialect npu."""
    return Runner(write_npu(path, folder, 64, provider="cpu", chunk=8)).run(tokens)


def by_referee(path: Path, tokens: list[int]) -> np.ndarray:
    """The same, by numpy."""
    with GGUF.open(path) as model:
        shapes = {t.name: t.shape for t in model.tensors.values()}
        graph, _ = models.build(model.metadata, shapes, context=64, path=str(path))
        return refgraph.run(graph, refgraph.load_weights(model), tokens, dtype=np.float64)[-1]


DIALECTS: dict[str, tuple[Callable[[Path, Path, list[int]], np.ndarray], dict[str, str]]] = {
    "cpu": (by_cpu, LACKS_CPU),
    "npu": (by_npu, LACKS_NPU),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_logits_or_what_is_missing(name: str, dialect: str, tmp_path: Path) -> None:
    run, lacks = DIALECTS[dialect]
    path = write_tiny(tmp_path / "m.gguf", **vars(CASES[name].model))
    tokens = CASES[name].tokens[:N_TOKENS].tolist()
    if name in lacks:
        with pytest.raises(UnsupportedError) as caught:
            run(path, tmp_path / "out", tokens)
        assert caught.value.what == lacks[name]
        return
    found = run(path, tmp_path / "out", tokens)
    assert np.abs(found - by_referee(path, tokens)).max() < CLOSE
