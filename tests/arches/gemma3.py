"""Gemma 3: five layers of six with a window and a base of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import SANDWICH, Case, Filling, Tiny, block, decoder, hf_rope, norms

CONFIG = "Gemma3TextConfig"
NAMES = SANDWICH
PLUS_ONE = True
LINEAR = (("gemma3.rope.scaling.type", "linear"), ("gemma3.rope.scaling.factor", 8.0))
CASES = {
    "gemma3": Case(
        Tiny("gemma3", seed=6, head_dim=32, window=20, n_layers=7, freq_base=1e6, extra=LINEAR)
    ),
    "gemma3-full": Case(Tiny("gemma3", seed=2, tied=False)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Two more norms in each layer, and those of heads."""
    more = norms(t.dim, "post_attention_norm", "post_ffw_norm")
    more |= norms(t.d_head, "attn_q_norm", "attn_k_norm")
    return decoder(t, lambda t, i: block(t) | more)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """A rotary embedding for each kind of layer."""
    pattern = [t.window and (i + 1) % 6 for i in range(t.n_layers)]
    rope = {
        "full_attention": hf_rope(t, m),
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return {
        "sliding_window": t.window or 4096,
        "layer_types": [f"{'sliding' if swa else 'full'}_attention" for swa in pattern],
        "query_pre_attn_scalar": t.d_head,
        "rope_parameters": rope,
    }
