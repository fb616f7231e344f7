"""ERNIE 4.5 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts
from arches.common import Case, Filling, Tiny, decoder, gated, hf_state, norms, qkvo

CONFIG = "Ernie4_5_MoeConfig"
LARGEST = {"n_layers": 3, "tied": False}
NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_ARCH = "ernie4_5-moe"

CASES = {
    "ernie4_5-moe": Case(Tiny(_ARCH, seed=341, n_layers=3)),
    "ernie4_5-moe-every-other": Case(
        Tiny(
            _ARCH,
            seed=342,
            n_layers=4,
            tied=False,
            extra=((f"{_ARCH}.interleave_moe_layer_step", 2),),
        )
    ),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """A dense layer, then experts, whose choice has a bias, and a shared one."""
    step = t.get("interleave_moe_layer_step", 1)

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        out = norms(t.dim, "attn_norm", "ffn_norm") | qkvo(t)
        if i < 1 or (i + 1) % step:
            return out | gated(t)
        out |= experts.stacked(t, experts.WIDTH) | experts.shared(t, experts.SHARED)
        return out | {"exp_probs_b.bias": (experts.N_EXPERTS,)}

    return decoder(t, layer)


def metadata(t: Tiny) -> dict[str, Any]:
    """Which layers have experts, and their widths."""
    return experts.keys(
        t,
        expert_feed_forward_length=experts.WIDTH,
        expert_shared_feed_forward_length=experts.SHARED,
        expert_shared_count=experts.SHARED // experts.WIDTH,
        leading_dense_block_count=1,
        interleave_moe_layer_step=1,
    )


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have experts, and how many."""
    return {
        "moe_num_experts": m["expert_count"],
        "moe_k": m["expert_used_count"],
        "moe_intermediate_size": m["expert_feed_forward_length"],
        "moe_num_shared_experts": m["expert_shared_count"],
        "moe_layer_start_index": m["leading_dense_block_count"],
        "moe_layer_end_index": t.n_layers - 1,
        "moe_layer_interval": m["interleave_moe_layer_step"],
        "use_bias": False,
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts have gate and up in one matrix; the bias is a matrix of one row."""
    rest, stacked = experts.hf_stacked(weights)
    biases = {name: rest.pop(name) for name in [*rest] if name.endswith("exp_probs_b.bias")}
    for name, bias in biases.items():
        layer = name.split(".")[1]
        stacked[f"model.layers.{layer}.mlp.gate.moe_statics.e_score_correction_bias"] = bias[None]
    return hf_state(t, rest, NAMES) | stacked
