"""Qwen 2: biases of queries, keys and values."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder, qkvo, yarn

CONFIG = "Qwen2Config"
CASES = {
    "qwen2": Case(Tiny("qwen2", seed=1, tied=False, freq_base=1e6)),
    "qwen2-yarn": Case(Tiny("qwen2", seed=2, n_heads=6, dim=96, extra=yarn("qwen2", 4.0)), 100),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Biases in each layer."""
    return decoder(t, lambda t, i: block(t) | qkvo(t, "qkv"))
