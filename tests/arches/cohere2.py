"""Command R7B: as Command R, with windows in three of four layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches import command_r
from arches.common import Case, Filling, Tiny, block, decoder

CONFIG = "Cohere2Config"

CASES = {"cohere2": Case(Tiny("cohere2", seed=1, n_layers=5, window=20))}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The head is always the embedding; one norm for attention and feed-forward network."""
    out = decoder(t, block, head="tied")
    return {name: shape for name, shape in out.items() if "ffn_norm" not in name}


def metadata(t: Tiny) -> dict[str, Any]:
    """There is always a window."""
    return command_r.metadata(t) | {"attention.sliding_window": t.window or 20}


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The window, and what Command R has."""
    return {
        "layer_norm_eps": m["attention.layer_norm_epsilon"],
        "logit_scale": m["logit_scale"],
        "sliding_window": m["attention.sliding_window"],
    }
