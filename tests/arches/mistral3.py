"""Ministral 3: YaRN with keys of its own, queries that grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import Case, Filling, Tiny, block, decoder, hf_rope, yarn

CONFIG = "Ministral3Config"
PAIRED = True
LARGEST = {"n_layers": 1, "tied": False, "rope_freqs": True}
OWN = {
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.scaling.yarn_beta_slow": 2.0,
    "rope.scaling.yarn_log_multiplier": 1.0,
    "attention.temperature_scale": 0.1,
}
EXTRA = yarn("mistral3", 16.0, 16)
LESS = (*EXTRA, ("mistral3.rope.scaling.yarn_log_multiplier", 0.5))
CASES = {
    "mistral3": Case(Tiny("mistral3", seed=1, head_dim=32, extra=EXTRA, freq_base=500.0), 100),
    "mistral3-magnitude": Case(Tiny("mistral3", seed=2, extra=LESS, tied=False), 100),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's."""
    return decoder(t, block)


def metadata(t: Tiny) -> dict[str, Any]:
    """Keys of YaRN and of the temperature."""
    return dict(OWN)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The same in transformers."""
    rope = hf_rope(t, m) | {
        "beta_fast": m["rope.scaling.yarn_beta_fast"],
        "beta_slow": m["rope.scaling.yarn_beta_slow"],
        "mscale": 1.0,
        "mscale_all_dim": m["rope.scaling.yarn_log_multiplier"],
        "llama_4_scaling_beta": m["attention.temperature_scale"],
    }
    return {"rope_parameters": rope, "sliding_window": None}
