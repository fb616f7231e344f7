"""MiniCPM, whose code is not in transformers: Granite with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import (
    Case,
    Filling,
    Tiny,
    block,
    decoder,
    hf_longrope,
    hf_rope,
    longrope_factors,
)

CONFIG = "GraniteConfig"
PAIRED = True
LARGEST = {"n_layers": 1, "tied": False, "context": 512, "original_context": 64}
CASES = {
    "minicpm": Case(Tiny("minicpm", seed=1)),
    "minicpm-longrope": Case(
        Tiny("minicpm", seed=2, context=512, original_context=64, tied=False), 100, context=512
    ),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's, and LongRoPE's factors."""
    return decoder(t, block) | (longrope_factors(t) if t.original_context else {})


def metadata(t: Tiny) -> dict[str, Any]:
    """The multipliers. The type says that there are factors, as llama.cpp wants it; and their
    magnitude is 1, as llama.cpp always has it, and as it is in MiniCPM 4.
    """
    return {
        "embedding_scale": 10.0,
        "residual_scale": 0.7,
        "logit_scale": 0.25,
        "rope.scaling.type": "longrope" if t.original_context else None,
        "rope.scaling.attn_factor": 1.0 if t.original_context else None,
    }


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The multipliers, and LongRoPE."""
    return {
        "embedding_multiplier": m["embedding_scale"],
        "attention_multiplier": t.d_head**-0.5,
        "residual_multiplier": m["residual_scale"],
        "logits_scaling": m["logit_scale"],
        "rope_parameters": hf_longrope(t, m) if t.original_context else hf_rope(t, m),
    }
