"""Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts
from arches.common import Case, Filling, Tiny, decoder, hf_state, norms, qkvo

CONFIG = "Qwen3MoeConfig"
LARGEST = {"n_layers": 1, "tied": False}

CASES = {
    "qwen3moe": Case(Tiny("qwen3moe", seed=301)),
    "qwen3moe-untied": Case(Tiny("qwen3moe", seed=302, tied=False, head_dim=32)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Norms of queries and keys, and experts."""

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        out = norms(t.dim, "attn_norm", "ffn_norm") | qkvo(t)
        out |= norms(t.d_head, "attn_q_norm", "attn_k_norm")
        return out | experts.stacked(t, experts.WIDTH)

    return decoder(t, layer)


def metadata(t: Tiny) -> dict[str, Any]:
    """The width of an expert is a key of its own."""
    return experts.keys(t, expert_feed_forward_length=experts.WIDTH)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Weights are normed; all layers have experts."""
    return {
        "num_experts": m["expert_count"],
        "num_experts_per_tok": m["expert_used_count"],
        "moe_intermediate_size": m["expert_feed_forward_length"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts have gate and up in one matrix."""
    rest, stacked = experts.hf_stacked(weights)
    return hf_state(t, rest, {"ffn_gate_inp": "mlp.gate"}) | stacked
