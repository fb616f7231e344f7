"""Runs an export of dialect npu with onnxruntime, as plainly as it can be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge import models
from edge.files.gguf import GGUF
from edge.onnx.export import npu

Array = np.ndarray[Any, np.dtype[Any]]

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def write_npu(path: Path, folder: Path, context: int = 32, **options: Any) -> Path:
    """Export a model of dialect npu."""
    folder.mkdir()
    with GGUF.open(path) as model:
        shapes = {t.name: t.shape for t in model.tensors.values()}
        graph, config = models.build(model.metadata, shapes, context=context, path=str(path))
        npu.write(model, graph, config, folder, npu.NpuOptions(**options), lambda op: None)
    return folder


def cpu_session(path: Path) -> Any:
    """On the CPU provider, products of quantised values as they are written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Runner:
    """One sequence of tokens. open: makes a session of chunk.onnx and of token.onnx."""

    def __init__(self, folder: Path, open: Callable[[Path], Any] = cpu_session) -> None:
        self.facts = json.loads((folder / "edge.json").read_text())
        self.embedding = cpu_session(folder / "embedding.onnx")
        self.sessions = {name: open(folder / f"{name}.onnx") for name in ("chunk", "token")}
        self.cache = {
            value.name: np.zeros(value.shape, TYPES[value.type])
            for value in self.sessions["token"].get_inputs()
            if value.name.startswith("past_")
        }
        self.length = 0

    def run(self, tokens: Sequence[int]) -> Array:
        """Logits of the last token, (vocab,). As few calls as may be, a chunk may be padded."""
        for first in range(0, len(tokens) - 1, self.facts["chunk"]):
            part = tokens[first : min(first + self.facts["chunk"], len(tokens) - 1)]
            self.step("chunk", [*part, *[0] * (self.facts["chunk"] - len(part))], len(part))
        return self.step("token", tokens[-1:], 1)["logits"][0, 0]

    def step(self, name: str, tokens: Sequence[int], n_real: int) -> dict[str, Array]:
        """One call; the first n_real tokens stay in the cache."""
        session, n = self.sessions[name], len(tokens)
        positions = np.minimum(np.arange(n) + self.length, self.facts["context"] - 1)
        hidden, cos, sin = self.embedding.run(
            ["hidden", "cos", "sin"],
            {"input_ids": np.array([tokens]), "position_ids": positions[None]},
        )
        values = {"hidden": hidden, "cos": cos, "sin": sin, "mask": self.mask(n), **self.cache}
        wanted = {value.name for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        made = session.run(outputs, {k: v for k, v in values.items() if k in wanted})
        found = dict(zip(outputs, made, strict=True))
        end = self.length + n_real
        for name, cache in self.cache.items():
            new = found[name.replace("past_", "new_")]
            if "key" in name:
                cache[..., self.length : end] = new[..., :n_real]
            else:
                cache[..., self.length : end, :] = new[..., :n_real, :]
        self.length = end
        return found

    def mask(self, n: int) -> Array:
        """Of n tokens, (1, 1, n, context + n)."""
        low = -3e4 if self.facts["provider"] == "qnn" else -1e30  # float16 there
        mask = np.full((n, self.facts["context"] + n), low, np.float32)
        for i in range(n):
            first = max(0, self.length + i + 1 - (self.facts["window"] or 1 << 30))
            mask[i, first : self.length] = 0
            own = self.facts["context"] - self.length  # column of position 0
            mask[i, own + max(first, self.length) : own + self.length + i + 1] = 0
        return mask[None, None]
