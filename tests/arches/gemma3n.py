"""Gemma 3n: streams, a residual of low rank, inputs of each layer, layers that read the keys and
values of others, sparse activations.

llama.cpp takes 20 layers with keys of their own, 10 sparse ones and inputs of 256 for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arches.common import SANDWICH, Case, Filling, Tiny, block, decoder, hf_state, norms

CONFIG = "Gemma3nTextConfig"
NAMES = SANDWICH | {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "altup_proj": "model.altup_projections",
    "altup_unembd_proj": "model.altup_unembed_projections",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale": "altup.correct_output_scale",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
N_STREAMS = 4
#: Share of a layer's activations that is zero -> factor of its standard deviation.
SPARSE = {0.95: 1.6448533535003662, 0.5: 0.0, 0.25: -0.6744897365570068, 0.0: -float("inf")}


def extra(shares: list[float], n_shared: int, input_dim: int) -> tuple[tuple[str, Any], ...]:
    """`Tiny.extra`."""
    return (
        ("gemma3n.activation_sparsity_scale", tuple(SPARSE[share] for share in shares)),
        ("gemma3n.attention.shared_kv_layers", n_shared),
        ("gemma3n.embedding_length_per_layer_input", input_dim),
    )


SHAPE: dict[str, Any] = {"arch": "gemma3n", "window": 20}
CASES = {
    "gemma3n": Case(
        Tiny(seed=1, n_layers=7, extra=extra([0.95, 0.5, 0.25, 0, 0.95, 0, 0], 2, 32), **SHAPE)
    ),
    "gemma3n-25-layers": Case(
        Tiny(seed=3, n_layers=25, extra=extra([0.95] * 10 + [0.0] * 15, 5, 256), **SHAPE)
    ),
}


def tensors(t: Tiny) -> dict[str, Filling]:
    """The model's own tensors, then the layers'."""
    n = n_inputs(t)
    return decoder(t, layer) | {
        "per_layer_token_embd.weight": (t.vocab, n * t.n_layers),
        "per_layer_model_proj.weight": (n * t.n_layers, t.dim),
        **norms(n, "per_layer_proj_norm"),
        "altup_proj.weight": (N_STREAMS - 1, t.dim, t.dim),
        "altup_unembd_proj.weight": (N_STREAMS - 1, t.dim, t.dim),
    }


def layer(t: Tiny, i: int) -> dict[str, Filling]:
    """The tensors of a layer. The router's numbers are large: its input is divided by dim. Scores
    and weights of streams are kept small: else a last bit grows to a whole logit in 25 layers.
    """
    n, rng = n_inputs(t), np.random.default_rng(t.seed + i)
    names = ("post_ffw_norm", "post_norm", "laurel_post_norm")
    return {
        **block(t),
        **norms(t.d_head, "attn_k_norm"),
        "attn_q_norm.weight": (1 + 0.4 * rng.standard_normal(t.d_head)) / 8,
        "post_attention_norm.weight": (1 + 0.4 * rng.standard_normal(t.dim)) / 4,
        **norms(t.dim, *names, "altup_router_norm"),
        "inp_gate.weight": (n, t.dim),
        "proj.weight": (t.dim, n),
        "altup_router.weight": rng.standard_normal((N_STREAMS, t.dim)) * np.sqrt(t.dim),
        "altup_predict_coef.weight": rng.standard_normal((N_STREAMS**2, N_STREAMS)) / 16,
        "altup_correct_coef.weight": rng.standard_normal((N_STREAMS, N_STREAMS)) / 16,
        "altup_correct_scale.weight": (t.dim,),
        "laurel_l.weight": (rank(t), t.dim),
        "laurel_r.weight": (t.dim, rank(t)),
    }


def n_inputs(t: Tiny) -> int:
    """The size of a layer's input."""
    return t.get("embedding_length_per_layer_input", 256 if t.dim >= 256 else 32)


def rank(t: Tiny) -> int:
    """Rows of laurel's first matrix."""
    return 256 if t.dim >= 256 else 64


def metadata(t: Tiny) -> dict[str, Any]:
    """The streams, and the layers with a window."""
    return {
        "activation_sparsity_scale": [SPARSE[0.95]] * t.n_layers,
        "altup.active_idx": 0,
        "altup.num_inputs": N_STREAMS,
        "attention.key_length": t.d_head,
        "attention.value_length": t.d_head,
        "attention.shared_kv_layers": 0,
        "attention.sliding_window": t.window or 20,
        "attention.sliding_window_pattern": [i % 5 < 4 for i in range(t.n_layers)],
        "embedding_length_per_layer_input": n_inputs(t),
        "final_logit_softcapping": 30.0,
        "rope.dimension_count": None,
        "rope.freq_base": 100000.0,
        "rope.freq_base_swa": 5000.0,
    }


def config(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata says, in the words of transformers."""
    share_of = {factor: share for share, factor in SPARSE.items()}
    return windows(m) | {
        "activation_sparsity_pattern": [share_of[f] for f in m["activation_sparsity_scale"]],
        "altup_num_inputs": N_STREAMS,
        "laurel_rank": rank(t),
    }


def windows(m: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 4 has, too."""
    kinds = ("full_attention", "sliding_attention")
    return {
        "final_logit_softcapping": m.get("final_logit_softcapping"),
        "hidden_size_per_layer_input": m["embedding_length_per_layer_input"],
        "layer_types": [kinds[is_one] for is_one in m["attention.sliding_window_pattern"]],
        "num_kv_shared_layers": m["attention.shared_kv_layers"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": m["rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": m["rope.freq_base_swa"]},
        },
        "sliding_window": m["attention.sliding_window"],
        "vocab_size_per_layer_input": m["vocab_size"],
    }


def state(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each matrix of a stack is a tensor there; layers that read others' keys have none."""
    out = {}
    for name, w in hf_state(t, own(t, weights), NAMES).items():
        stem = name.removesuffix(".weight")
        if w.ndim == 3:
            out |= {f"{stem}.{i}.weight": matrix for i, matrix in enumerate(w)}
        else:
            out[stem if stem.endswith("output_scale") else name] = w
    return out


def own(t: Tiny, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without those that layers do not use which read the keys of others."""
    n_own = t.n_layers - t.get("attention.shared_kv_layers", 0)
    unused = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    return {
        name: w
        for name, w in weights.items()
        if not (name.endswith(unused) and int(name.split(".")[1]) >= n_own)
    }
