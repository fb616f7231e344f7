"""Phi-2: layer norms, biases everywhere, a part of a head rotated, a head with a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import LAYER_EPS, Case, Filling, Tiny, decoder, layer_norms, mlp, qkvo

CONFIG = "PhiConfig"
NAMES = {
    "output_norm": "model.final_layernorm",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}

CASES = {"phi2": Case(Tiny("phi2", seed=1, n_rot=8, n_kv_heads=4))}


def tensors(t: Tiny) -> dict[str, Filling]:
    """One norm for attention and feed-forward network."""
    head = {"output.bias": (t.vocab,)}
    return decoder(t, layer, head="own") | layer_norms(t.dim, "output_norm") | head


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    return layer_norms(t.dim, "attn_norm") | qkvo(t, biases="qkvo") | mlp(t, biases=True)


def metadata(t: Tiny) -> dict[str, Any]:
    """The norm's epsilon."""
    return LAYER_EPS


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Its name there."""
    return {"layer_norm_eps": m["attention.layer_norm_epsilon"]}
