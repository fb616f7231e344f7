"""What a model of ONNX graphs will take, from its files alone: onnxruntime opens none of them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from edge.loading import Loading
from edge.onnx.files.folder import Folder, open_folder
from edge.onnx.run.budget import OnnxBudget
from edge.onnx.run.engine import config_of, loading_of

__all__ = ["plan"]

_MOST_CONTEXT = 1 << 24  # where the model names none


def plan(path: str | os.PathLike[str], **options: Any) -> tuple[dict[str, Any], OnnxBudget]:
    """The facts of `edge-run plan`, but for threads and speed, as JSON values, sizes in bytes; and
    what loading is held to.

    options: see `edge.loading.Loading`. Raises ModelFileError, UnsupportedError, ContextError,
    InputError for an option that is of GGUF models alone, MemoryBudgetError for a stated budget
    that is more than there is.
    """
    loading = loading_of(options)
    folder = open_folder(path)
    config = config_of(folder, loading.context)
    budget = OnnxBudget.draw_up(folder, config.n_context, loading)
    largest = _largest_context(folder, loading)
    position = 2 * folder.n_layers * folder.n_kv_heads * folder.head_dim
    n_bytes = sum(file.stat().st_size for file in folder.files)
    fitting = [largest] if largest and not budget.fits else []
    facts = {
        "model": os.fspath(path),
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
        "layouts": {},
        "compact": False,
        "options": [
            {
                "flags": f"--context {n}",
                "needed_bytes": OnnxBudget.draw_up(folder, n, loading).needed,
            }
            for n in fitting
        ],
        "rotary": None,
    }
    return facts, budget


def _largest_context(folder: Folder, loading: Loading) -> int | None:
    """With which the model fits; None: with none."""

    def fits(n: int) -> bool:
        return OnnxBudget.draw_up(folder, n, dataclasses.replace(loading, context=n)).fits

    low, high = 0, folder.context or _MOST_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low or None
