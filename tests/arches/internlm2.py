"""InternLM 2, whose code is not in transformers: Llama, once its matrix is split."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder

CONFIG = "LlamaConfig"
PAIRED = True
CASES = {"internlm2": Case(Tiny("internlm2", seed=1, freq_base=1e6))}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's."""
    return decoder(t, block, head="own")
