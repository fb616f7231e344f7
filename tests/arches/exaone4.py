"""EXAONE 4: norms behind attention and feed-forward network, and of the heads of q and k. The 32B,
which llama.cpp knows by its 64 layers, has windows in three of four layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import Case, Filling, Tiny, decoder, gated, norms, qkvo

CONFIG = "Exaone4Config"
NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LARGEST = {"rope_freqs": True}

LARGE: dict[str, Any] = {"n_layers": 64, "dim": 32, "n_heads": 2, "n_kv_heads": 1, "ffn": 32}
CASES = {
    "exaone4": Case(Tiny("exaone4", seed=1, rope_freqs=True, context=4096)),
    "exaone4-window": Case(Tiny("exaone4", seed=2, n_layers=4, window=20, tied=False)),
    "exaone4-64-layers": Case(Tiny("exaone4", seed=3, window=20, **LARGE)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The plain order of layers."""
    return decoder(t, layer)


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    heads = norms(t.d_head, "attn_q_norm", "attn_k_norm")
    return qkvo(t) | heads | gated(t) | norms(t.dim, "post_attention_norm", "post_ffw_norm")


def metadata(t: Tiny) -> dict[str, Any]:
    """Which layers have the window."""
    pattern = [i % 4 < 3 for i in range(t.n_layers)]
    return {"attention.sliding_window_pattern": pattern if t.window else None}


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The windows."""
    out: dict[str, Any] = {"sliding_window": m.get("attention.sliding_window")}
    kinds = ("full_attention", "sliding_attention")
    pattern = m.get("attention.sliding_window_pattern", [False] * t.n_layers)
    out["layer_types"] = [kinds[has_window] for has_window in pattern]
    return out
