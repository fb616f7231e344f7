"""ERNIE 4.5, dense."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder

CONFIG = "Ernie4_5Config"
CASES = {
    "ernie4_5": Case(Tiny("ernie4_5", seed=1, head_dim=32)),
    "ernie4_5-untied": Case(Tiny("ernie4_5", seed=2, tied=False, freq_base=5e5)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's."""
    return decoder(t, block)
