"""The facts of `edge-run plan` for ONNX graphs, from the files alone, without onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge.onnx.run.budget import OnnxLedger
from edge.onnx.run.engine import DescribedFolder

__all__ = ["plan"]

_MOST_CONTEXT = 1 << 24  # for a model that states none


def plan(described: DescribedFolder) -> dict[str, Any]:
    """The facts of `edge-run plan` except for threads and speed, as JSON values; sizes in bytes."""
    folder, config, budget = described.folder, described.config, described.ledger
    largest = _largest_context(described)
    position = 2 * folder.n_layers * folder.n_kv_heads * folder.head_dim
    n_bytes = sum(file.stat().st_size for file in folder.files)
    fitting = [largest] if largest and not budget.fits else []
    return {
        "model": described.path,
        "file_bytes": n_bytes,
        "whole_bytes": n_bytes,
        "complete": True,
        "fits": budget.fits,
        "budget_bytes": budget.budget,
        "budget_stated": budget.is_stated,
        "needed_bytes": budget.needed,
        "parts": {name.replace(" ", "_"): size for name, size in budget.parts.items()},
        "context": config.n_context,
        "context_trained": config.n_context_train,
        "sessions": budget.sessions,
        "kv": folder.dtype,
        "kv_types": {
            folder.dtype: {
                "bytes_per_token": position * np.dtype(folder.dtype).itemsize,
                "largest_context": largest,
            }
        },
        "kv_groups": [
            {
                "layers": list(range(folder.n_layers)),
                "window": 0,
                "bytes_per_token": position * np.dtype(folder.dtype).itemsize,
                "bytes": budget.parts["keys and values"],
            }
        ],
        "layouts": {},
        "compact": False,
        "options": [
            {
                "flags": f"--context {n}",
                "needed_bytes": OnnxLedger.draw_up(folder, n, described.options).needed,
            }
            for n in fitting
        ],
        "rotary": None,
    }


def _largest_context(described: DescribedFolder) -> int | None:
    """The largest context with which the model fits; None: there is none."""
    folder = described.folder

    def fits(n: int) -> bool:
        return OnnxLedger.draw_up(folder, n, described.options).fits

    low, high = 0, folder.context or _MOST_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low or None
