"""OLMoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts
from arches.common import Case, Filling, Tiny, decoder, hf_state, norms, qkvo

CONFIG = "OlmoeConfig"
LARGEST = {"n_layers": 1}

CASES = {
    "olmoe": Case(Tiny("olmoe", seed=321)),
    "olmoe-mha": Case(Tiny("olmoe", seed=322, n_kv_heads=4)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Norms over all queries and all keys, and experts."""

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        out = norms(t.dim, "attn_norm", "ffn_norm") | qkvo(t)
        out |= norms(t.q, "attn_q_norm") | norms(t.kv, "attn_k_norm")
        return out | experts.stacked(t, t.ffn)

    return decoder(t, layer, head="own")


def metadata(t: Tiny) -> dict[str, Any]:
    """The width of an expert is that of the feed-forward network."""
    return experts.keys(t)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Weights are as the softmax gives them."""
    return {
        "num_experts": m["expert_count"],
        "num_experts_per_tok": m["expert_used_count"],
        "norm_topk_prob": False,
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts have gate and up in one matrix."""
    rest, stacked = experts.hf_stacked(weights)
    return hf_state(t, rest, {"ffn_gate_inp": "mlp.gate"}) | stacked
