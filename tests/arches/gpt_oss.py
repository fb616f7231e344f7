"""gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts
from arches.common import Case, Filling, Tiny, decoder, hf_rope, hf_state, norms, qkvo, yarn

CONFIG = "GptOssConfig"
LARGEST = {"n_layers": 2, "window": 24}
NAMES = {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"}
CASES = {
    "gpt-oss": Case(Tiny("gpt-oss", seed=371, window=24), 96),
    "gpt-oss-yarn": Case(
        Tiny("gpt-oss", seed=372, window=40, head_dim=32, n_layers=3, extra=yarn("gpt-oss")), 100
    ),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Biases everywhere, a sink for each head, experts."""

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        out = norms(t.dim, "attn_norm", "post_attention_norm") | qkvo(t, "qkvo")
        out["attn_sinks.weight"] = (t.n_heads,)
        return out | experts.stacked(t, experts.WIDTH, biases=True)

    return decoder(t, layer, head="own")


def metadata(t: Tiny) -> dict[str, Any]:
    """The width of an expert is a key of its own."""
    return experts.keys(t, expert_feed_forward_length=experts.WIDTH)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The even layers have the window; YaRN's ramp is not rounded."""
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(t.n_layers)]
    rope = hf_rope(t, m)
    return experts.hf_counts(m) | {
        "intermediate_size": m["expert_feed_forward_length"],
        "sliding_window": t.window,
        "layer_types": kinds,
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts' matrices are transposed, gate and up take turns; sinks have no `.weight`."""
    rest, out = dict(weights), {}
    for i in range(t.n_layers):
        blk, at = f"blk.{i}.", f"model.layers.{i}."
        parts = {n: rest.pop(f"{blk}ffn_{n}_exps.weight") for n in ("gate", "up", "down")}
        biases = {n: rest.pop(f"{blk}ffn_{n}_exps.bias") for n in ("gate", "up", "down")}
        both = np.stack([parts["gate"], parts["up"]], 2).reshape(experts.N_EXPERTS, -1, t.dim)
        out[f"{at}mlp.experts.gate_up_proj"] = both.swapaxes(1, 2)
        both = np.stack([biases["gate"], biases["up"]], 2).reshape(experts.N_EXPERTS, -1)
        out[f"{at}mlp.experts.gate_up_proj_bias"] = both
        out[f"{at}mlp.experts.down_proj"] = parts["down"].swapaxes(1, 2)
        out[f"{at}mlp.experts.down_proj_bias"] = biases["down"]
        out[f"{at}self_attn.sinks"] = rest.pop(f"{blk}attn_sinks.weight")
    return hf_state(t, rest, NAMES) | out
