"""Seed-OSS: biases, another name for a norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import Case, Filling, Tiny, decoder, gated, norms, qkvo

CONFIG = "SeedOssConfig"
NAMES = {"post_attention_norm": "post_attention_layernorm"}
CASES = {
    "seed_oss": Case(Tiny("seed_oss", seed=1, tied=False, head_dim=32)),
    "seed_oss-tied": Case(Tiny("seed_oss", seed=2, freq_base=1e7)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Biases of queries, keys and values."""
    own = norms(t.dim, "attn_norm", "post_attention_norm") | qkvo(t, "qkv") | gated(t)
    return decoder(t, lambda t, i: own)


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing is dropped."""
    return {"attention_dropout": 0.0, "residual_dropout": 0.0}
