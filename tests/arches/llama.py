"""Llama, with and without Llama 3.1's divisors of frequencies."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder, yarn

CONFIG = "LlamaConfig"
PAIRED = True
SPREAD = 0.1
LARGEST = {"n_layers": 1, "tied": False, "rope_freqs": True}

LINEAR = (("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0))

# Where a key or value is halfway between two float16, a last bit of float32 decides. The seeds are
# such that this moves no kept logit by more than 3e-4, whoever computes it.
CASES = {
    "llama": Case(Tiny(seed=1)),
    "llama-untied": Case(Tiny(seed=2, tied=False, n_kv_heads=4, freq_base=500000.0)),
    "llama-one-kv-head": Case(Tiny(seed=23, n_kv_heads=1, head_dim=32, n_layers=3)),
    "llama-rope-freqs": Case(Tiny(seed=4, rope_freqs=True, context=4096), 100),
    "llama-linear": Case(Tiny(seed=45, extra=LINEAR)),
    "llama-yarn": Case(Tiny(seed=46, head_dim=32, extra=yarn("llama")), 100),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The plain block."""
    return decoder(t, block)
