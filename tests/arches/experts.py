"""What the architectures with experts share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches.common import Filling, Tiny

N_EXPERTS, N_USED, WIDTH, SHARED = 8, 3, 32, 64


def keys(t: Tiny, **more: Any) -> dict[str, Any]:
    """The metadata of experts."""
    return {"expert_count": N_EXPERTS, "expert_used_count": N_USED, **more}


def stacked(t: Tiny, width: int, *, biases: bool = False) -> dict[str, Filling]:
    """The router, and the matrices of the experts."""
    n = N_EXPERTS
    out: dict[str, Filling] = {"ffn_gate_inp.weight": (n, t.dim)}
    out |= {f"ffn_{name}_exps.weight": (n, width, t.dim) for name in ("gate", "up")}
    out["ffn_down_exps.weight"] = (n, t.dim, width)
    if biases:
        out["ffn_gate_inp.bias"] = (n,)
        out |= {f"ffn_{name}_exps.bias": (n, width) for name in ("gate", "up")}
        out["ffn_down_exps.bias"] = (n, t.dim)
    return out


def shared(t: Tiny, width: int) -> dict[str, Filling]:
    """The expert that all tokens use."""
    out: dict[str, Filling] = {f"ffn_{n}_shexp.weight": (width, t.dim) for n in ("gate", "up")}
    return out | {"ffn_down_shexp.weight": (t.dim, width)}


def hf_stacked(
    weights: Mapping[str, np.ndarray], at: str = "mlp.experts"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights without the experts' matrices, and these as most models of transformers have
    them: gate and up in one, rows of gate first.
    """
    rest = {name: w for name, w in weights.items() if "_exps.weight" not in name}
    out = {}
    for name, down in weights.items():
        if name.endswith("ffn_down_exps.weight"):
            blk, layer = name.removesuffix("ffn_down_exps.weight"), name.split(".")[1]
            parts = [weights[f"{blk}ffn_{part}_exps.weight"] for part in ("gate", "up")]
            out[f"model.layers.{layer}.{at}.gate_up_proj"] = np.concatenate(parts, 1)
            out[f"model.layers.{layer}.{at}.down_proj"] = down
    return rest, out


def hf_counts(m: Mapping[str, Any]) -> dict[str, Any]:
    """How many experts there are, as most models of transformers name it."""
    return {
        "num_experts": m["expert_count"],
        "num_local_experts": m["expert_count"],
        "num_experts_per_tok": m["expert_used_count"],
    }
