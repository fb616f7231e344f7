"""GLM-4: norms on both sides, half of a head rotated, gate and up in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches.common import Case, Filling, Tiny, decoder, hf_state, norms, qkvo

CONFIG = "Glm4Config"
NAMES = {
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_up": "mlp.gate_up_proj",  # rows: gate, then up
    "post_ffw_norm": "post_mlp_layernorm",
}

#: As GLM-4.1V: with the sections of positions in pictures.
SECTIONS = (("glm4.rope.dimension_sections", (1, 2, 1, 0)),)
CASES = {
    "glm4": Case(Tiny("glm4", seed=1, n_rot=8, tied=False)),
    "glm4-sections": Case(Tiny("glm4", seed=2, n_rot=8, extra=SECTIONS)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The plain order of layers."""
    return decoder(t, layer)


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    return {
        **norms(t.dim, *names),
        **qkvo(t, biases="qkv"),
        "ffn_up.weight": (2 * t.ffn, t.dim),
        "ffn_down.weight": (t.dim, t.ffn),
    }


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The biases."""
    return {"attention_bias": True}


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Neighbours are a pair there, and in files without sections."""
    if t.get("rope.dimension_sections"):
        weights = {
            name: neighbours(w, t) if ".attn_q." in name or ".attn_k." in name else w
            for name, w in weights.items()
        }
    return hf_state(t, weights, NAMES)


def neighbours(w: np.ndarray, t: Tiny) -> np.ndarray:
    """Rows of heads whose pairs are halves of the rotated rows -> whose pairs are neighbours."""
    heads = w.reshape(-1, t.d_head, *w.shape[1:]).copy()
    n = t.n_rot or t.d_head
    pairs = heads[:, :n].reshape(len(heads), 2, n // 2, *w.shape[1:])
    heads[:, :n] = pairs.swapaxes(1, 2).reshape(heads[:, :n].shape)
    return heads.reshape(w.shape)
