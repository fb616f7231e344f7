"""Command R: one layer norm without a bias, logits that are scaled; Command R+ has norms of the
heads, which llama.cpp reads in models of 64 layers and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import LAYER_EPS, Case, Filling, Tiny, decoder, gated, norms, qkvo

CONFIG = "CohereConfig"
LARGEST = {"head_dim": 16}
SPARE = {"attn_q_norm.weight"}  # without it, no head has a norm

#: As Command R+.
PLUS: dict[str, Any] = {"n_layers": 64, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "ffn": 32}
CASES = {
    "command-r": Case(Tiny("command-r", seed=1)),
    "command-r-plus": Case(Tiny("command-r", seed=2, **PLUS)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The head is always the embedding."""
    return decoder(t, layer, head="tied")


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    out = norms(t.dim, "attn_norm") | qkvo(t) | gated(t)
    if has_head_norms(t):
        out["attn_q_norm.weight"] = (t.n_heads, t.d_head)
        out["attn_k_norm.weight"] = (t.n_kv_heads, t.d_head)
    return out


def has_head_norms(t: Tiny) -> bool:
    """As llama.cpp has it; and in models of fewer layers, that the test need not read 64."""
    return t.n_layers >= 64 or t.head_dim is not None


def metadata(t: Tiny) -> dict[str, Any]:
    """The norm's epsilon, and the scale of the logits."""
    return LAYER_EPS | {"logit_scale": 0.25, "rope.scaling.type": "none"}


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The same."""
    return {
        "layer_norm_eps": m["attention.layer_norm_epsilon"],
        "logit_scale": m["logit_scale"],
        "use_qk_norm": has_head_norms(t),
    }
