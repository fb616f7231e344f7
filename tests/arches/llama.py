"""Llama, with and without Llama 3.1's divisors of frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts
from arches.common import Case, Filling, Tiny, block, decoder, gated, hf_state, yarn

PAIRED = True
SPREAD = 0.1
LARGEST = {"n_layers": 1, "tied": False, "rope_freqs": True}

MIXTRAL = (
    ("llama.expert_count", experts.N_EXPERTS),
    ("llama.expert_used_count", experts.N_USED),
)
LINEAR = (("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0))

# Where a key or value is halfway between two float16, a last bit of float32 decides. The seeds are
# such that this moves no kept logit by more than 3e-4, whoever computes it.
CASES = {
    "llama": Case(Tiny(seed=1)),
    "llama-untied": Case(Tiny(seed=2, tied=False, n_kv_heads=4, freq_base=500000.0)),
    "llama-one-kv-head": Case(Tiny(seed=23, n_kv_heads=1, head_dim=32, n_layers=3)),
    "llama-rope-freqs": Case(Tiny(seed=4, rope_freqs=True, context=4096), 100),
    "llama-linear": Case(Tiny(seed=45, extra=LINEAR)),
    "llama-experts": Case(Tiny(seed=351, tied=False, extra=MIXTRAL)),
    "llama-yarn": Case(Tiny(seed=46, head_dim=32, extra=yarn("llama")), 100),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The plain block, or one with experts."""

    def layer(t: Tiny, i: int) -> dict[str, Filling]:
        if not t.get("expert_count"):
            return block(t)
        rest = {name: shape for name, shape in block(t).items() if name not in gated(t)}
        return rest | experts.stacked(t, t.ffn)

    return decoder(t, layer)


def CONFIG(t: Tiny) -> str:
    """With experts it is Mixtral."""
    return "MixtralConfig" if t.get("expert_count") else "LlamaConfig"


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """How many experts."""
    return experts.hf_counts(m) if "expert_count" in m else {}


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts have gate and up in one matrix."""
    rest, stacked = experts.hf_stacked(weights)
    return hf_state(t, rest, {"ffn_gate_inp": "mlp.gate"}, is_paired=PAIRED) | stacked
