"""Qwen2-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts
from arches.common import Case, Filling, Tiny, decoder, hf_state, norms, qkvo

CONFIG = "Qwen2MoeConfig"
LARGEST = {"n_layers": 1}
NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
#: Without it, the shared expert has the weight 1.
SPARE = {"ffn_gate_inp_shexp.weight"}

CASES = {
    "qwen2moe": Case(Tiny("qwen2moe", seed=311)),
    "qwen2moe-wide": Case(Tiny("qwen2moe", seed=312, n_kv_heads=4, freq_base=1e6)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Biases of queries, keys and values; experts, and a shared one with a gate."""

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        out = norms(t.dim, "attn_norm", "ffn_norm") | qkvo(t, "qkv")
        out |= experts.stacked(t, experts.WIDTH) | experts.shared(t, experts.SHARED)
        return out | {"ffn_gate_inp_shexp.weight": (t.dim,)}

    return decoder(t, layer, head="own")


def metadata(t: Tiny) -> dict[str, Any]:
    """The widths of experts are keys of their own."""
    return experts.keys(
        t,
        expert_feed_forward_length=experts.WIDTH,
        expert_shared_feed_forward_length=experts.SHARED,
    )


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Weights are as the softmax gives them; all layers have experts."""
    return {
        "num_experts": m["expert_count"],
        "num_experts_per_tok": m["expert_used_count"],
        "moe_intermediate_size": m["expert_feed_forward_length"],
        "shared_expert_intermediate_size": m["expert_shared_feed_forward_length"],
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts have gate and up in one matrix; the shared expert's gate is a matrix of a row."""
    rest, stacked = experts.hf_stacked(weights)
    gates = {k: w[None] for k, w in rest.items() if k.endswith("gate_inp_shexp.weight")}
    return hf_state(t, rest | gates, NAMES) | stacked
