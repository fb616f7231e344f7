"""Folders of each layout that edge itself writes, small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge.onnx.export.export import Recipe, export


def write_cpu(path: Path, folder: Path, context: int | None = None, *, shared: bool = True) -> Path:
    """Dialect cpu: as onnxruntime-genai has it. shared: past and present are one buffer."""
    export(path, folder, Recipe("cpu", context=context))
    config = folder / "genai_config.json"
    text = config.read_text()
    assert '"past_present_share_buffer": true' in text
    if not shared:
        config.write_text(text.replace('_buffer": true', '_buffer": false'))
    return folder


def write_static(path: Path, folder: Path, context: int = 128, **options: Any) -> Path:
    """Dialect npu, for the CPU provider, in float32 where the weights are."""
    options = {"ep": "cpu", "weights": "blocks", "chunk": 8} | options
    export(path, folder, Recipe("npu", context=context, **options))
    return folder
