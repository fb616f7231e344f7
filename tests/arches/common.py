"""Tiny models: their options, their weights and metadata, and how `transformers` has these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

#: What a tensor is filled with: random numbers for its name, or these numbers.
Filling = tuple[int, ...] | np.ndarray


@dataclass(frozen=True)
class Tiny:
    """What a tiny model is made of. Widths are multiples of 32, head_dim one of 16."""

    arch: str = "llama"
    type: str | Callable[[str], str] = "F32"  # of all matrices, or tensor name -> type
    seed: int = 0
    n_layers: int = 2
    dim: int = 64
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int | None = None  # None: dim / n_heads
    ffn: int = 96
    vocab: int = 288  # at least 256 + merges + control tokens
    tied: bool = True  # no output head, where the architecture leaves the choice
    context: int = 256
    window: int = 0  # sliding window, 0: none
    n_rot: int | None = None  # rotated dimensions of a head, None: all
    freq_base: float = 10000.0
    original_context: int | None = None  # LongRoPE: short and long factors as tensors (phi3)
    rope_freqs: bool = False  # Llama 3.1's divisors as a tensor (llama)
    extra: tuple[tuple[str, Any], ...] = field(default=())  # more metadata: (key, value)

    @property
    def d_head(self) -> int:
        """Dimensions of a head."""
        return self.head_dim if self.head_dim is not None else self.dim // self.n_heads

    @property
    def q(self) -> int:
        """Rows of the queries."""
        return self.n_heads * self.d_head

    @property
    def kv(self) -> int:
        """Rows of the keys, and of the values."""
        return self.n_kv_heads * self.d_head

    def get(self, key: str, default: Any = None) -> Any:
        """A key of `extra`, named without the architecture."""
        return dict(self.extra).get(f"{self.arch}.{key}", default)


@dataclass(frozen=True)
class Case:
    """A model, how many tokens it reads, and the context that it is built for."""

    model: Tiny
    n_tokens: int = 64
    context: int | None = None

    @property
    def tokens(self) -> np.ndarray:
        """Ids drawn from the whole vocabulary."""
        return np.random.default_rng(self.model.seed).integers(self.model.vocab, size=self.n_tokens)

    @property
    def positions(self) -> np.ndarray:
        """The positions whose logits are kept."""
        return np.array([2, self.n_tokens // 2, self.n_tokens - 1])


# ---- tensors: GGUF name -> shape ----


def decoder(
    t: Tiny,
    layer: Callable[[Tiny, int], dict[str, Filling]],
    *,
    head: Literal["tied", "own", "any"] = "any",
) -> dict[str, Filling]:
    """Embedding, layers, last norm and output head. layer: the tensors of layer i, named without
    `blk.<i>.`; head: as `edge.models.common.Ends`.
    """
    out: dict[str, Filling] = {"token_embd.weight": (t.vocab, t.dim)}
    for i in range(t.n_layers):
        out |= {f"blk.{i}.{name}": shape for name, shape in layer(t, i).items()}
    out["output_norm.weight"] = (t.dim,)
    if head == "own" or (head == "any" and not t.tied):
        out["output.weight"] = (t.vocab, t.dim)
    if t.rope_freqs:
        out["rope_freqs.weight"] = llama3_divisors(t)
    return out


#: Llama 3.1's rule, with lengths at which a head of 16 has all its three kinds of frequencies.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def llama3_divisors(t: Tiny) -> np.ndarray:
    """What a converter writes as `rope_freqs`: (n_rot / 2,) divisors by Llama 3.1's rule."""
    n_rot = t.n_rot or t.d_head
    wave = 2 * np.pi * t.freq_base ** (np.arange(0, n_rot, 2) / n_rot)
    turns = LLAMA3["original_max_position_embeddings"] / wave  # in the original context
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (smooth + (1 - smooth) / LLAMA3["factor"])


def longrope_factors(t: Tiny) -> dict[str, Filling]:
    """LongRoPE's factors."""
    half = (t.n_rot or t.d_head) // 2
    short = 1 + 0.05 * np.random.default_rng(t.seed).standard_normal(half)
    return {
        "rope_factors_short.weight": short.astype(np.float32),
        "rope_factors_long.weight": np.linspace(1, 8, half, dtype=np.float32),
    }


def block(t: Tiny, i: int = 0) -> dict[str, Filling]:
    """A layer of Llama."""
    return norms(t.dim, "attn_norm") | qkvo(t) | norms(t.dim, "ffn_norm") | gated(t)


def qkvo(t: Tiny, biases: str = "") -> dict[str, Filling]:
    """The matrices of an attention. biases: of "qkvo", those that have one."""
    rows = {"q": t.q, "k": t.kv, "v": t.kv, "output": t.dim}
    out: dict[str, Filling] = {}
    for name, n in rows.items():
        out[f"attn_{name}.weight"] = (n, t.q if name == "output" else t.dim)
        if name[0] in biases:
            out[f"attn_{name}.bias"] = (n,)
    return out


def gated(t: Tiny, *, biases: bool = False) -> dict[str, Filling]:
    """The matrices of a gated feed-forward network."""
    rows = {"gate": t.ffn, "up": t.ffn, "down": t.dim}
    out: dict[str, Filling] = {}
    for name, n in rows.items():
        out[f"ffn_{name}.weight"] = (n, t.ffn if name == "down" else t.dim)
        if biases:
            out[f"ffn_{name}.bias"] = (n,)
    return out


