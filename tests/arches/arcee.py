"""Arcee: no gate."""

from __future__ import annotations

from arches.common import Case, Filling, Tiny, block, decoder, yarn

CONFIG = "ArceeConfig"
PAIRED = True
LARGEST = {"n_layers": 1, "tied": False, "rope_freqs": True}
CASES = {
    "arcee": Case(Tiny("arcee", seed=1, tied=False)),
    "arcee-yarn": Case(Tiny("arcee", seed=6, head_dim=32, extra=yarn("arcee", 20.0)), 100),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Llama's without the gate."""
    return decoder(t, layer)


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer."""
    return {name: shape for name, shape in block(t).items() if "gate" not in name}
