"""Granite with experts, and one that all tokens use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts, granite
from arches.common import Case, Filling, Tiny, decoder, hf_state, norms, qkvo

CONFIG = "GraniteMoeSharedConfig"
LARGEST = {"n_layers": 1, "tied": False}
NAMES = {
    "ffn_gate_inp": "block_sparse_moe.router",
    "ffn_up_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
CASES = {
    "granitemoe": Case(Tiny("granitemoe", seed=361)),
    "granitemoe-untied": Case(Tiny("granitemoe", seed=362, tied=False, n_kv_heads=4)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Experts, and a shared one."""

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        out = norms(t.dim, "attn_norm", "ffn_norm") | qkvo(t)
        return out | experts.stacked(t, t.ffn) | experts.shared(t, experts.SHARED)

    return decoder(t, layer)


def metadata(t: Tiny) -> dict[str, Any]:
    """Granite's multipliers; the width of an expert is that of the feed-forward network."""
    shared = {"expert_shared_feed_forward_length": experts.SHARED}
    return granite.SCALES | experts.keys(t, **shared)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Granite's, and how many experts."""
    shared = {"shared_intermediate_size": m["expert_shared_feed_forward_length"]}
    return granite.config(t, m) | experts.hf_counts(m) | shared


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts and the shared one have gate and up in one matrix."""
    rest, stacked = experts.hf_stacked(weights, "block_sparse_moe.experts")
    for name in [*rest]:
        if name.endswith("ffn_up_shexp.weight"):
            gate = rest.pop(name.replace("ffn_up", "ffn_gate"))
            rest[name] = np.concatenate([gate, rest[name]])
    return hf_state(t, rest, NAMES, is_paired=True) | stacked
