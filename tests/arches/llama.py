"""Llama, with and without Llama 3.1's divisors of frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches.common import Case, Filling, Tiny, block, decoder

CONFIG = "LlamaConfig"
PAIRED = True
SPREAD = 0.1
LARGEST = {"n_layers": 1, "tied": False, "rope_freqs": True}

#: Llama 3.1's rule, with lengths at which a head of 16 has all its three kinds of frequencies.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LINEAR = (("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0))

# Where a key or value is halfway between two float16, a last bit of float32 decides. The seeds are
# such that this moves no kept logit by more than 3e-4, whoever computes it.
CASES = {
    "llama": Case(Tiny(seed=1)),
    "llama-untied": Case(Tiny(seed=2, tied=False, n_kv_heads=4, freq_base=500000.0)),
    "llama-one-kv-head": Case(Tiny(seed=23, n_kv_heads=1, head_dim=32, n_layers=3)),
    "llama-rope-freqs": Case(Tiny(seed=4, rope_freqs=True, context=4096), 100),
    "llama-linear": Case(Tiny(seed=45, extra=LINEAR)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The plain block, and the divisors."""
    out = decoder(t, block)
    if t.rope_freqs:
        out["rope_freqs.weight"] = llama3_divisors(t)
    return out


def llama3_divisors(t: Tiny) -> np.ndarray:
    """What a converter writes as `rope_freqs`: (n_rot / 2,) divisors by Llama 3.1's rule."""
    n_rot = t.n_rot or t.d_head
    wave = 2 * np.pi * t.freq_base ** (np.arange(0, n_rot, 2) / n_rot)
    turns = LLAMA3["original_max_position_embeddings"] / wave  # in the original context
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (smooth + (1 - smooth) / LLAMA3["factor"])


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's rule is not in the metadata."""
    return {"rope_parameters": LLAMA3 | {"rope_theta": t.freq_base}} if t.rope_freqs else {}
