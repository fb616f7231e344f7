"""Regenerate tests/data/references.npz: logits of `transformers` for tiny random models.

    pip install torch==2.13.0 transformers==5.23.0 gguf libgguf
    python tests/make_references.py

The weights come from `tiny.tensors`, that is from numpy seeds, so the tests make the same model
without torch. Float32, CPU, one thread, eager attention: the same file every time. Each case twice:
`<case>` all in float32, `<case>.f16` with keys and values rounded to float16, as in the engine's
cache (which alone moves these logits by 2e-3).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny import Tiny, tensors

DATA = Path(__file__).parent / "data" / "references.npz"


@dataclass(frozen=True)
class Case:
    """A model, how many tokens it reads, and what the session asks for.

    context: as given to `edge.models.build`. rope: `rope_parameters` of transformers, except the
    base, the rotated share and LongRoPE's factors, which follow from the model.
    """

    model: Tiny
    n_tokens: int = 64
    context: int | None = None
    rope: tuple[tuple[str, Any], ...] = (("rope_type", "default"),)

    @property
    def tokens(self) -> np.ndarray:
        """Ids drawn from the whole vocabulary."""
        return np.random.default_rng(self.model.seed).integers(self.model.vocab, size=self.n_tokens)

    @property
    def positions(self) -> np.ndarray:
        """The positions whose logits are kept: early, middle and last ones."""
        return np.unique([0, 1, 7, 31, self.n_tokens // 2, self.n_tokens - 2, self.n_tokens - 1])


#: Llama 3.1's rule, with lengths at which a head of 16 has all its three kinds of frequencies.
LLAMA3 = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 512),
)
LINEAR = (
    ("llama.rope.scaling.type", "linear"),
    ("llama.rope.scaling.factor", 4.0),
)
#: As in Phi-4-mini: 3 query heads per key head, 3/4 of a head rotated, LongRoPE, tied.
PHI4: dict[str, Any] = {
    "arch": "phi3", "dim": 192, "n_heads": 6, "n_kv_heads": 2, "n_rot": 24, "context": 512,
    "original_context": 64,
}  # fmt: skip

# Where a key or value is halfway between two float16, a last bit of float32 decides. The seeds are
# such that this moves no kept logit by more than 3e-4, whoever computes it.
CASES = {
    "llama": Case(Tiny(seed=1)),
    "llama-untied": Case(Tiny(seed=2, tied=False, n_kv_heads=4, freq_base=500000.0)),
    "llama-one-kv-head": Case(Tiny(seed=23, n_kv_heads=1, head_dim=32, n_layers=3)),
    "llama-rope-freqs": Case(Tiny(seed=4, rope_freqs=True, context=4096), 100, rope=LLAMA3),
    "llama-linear": Case(
        Tiny(seed=45, extra=LINEAR), rope=(("rope_type", "linear"), ("factor", 4.0))
    ),
    "phi3": Case(Tiny("phi3", seed=6, tied=False)),
    "phi3-partial": Case(Tiny("phi3", seed=7, n_kv_heads=4, n_rot=12)),
    "phi3-window": Case(Tiny("phi3", seed=8, tied=False, window=24), 96),
    "phi3-longrope-short": Case(Tiny(seed=9, **PHI4), 60, context=64),
    "phi3-longrope-long": Case(Tiny(seed=29, **PHI4), 100, context=512),
    "phi3-longrope-factor": Case(
        Tiny(seed=50, window=48, extra=(("phi3.rope.scaling.attn_factor", 1.25),), **PHI4),
        100,
        context=512,
        rope=(("rope_type", "longrope"), ("attention_factor", 1.25)),
    ),
}


def llama3_divisors(case: Case) -> np.ndarray:
    """What a converter writes as `rope_freqs`: (n_rot / 2,) divisors by Llama 3.1's rule."""
    rule, model = dict(case.rope), case.model
    n_rot = model.n_rot or model.d_head
    wave = 2 * np.pi * model.freq_base ** (np.arange(0, n_rot, 2) / n_rot)
    turns = rule["original_max_position_embeddings"] / wave  # in the original context
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (smooth + (1 - smooth) / rule["factor"])).astype(np.float32)


def hf_config(case: Case) -> Any:
    """The model's configuration in transformers."""
    from transformers import LlamaConfig, Phi3Config

    t, rope = case.model, dict(case.rope)
    common: dict[str, Any] = {
        "vocab_size": t.vocab,
        "hidden_size": t.dim,
        "intermediate_size": t.ffn,
        "num_hidden_layers": t.n_layers,
        "num_attention_heads": t.n_heads,
        "num_key_value_heads": t.n_kv_heads,
        "max_position_embeddings": t.context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": t.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    rope["rope_theta"] = t.freq_base
    if t.arch == "llama":
        return LlamaConfig(**common, head_dim=t.d_head, rope_parameters=rope)
    rope["partial_rotary_factor"] = (t.n_rot or t.d_head) / t.d_head
    if t.original_context is not None:
        weights = tensors(t)
        rope["rope_type"] = "longrope"
        rope["original_max_position_embeddings"] = t.original_context
        for kind in ("short", "long"):
            rope[f"{kind}_factor"] = weights[f"rope_factors_{kind}.weight"].tolist()
        common["original_max_position_embeddings"] = t.original_context
    return Phi3Config(**common, rope_parameters=rope, sliding_window=t.window or None)


def hf_name(name: str) -> str:
    """A GGUF tensor's name in transformers."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    *block, name, _ = name.split(".")
    return f"model.layers.{block[1]}.{names[name]}.weight" if block else f"{names[name]}.weight"


def hf_weights(t: Tiny) -> dict[str, np.ndarray]:
    """The model's weights as transformers names and orders them.

    GGUF's llama has the rows of q and k in pairs to rotate, transformers in halves; its phi3 has
    gate and up in one tensor, named up.
    """
    out = {}
    for name, w in tensors(t).items():
        if name.startswith("rope_"):
            continue  # part of the configuration there
        if "attn_q." in name or "attn_k." in name:
            w = w.reshape(-1, t.d_head // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        key = hf_name(name)
        if t.arch == "phi3":
            key = key.replace("up_proj", "gate_up_proj")
        out[key] = w
    return out


def references(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(positions, vocab) logits by transformers: in float32, and with a float16 cache."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    class HalfCache(DynamicCache):
        def update(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(key.half().float(), value.half().float(), *args, **kwargs)

    model = AutoModelForCausalLM.from_config(hf_config(case), dtype=torch.float32).eval()
    weights = {key: torch.from_numpy(w.copy()) for key, w in hf_weights(case.model).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if case.model.tied else []
    assert list(missing) == tied and not unexpected, (missing, unexpected)
    if case.model.tied:
        model.tie_weights()
    with torch.no_grad():
        exact, half = (
            model(torch.from_numpy(case.tokens)[None], past_key_values=cache).logits
            for cache in (DynamicCache(), HalfCache())
        )
    return exact[0, case.positions].numpy(), half[0, case.positions].numpy()


def main() -> None:
    """Write the file."""
    import torch

    torch.set_num_threads(1)
    logits = {}
    for name, case in CASES.items():
        logits[name], logits[f"{name}.f16"] = references(case)
    np.savez_compressed(DATA, **logits)
    print(f"{DATA}: {len(CASES)} cases, {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
