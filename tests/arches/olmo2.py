"""OLMo 2; OLMo 3 with windows and YaRN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import Case, Filling, Tiny, decoder, gated, hf_rope, norms, qkvo, yarn

CONFIG = "Olmo3Config"  # without windows, it is OLMo 2
NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
CASES = {
    "olmo2": Case(Tiny("olmo2", seed=1, n_kv_heads=4)),
    "olmo2-windows": Case(
        Tiny("olmo2", seed=8, n_layers=5, window=20, extra=yarn("olmo2"), freq_base=5e5), 100
    ),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Norms behind both parts, of all queries, of all keys."""
    return decoder(t, layer, head="own")


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    behind = norms(t.dim, "post_attention_norm", "post_ffw_norm")
    return qkvo(t) | norms(t.q, "attn_q_norm") | norms(t.kv, "attn_k_norm") | behind | gated(t)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Windows in three layers of four."""
    pattern = [t.window and (i + 1) % 4 for i in range(t.n_layers)]
    return {
        "sliding_window": t.window or 4096,
        "layer_types": [f"{'sliding' if swa else 'full'}_attention" for swa in pattern],
        "rope_parameters": {
            "full_attention": hf_rope(t, m),
            "sliding_attention": {"rope_type": "default", "rope_theta": t.freq_base},
        },
    }
