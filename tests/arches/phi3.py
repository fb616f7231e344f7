"""Phi-3: fused matrices, partial rotary embedding, LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import (
    Case,
    Filling,
    Tiny,
    decoder,
    hf_longrope,
    hf_rope,
    longrope_factors,
    norms,
)

CONFIG = "Phi3Config"
NAMES = {"ffn_up": "mlp.gate_up_proj"}  # rows: gate, then up
SPREAD = 0.1
LARGEST = {"n_layers": 1, "tied": False, "context": 512, "original_context": 64}

#: As in Phi-4-mini: 3 query heads per key head, 3/4 of a head rotated, LongRoPE, tied.
PHI4: dict[str, Any] = {
    "arch": "phi3", "dim": 192, "n_heads": 6, "n_kv_heads": 2, "n_rot": 24, "context": 512,
    "original_context": 64,
}  # fmt: skip
FACTOR = (("phi3.rope.scaling.attn_factor", 1.25),)

CASES = {
    "phi3": Case(Tiny("phi3", seed=6, tied=False)),
    "phi3-partial": Case(Tiny("phi3", seed=7, n_kv_heads=4, n_rot=12)),
    "phi3-window": Case(Tiny("phi3", seed=8, tied=False, window=24), 96),
    "phi3-longrope-short": Case(Tiny(seed=9, **PHI4), 60, context=64),
    "phi3-longrope-long": Case(Tiny(seed=29, **PHI4), 100, context=512),
    "phi3-longrope-factor": Case(Tiny(seed=50, window=48, extra=FACTOR, **PHI4), 100, context=512),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Queries, keys and values in one matrix, gate and up in one; LongRoPE's factors."""
    out = decoder(t, layer)
    if t.original_context is not None:
        out |= longrope_factors(t)
    return out


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    return {
        **norms(t.dim, "attn_norm"),
        "attn_qkv.weight": (t.q + 2 * t.kv, t.dim),
        "attn_output.weight": (t.dim, t.q),
        **norms(t.dim, "ffn_norm"),
        "ffn_up.weight": (2 * t.ffn, t.dim),
        "ffn_down.weight": (t.dim, t.ffn),
    }


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The window, and LongRoPE."""
    rope = hf_longrope(t, m) if t.original_context else hf_rope(t, m)
    rope["partial_rotary_factor"] = (t.n_rot or t.d_head) / t.d_head
    original = {"original_max_position_embeddings": t.original_context}
    return {
        "sliding_window": t.window or None,
        "rope_parameters": rope,
        **(original if t.original_context else {}),
    }
