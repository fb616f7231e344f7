"""Nemotron: layer norms whose weights the converter has added 1 to, relu squared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import LAYER_EPS, Case, Filling, Tiny, decoder, layer_norms, mlp, qkvo

CONFIG = "NemotronConfig"
NAMES = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
PLUS_ONE = True

CASES = {"nemotron": Case(Tiny("nemotron", seed=1, n_rot=8))}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The head is never the embedding."""
    return decoder(t, layer, head="own") | layer_norms(t.dim, "output_norm")


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    attention = layer_norms(t.dim, "attn_norm") | qkvo(t, biases="qkvo")
    return attention | layer_norms(t.dim, "ffn_norm") | mlp(t, biases=True)


def metadata(t: Tiny) -> dict[str, Any]:
    """The norm's epsilon."""
    return LAYER_EPS | {"rope.scaling.type": "none"}


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Its name there, and the biases."""
    return {
        "norm_eps": m["attention.layer_norm_epsilon"],
        "attention_bias": True,
        "mlp_bias": True,
    }
