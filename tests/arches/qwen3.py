"""Qwen 3: heads of another size than dim / n_heads, normed."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder, norms

CONFIG = "Qwen3Config"
CASES = {
    "qwen3": Case(Tiny("qwen3", seed=1, head_dim=32)),
    "qwen3-untied": Case(Tiny("qwen3", seed=2, tied=False, n_kv_heads=1, freq_base=1e6)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """A weight for the elements of a head."""
    return decoder(t, lambda t, i: block(t) | norms(t.d_head, "attn_q_norm", "attn_k_norm"))
