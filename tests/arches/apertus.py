"""Apertus: norms of the heads of q and k, xIELU with numbers of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches.common import Case, Filling, Tiny, decoder, hf_state, norms, qkvo

CONFIG = "ApertusConfig"
NAMES = {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"}

#: The activation's numbers, as they were trained: of even and of odd layers.
XIELU = {
    "alpha_p": [0.5, -1.25],
    "alpha_n": [0.25, 1.5],
    "beta": [0.5, 0.75],
    "eps": [-1e-6, -0.125],
}
LARGEST = {"rope_freqs": True}
CASES = {
    "apertus": Case(Tiny("apertus", seed=1)),
    "apertus-rope-freqs": Case(Tiny("apertus", seed=2, rope_freqs=True, context=4096)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The head is never the embedding."""
    return decoder(t, layer, head="own")


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    heads = norms(t.d_head, "attn_q_norm", "attn_k_norm")
    ffn: dict[str, Filling] = {"ffn_up.weight": (t.ffn, t.dim), "ffn_down.weight": (t.dim, t.ffn)}
    return norms(t.dim, "attn_norm", "ffn_norm") | qkvo(t, biases="qkvo") | heads | ffn


def metadata(t: Tiny) -> dict[str, Any]:
    """The activation's numbers."""
    return {f"xielu.{key}": by_layer(t, values) for key, values in XIELU.items()}


def by_layer(t: Tiny, values: list[float]) -> list[float]:
    """A number for each layer."""
    return [values[i % 2] for i in range(t.n_layers)]


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The biases."""
    return {"attention_bias": True}


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The activation's numbers are tensors there."""
    out = hf_state(t, weights, NAMES)
    for key, values in XIELU.items():
        for i, value in enumerate(by_layer(t, values)):
            shape = (1,) if key.startswith("alpha") else ()
            out[f"model.layers.{i}.mlp.act_fn.{key}"] = np.full(shape, value, np.float32)
    return out
