"""Gemma 2: a window in every other layer, caps that bite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arches.common import SANDWICH, Case, Filling, Tiny, block, decoder, norms

CONFIG = "Gemma2Config"
NAMES = SANDWICH
PLUS_ONE = True
CAPS = (("gemma2.attn_logit_softcapping", 2.0), ("gemma2.final_logit_softcapping", 3.0))
CASES = {
    "gemma2": Case(Tiny("gemma2", seed=1, head_dim=32, window=20, n_layers=3, extra=CAPS)),
    "gemma2-defaults": Case(Tiny("gemma2", seed=2, window=20, freq_base=1e6)),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """Two more norms in each layer."""
    more = ("post_attention_norm", "post_ffw_norm")
    return decoder(t, lambda t, i: block(t) | norms(t.dim, *more), head="tied")


def metadata(t: Tiny) -> dict[str, Any]:
    """The window is 4096 where there is none in the file."""
    return {"attention.sliding_window": t.window or 4096}


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """Caps, window and scale."""
    return {
        "attn_logit_softcapping": m.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.get("final_logit_softcapping", 30.0),
        "sliding_window": m["attention.sliding_window"],
        "query_pre_attn_scalar": t.d_head,
    }