def mlp(t: Tiny, *, biases: bool = False) -> dict[str, Filling]:
    """The matrices of a feed-forward network without a gate."""
    return {name: n for name, n in gated(t, biases=biases).items() if "gate" not in name}


def layer_norms(n: int, *names: str) -> dict[str, Filling]:
    """Weights and biases of layer norms of n elements."""
    return {f"{name}.{part}": (n,) for name in names for part in ("weight", "bias")}


def norms(n: int, *names: str) -> dict[str, Filling]:
    """Weights of norms of n elements."""
    return {f"{name}.weight": (n,) for name in names}


def filled(tensors: Mapping[str, Filling], seed: int, spread: float) -> dict[str, np.ndarray]:
    """Random numbers in float32: matrices whose products keep their input's size, weights of norms
    around 1, biases and all other vectors around 0.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in tensors.items():
        if isinstance(shape, np.ndarray):
            out[name] = shape.astype(np.float32)
            continue
        values = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + spread * values
        elif len(shape) > 1 and name.endswith(".weight"):
            values = values / np.sqrt(shape[-1])
        else:
            values = 0.5 * values
        out[name] = values.astype(np.float32)
    return out


# ---- metadata ----

#: `metadata` of a model with layer norms.
LAYER_EPS = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5}


def metadata(t: Tiny) -> dict[str, Any]:
    """The keys that most architectures have, without the architecture's name."""
    out: dict[str, Any] = {
        "block_count": t.n_layers,
        "context_length": t.context,
        "embedding_length": t.dim,
        "feed_forward_length": t.ffn,
        "attention.head_count": t.n_heads,
        "attention.head_count_kv": t.n_kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": t.freq_base,
        "rope.dimension_count": t.n_rot or t.d_head,
        "vocab_size": t.vocab,
    }
    if t.head_dim is not None:
        out |= {"attention.key_length": t.head_dim, "attention.value_length": t.head_dim}
    if t.window:
        out["attention.sliding_window"] = t.window
    if t.original_context is not None:
        out["rope.scaling.original_context_length"] = t.original_context
    return out


def yarn(arch: str, factor: float = 8.0, original: int = 32) -> tuple[tuple[str, Any], ...]:
    """`Tiny.extra` of a model whose positions are scaled by YaRN."""
    return (
        (f"{arch}.rope.scaling.type", "yarn"),
        (f"{arch}.rope.scaling.factor", factor),
        (f"{arch}.rope.scaling.original_context_length", original),
    )


# ---- transformers ----

#: GGUF name -> name in most models of transformers.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Names of models with norms before and behind both parts of a layer.
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hf_config(t: Tiny, m: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """The arguments that most configurations of transformers take. m: the metadata."""
    return {
        "vocab_size": t.vocab,
        "hidden_size": t.dim,
        "intermediate_size": t.ffn,
        "num_hidden_layers": t.n_layers,
        "num_attention_heads": t.n_heads,
        "num_key_value_heads": t.n_kv_heads,
        "head_dim": t.d_head,
        "max_position_embeddings": t.context,
        "rms_norm_eps": m.get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": is_tied,
        "rope_parameters": hf_rope(t, m),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }


def hf_rope(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers for this metadata."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": t.freq_base}
    if t.n_rot is not None:
        rope["partial_rotary_factor"] = t.n_rot / t.d_head
    if m.get("rope.scaling.type", "none") != "none":
        rope |= {"rope_type": m["rope.scaling.type"], "factor": m.get("rope.scaling.factor")}
    if "rope.scaling.original_context_length" in m:
        rope["original_max_position_embeddings"] = m["rope.scaling.original_context_length"]
    if t.rope_freqs:
        rope |= LLAMA3
    return rope


def hf_longrope(t: Tiny, m: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of a model with LongRoPE's factors."""
    short, long = (w.tolist() for w in longrope_factors(t).values())
    rope = hf_rope(t, {}) | {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    rope["original_max_position_embeddings"] = m["rope.scaling.original_context_length"]
    if "rope.scaling.attn_factor" in m:
        rope["attention_factor"] = m["rope.scaling.attn_factor"]
    return rope


def hf_name(name: str, names: Mapping[str, str]) -> str:
    """A GGUF tensor's name in transformers."""
    *blk, name, suffix = name.split(".")
    stem = (NAMES | dict(names))[name]
    return f"model.layers.{blk[1]}.{stem}.{suffix}" if blk else f"{stem}.{suffix}"


def halves(w: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads whose pairs are neighbours -> whose pairs are (i, i + head_dim / 2)."""
    pairs = w.reshape(-1, head_dim // 2, 2, *w.shape[1:])
    return pairs.swapaxes(1, 2).reshape(w.shape)


def hf_state(
    t: Tiny,
    weights: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    *,
    is_paired: bool = False,
    is_plus_one: bool = False,
) -> dict[str, np.ndarray]:
    """The weights as transformers names and orders them; see `PAIRED` and `PLUS_ONE`."""
    out = {}
    for name, w in weights.items():
        if name.startswith("rope_"):
            continue  # part of the configuration there
        if is_paired and ("attn_q." in name or "attn_k." in name):
            w = halves(w, t.d_head)
        if is_plus_one and name.endswith("norm.weight"):
            w = w - 1
        out[hf_name(name, names)] = w
    return out
