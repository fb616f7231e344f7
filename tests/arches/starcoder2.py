"""StarCoder2: layer norms, biases everywhere, a window that files do not name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import LAYER_EPS, Case, Filling, Tiny, decoder, layer_norms, mlp, qkvo

CONFIG = "Starcoder2Config"
NAMES = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}

CASES = {
    "starcoder2": Case(Tiny("starcoder2", seed=1)),
    "starcoder2-window": Case(Tiny("starcoder2", seed=2, tied=False, window=20)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The plain order of norms."""
    return decoder(t, layer) | layer_norms(t.dim, "output_norm")


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    attention = layer_norms(t.dim, "attn_norm") | qkvo(t, biases="qkvo")
    return attention | layer_norms(t.dim, "ffn_norm") | mlp(t, biases=True)


def metadata(t: Tiny) -> dict[str, Any]:
    """The norm's epsilon."""
    return LAYER_EPS


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The epsilon's name there, and the window."""
    return {
        "norm_epsilon": m["attention.layer_norm_epsilon"],
        "sliding_window": m.get("attention.sliding_window"),
    }
