"""Hunyuan-A13B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts
from arches.common import Case, Filling, Tiny, decoder, hf_state, norms, qkvo

CONFIG = "HunYuanMoEV1Config"
LARGEST = {"n_layers": 1, "tied": False}
NAMES = {
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
    "ffn_gate_inp": "mlp.gate.wg",
    "ffn_gate_shexp": "mlp.shared_mlp.gate_proj",
    "ffn_up_shexp": "mlp.shared_mlp.up_proj",
    "ffn_down_shexp": "mlp.shared_mlp.down_proj",
}

CASES = {
    "hunyuan-moe": Case(Tiny("hunyuan-moe", seed=331)),
    "hunyuan-moe-untied": Case(Tiny("hunyuan-moe", seed=332, tied=False, head_dim=32)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Norms of queries and keys; experts, and a shared one."""

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        out = norms(t.dim, "attn_norm", "ffn_norm") | qkvo(t)
        out |= norms(t.d_head, "attn_q_norm", "attn_k_norm")
        return out | experts.stacked(t, t.ffn) | experts.shared(t, t.ffn)

    return decoder(t, layer)


def metadata(t: Tiny) -> dict[str, Any]:
    """Files state a width of experts that their tensors do not have."""
    return experts.keys(
        t,
        expert_feed_forward_length=3072,
        expert_shared_feed_forward_length=t.ffn,
        expert_shared_count=1,
    )


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """How many experts."""
    return {"num_experts": m["expert_count"], "moe_topk": m["expert_used_count"]}


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts have gate and up in one matrix."""
    rest, stacked = experts.hf_stacked(weights)
    return hf_state(t, rest, NAMES) | stacked
