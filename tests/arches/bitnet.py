"""BitNet: norms before the last projection of each block, weights of three values, and perhaps a
scale for each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches.common import Case, Filling, Tiny, block, decoder, hf_state, norms

CONFIG = "BitNetConfig"
NAMES = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}
SPARE = {"attn_sub_norm.weight", "ffn_sub_norm.weight"}

_PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CASES = {
    "bitnet": Case(Tiny("bitnet", seed=1)),
    "bitnet-silu": Case(Tiny("bitnet", seed=2, n_kv_heads=4)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The head is always the embedding."""
    return decoder(t, layer, head="tied")


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer. A scale for each matrix in the odd layers."""
    out = block(t) | norms(t.q, "attn_sub_norm") | norms(t.ffn, "ffn_sub_norm")
    if i % 2:
        factors = np.random.default_rng(t.seed).uniform(0.5, 2, len(_PROJECTIONS))
        for name, factor in zip(_PROJECTIONS, factors, strict=True):
            out[f"{name}.scale"] = np.array([factor])
    return out


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The activation, which files do not name."""
    return {"hidden_act": "relu2" if t.n_kv_heads < t.n_heads else "silu"}


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scales are part of the matrices there."""
    plain = {}
    for name, w in weights.items():
        scale = weights.get(f"{name.removesuffix('.weight')}.scale")
        if not name.endswith(".scale"):
            plain[name] = w if scale is None else w * scale
    return hf_state(t, plain, NAMES)
