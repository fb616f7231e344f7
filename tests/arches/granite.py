"""Granite: four multipliers, with and without rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import Case, Filling, Tiny, block, decoder, hf_rope

CONFIG = "GraniteConfig"
PAIRED = True
LARGEST = {"n_layers": 1, "tied": False, "rope_freqs": True}
SCALES = {
    "embedding_scale": 12.0,
    "attention.scale": 0.4,
    "residual_scale": 0.22,
    "logit_scale": 0.125,
}
NOPE = (("granite.rope.scaling.finetuned", False),)
CASES = {
    "granite": Case(Tiny("granite", seed=1)),
    "granite-nope": Case(Tiny("granite", seed=2, tied=False, extra=NOPE)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's."""
    return decoder(t, block)


def metadata(t: Tiny) -> dict[str, Any]:
    """The multipliers."""
    return dict(SCALES)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The multipliers. Positions divided by 1e9 are as good as none."""
    nope = {"rope_type": "linear", "rope_theta": t.freq_base, "factor": 1e9}
    return {
        "rope_parameters": hf_rope(t, m) if m.get("rope.scaling.finetuned", True) else nope,
        "embedding_multiplier": m["embedding_scale"],
        "attention_multiplier": m["attention.scale"],
        "residual_multiplier": m["residual_scale"],
        "logits_scaling": m["logit_scale"],
    }
