"""StableLM: layer norms, a part of a head rotated; the 12B in its own form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches.common import (
    LAYER_EPS,
    Case,
    Filling,
    Tiny,
    decoder,
    gated,
    hf_state,
    layer_norms,
    qkvo,
)

CONFIG = "StableLmConfig"
LARGEST = {"n_rot": 4}
SPARE = {"ffn_norm.weight"}  # without it, the layer is of the other form

#: As the 12B: attention and feed-forward network side by side, norms of the heads.
PARALLEL = (("stablelm.use_parallel_residual", True),)
CASES = {
    "stablelm": Case(Tiny("stablelm", seed=1, n_rot=4, n_kv_heads=4)),
    "stablelm-parallel": Case(Tiny("stablelm", seed=2, n_rot=8, extra=PARALLEL)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The head is never the embedding."""
    return decoder(t, layer, head="own") | layer_norms(t.dim, "output_norm")


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    if t.get("use_parallel_residual"):
        own: dict[str, Filling] = {
            "attn_q_norm.weight": (t.n_heads, t.d_head),
            "attn_k_norm.weight": (t.n_kv_heads, t.d_head),
        }
    else:
        own = layer_norms(t.dim, "ffn_norm")
    return layer_norms(t.dim, "attn_norm") | qkvo(t, biases="qkv") | own | gated(t)


def metadata(t: Tiny) -> dict[str, Any]:
    """The norm's epsilon; the converter writes true for files of either form."""
    return LAYER_EPS | {"use_parallel_residual": True}


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The form of the layers."""
    is_parallel = bool(t.get("use_parallel_residual"))
    return {
        "layer_norm_eps": m["attention.layer_norm_epsilon"],
        "use_qkv_bias": True,
        "use_parallel_residual": is_parallel,
        "qk_layernorm": is_parallel,
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each head's norm is a tensor there."""
    names = {"attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm"}
    out = {}
    for name, w in hf_state(t, weights, names).items():
        stem, _, suffix = name.rpartition(".")
        if stem.endswith(("q_layernorm", "k_layernorm")):
            out |= {f"{stem}.norms.{i}.{suffix}": row for i, row in enumerate(w)}
        else:
            out[name] = w
    return out
