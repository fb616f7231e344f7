"""Command R7B: as Command R, with windows in three of four layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.command_r import metadata, tensors
from arches.common import Case, Tiny

CONFIG = "Cohere2Config"
LARGEST = {"window": 20}

CASES = {"cohere2": Case(Tiny("cohere2", seed=1, n_layers=5, window=20))}


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The window, and what Command R has."""
    return {
        "layer_norm_eps": m["attention.layer_norm_epsilon"],
        "logit_scale": m["logit_scale"],
        "sliding_window": m["attention.sliding_window"],
    }


__all__ = ["CASES", "CONFIG", "LARGEST", "config", "metadata", "tensors"]
