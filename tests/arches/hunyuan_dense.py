"""Hunyuan, dense: its base grows with "alpha"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import Case, Filling, Tiny, block, decoder, norms

CONFIG = "HunYuanDenseV1Config"
NAMES = {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
ALPHA = 1000.0
EXTRA = (("hunyuan-dense.rope.scaling.type", "none"), ("hunyuan-dense.rope.scaling.factor", 1.0))
CASES = {
    "hunyuan-dense": Case(Tiny("hunyuan-dense", seed=1, head_dim=32, tied=False)),
    "hunyuan-dense-alpha": Case(
        Tiny(
            "hunyuan-dense",
            seed=1,
            head_dim=32,
            freq_base=10000.0 * ALPHA ** (32 / 30),
            extra=EXTRA,
        )
    ),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """A weight for the elements of a head."""
    return decoder(t, lambda t, i: block(t) | norms(t.d_head, "attn_q_norm", "attn_k_norm"))


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Alpha, by its own name."""
    if t.freq_base == 10000.0:
        return {}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": ALPHA, "factor": 1.0}
    return {"rope_parameters": rope}
