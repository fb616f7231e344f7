"""Gemma 4: heads of two sizes, layers that read the keys and values of others, inputs of each
layer; or layers with one matrix for keys and values; and experts beside the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches import experts, gemma3n
from arches.common import Case, Filling, Tiny, decoder, hf_state, norms

CONFIG = "Gemma4TextConfig"
SPARE = {
    "layer_output_scale.weight",
    "attn_v.weight",
    "ffn_gate_up_exps.weight",
    "ffn_down_exps.scale",
}


def extra(n_shared: int, input_dim: int) -> tuple[tuple[str, Any], ...]:
    """`Tiny.extra`."""
    return (
        ("gemma4.attention.shared_kv_layers", n_shared),
        ("gemma4.embedding_length_per_layer_input", input_dim),
    )


NAMES = gemma3n.NAMES | {
    "layer_output_scale": "layer_scalar",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_down_exps": "experts.down_proj",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
#: Those without `.weight`, or with another name, there.
RENAMED = {
    "layer_scalar.weight": "layer_scalar",
    "router.proj.scale": "router.scale",
    "experts.gate_up_proj.weight": "experts.gate_up_proj",
    "experts.down_proj.weight": "experts.down_proj",
    "experts.down_proj.scale": "router.per_expert_scale",
}
EXPERTS = (
    ("gemma4.expert_count", experts.N_EXPERTS),
    ("gemma4.expert_used_count", experts.N_USED),
    ("gemma4.expert_feed_forward_length", experts.WIDTH),
)
SHAPE: dict[str, Any] = {"arch": "gemma4", "head_dim": 16, "window": 20}
LARGE: dict[str, Any] = SHAPE | {"head_dim": 256}  # real ones: of 512 where all is seen
CASES = {
    "gemma4": Case(Tiny(seed=1, n_layers=6, extra=extra(3, 32), **SHAPE)),  # as E2B
    "gemma4-keys": Case(Tiny(seed=2, n_layers=6, extra=extra(0, 0), **SHAPE)),  # as 31B
    "gemma4-experts": Case(Tiny(seed=3, n_layers=3, extra=extra(0, 0) + EXPERTS, **LARGE)),  # 26B
}
LARGEST = {"n_layers": 3, "extra": EXPERTS}


def is_full(i: int) -> bool:
    """Whether layer i sees all positions."""
    return i % 3 == 2


def has_one(t: Tiny) -> bool:
    """Whether full layers have one matrix for keys and values, and fewer key heads."""
    return n_inputs(t) == 0


def n_inputs(t: Tiny) -> int:
    """The size of a layer's input, 0: there is none."""
    return t.get("embedding_length_per_layer_input", 256 if t.dim >= 256 else 32)


def tensors(t: Tiny) -> dict[str, Filling]:
    """Divisors of frequencies: a quarter of the pairs is rotated."""
    out = decoder(t, layer)
    n, half = n_inputs(t), t.d_head
    if n:
        out |= {
            "per_layer_token_embd.weight": (t.vocab, n * t.n_layers),
            "per_layer_model_proj.weight": (n * t.n_layers, t.dim),
            **norms(n, "per_layer_proj_norm"),
        }
    return out | {"rope_freqs.weight": np.repeat([1.0, 1e30], [half // 4, half - half // 4])}


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer. Heads that see all positions are twice as large. Scores are kept
    small, so that what float16 makes of a key stays small, too.
    """
    rng = np.random.default_rng(t.seed + i)
    d = 2 * t.d_head if is_full(i) else t.d_head
    n_q, n_k, ffn = t.n_heads * d, n_kv_heads(t, i) * d, widths(t)[i]
    names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    out: dict[str, Filling] = {
        **norms(t.dim, *names),
        **norms(d, "attn_k_norm"),
        "attn_q_norm.weight": (1 + 0.4 * rng.standard_normal(d)) / max(8, d**0.5),
        "attn_q.weight": (n_q, t.dim),
        "attn_k.weight": (n_k, t.dim),
        "attn_v.weight": (n_k, t.dim),
        "attn_output.weight": (t.dim, n_q),
        "ffn_gate.weight": (ffn, t.dim),
        "ffn_up.weight": (ffn, t.dim),
        "ffn_down.weight": (t.dim, ffn),
        "layer_output_scale.weight": np.array([0.75 + 0.125 * i]),
    }
    if is_full(i) and has_one(t):
        del out["attn_v.weight"]
    n = n_inputs(t)
    if n:
        out |= {"inp_gate.weight": (n, t.dim), "proj.weight": (t.dim, n)}
        out |= norms(t.dim, "post_norm")
    return out | (with_experts(t, i) if t.get("expert_count") else {})


def with_experts(t: Tiny, i: int) -> dict[str, Filling]:
    """The experts of a layer. The router's scale undoes its division by sqrt(dim), so that scores
    are apart.
    """
    n, width = experts.N_EXPERTS, experts.WIDTH
    scale = 1 + 0.3 * np.random.default_rng(t.seed + i).standard_normal(t.dim)
    return {
        "ffn_gate_inp.weight": (n, t.dim),
        "ffn_gate_inp.scale": np.sqrt(t.dim) * scale,
        "ffn_gate_up_exps.weight": (n, 2 * width, t.dim),
        "ffn_down_exps.weight": (n, t.dim, width),
        "ffn_down_exps.scale": (n,),
        **norms(t.dim, "post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"),
    }


def n_kv_heads(t: Tiny, i: int) -> int:
    """Key heads of layer i."""
    return 1 if is_full(i) and has_one(t) else t.n_kv_heads


def widths(t: Tiny) -> list[int]:
    """Of the feed-forward networks: twice as wide where a layer reads the keys of another."""
    n_shared = t.get("attention.shared_kv_layers", 0)
    return [t.ffn] * (t.n_layers - n_shared) + [2 * t.ffn] * n_shared


def metadata(t: Tiny) -> dict[str, Any]:
    """Two kinds of layers."""
    layers = range(t.n_layers)
    return {
        "attention.head_count_kv": [n_kv_heads(t, i) for i in layers],
        "attention.key_length": 2 * t.d_head,
        "attention.key_length_swa": t.d_head,
        "attention.shared_kv_layers": 0,
        "attention.sliding_window": t.window or 20,
        "attention.sliding_window_pattern": [not is_full(i) for i in layers],
        "attention.value_length": 2 * t.d_head,
        "attention.value_length_swa": t.d_head,
        "embedding_length_per_layer_input": n_inputs(t),
        "feed_forward_length": widths(t),
        "final_logit_softcapping": 30.0,
        "rope.dimension_count": 2 * t.d_head,
        "rope.dimension_count_swa": t.d_head,
        "rope.freq_base": 100000.0,
        "rope.freq_base_swa": 5000.0,
    }


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata says, in the words of transformers."""
    out = gemma3n.windows(m)
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    out["rope_parameters"]["full_attention"] |= full
    return out | {
        "attention_k_eq_v": has_one(t),
        "global_head_dim": 2 * t.d_head,
        "num_global_key_value_heads": 1 if has_one(t) else None,
        "use_double_wide_mlp": True,
        "enable_moe_block": "expert_count" in m,
        "num_experts": m.get("expert_count"),
        "top_k_experts": m.get("expert_used_count"),
        "moe_intermediate_size": m.get("expert_feed_forward_length"),
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Layers that read others' keys have none there."""
    out = hf_state(t, gemma3n.own(t, weights), NAMES)
    for old, new in RENAMED.items():
        out = {name.replace(old, new): w for name, w in out.items()}
    return out
