"""Gemma 1."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder

CONFIG = "GemmaConfig"
PLUS_ONE = True
CASES = {"gemma": Case(Tiny("gemma", seed=1, head_dim=32, n_kv_heads=1))}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's, always without an output head."""
    return decoder(t, block, head="tied")
