"""SmolLM3: the fourth layer of four rotates nothing."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder

CONFIG = "SmolLM3Config"
PAIRED = True
CASES = {
    "smollm3": Case(Tiny("smollm3", seed=1, n_layers=5)),
    "smollm3-untied": Case(Tiny("smollm3", seed=2, n_layers=4, tied=False, freq_base=2e6)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's."""
    return decoder(t, block)
