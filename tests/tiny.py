"""Small random models of any architecture and weight type, written with the `gguf` package.

Each is a whole model: weights, metadata, a byte-level BPE vocabulary and a ChatML template, so
that everything from the reader to the chat runs on it. Same options, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np

BLOCKS = Path(__file__).parent / "data" / "blocks.npz"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # bos (and unknown), -, eos
MERGES = [  # words of "the world and a hello", as GPT-2 spells them: Ġ is a space
    *("Ġ t", "h e", "i n", "r e", "o n", "Ġ a", "e r", "Ġt he", "l l", "o r", "Ġ w", "Ġw or"),
    *("in g", "Ġa n", "Ġan d", "l d", "Ġwor ld", "H e", "ll o", "He llo"),
]


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
    tied: bool = True
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


def write_tiny(path: str | Path, arch: str = "llama", **options: Any) -> Path:
    """Write the model `Tiny(arch, **options)` to path."""
    return _write(Path(path), Tiny(arch, **options))


def write_split(path: str | Path, n_shards: int = 3, **options: Any) -> list[Path]:
    """The same model in n_shards files `<stem>-00001-of-0000N.gguf`; returns their paths."""
    path, tiny = Path(path), Tiny(**options)
    per_shard = -(-len(tensors(tiny)) // n_shards)
    _write(path, tiny, split_max_tensors=per_shard)
    return sorted(path.parent.glob(f"{path.stem}-*-of-{n_shards:05}.gguf"))


def tensors(t: Tiny) -> dict[str, np.ndarray]:
    """The weights in float32, before quantisation: name -> (n, k) or (n,)."""
    rng = np.random.default_rng(t.seed)

    def matrix(n: int, k: int) -> np.ndarray:
        return (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)

    def vector(n: int, mean: float = 1.0, spread: float = 0.1) -> np.ndarray:
        return (mean + spread * rng.standard_normal(n)).astype(np.float32)

    q, kv = t.n_heads * t.d_head, t.n_kv_heads * t.d_head
    out = {"token_embd.weight": matrix(t.vocab, t.dim)}
    for i in range(t.n_layers):
        layer = {"attn_norm": vector(t.dim)}
        if t.arch == "phi3":
            layer["attn_qkv"] = matrix(q + 2 * kv, t.dim)
        else:
            layer |= {"attn_q": matrix(q, t.dim), "attn_k": matrix(kv, t.dim)}
            layer["attn_v"] = matrix(kv, t.dim)
        layer |= {"attn_output": matrix(t.dim, q), "ffn_norm": vector(t.dim)}
        if t.arch == "phi3":
            layer["ffn_up"] = matrix(2 * t.ffn, t.dim)  # rows: gate, then up
        else:
            layer |= {"ffn_gate": matrix(t.ffn, t.dim), "ffn_up": matrix(t.ffn, t.dim)}
        layer["ffn_down"] = matrix(t.dim, t.ffn)
        out |= {f"blk.{i}.{name}.weight": w for name, w in layer.items()}
    out["output_norm.weight"] = vector(t.dim)
    if not t.tied:
        out["output.weight"] = matrix(t.vocab, t.dim)
    half = (t.n_rot or t.d_head) // 2
    if t.original_context is not None:
        out["rope_factors_short.weight"] = np.abs(vector(half, 1.0, 0.05))
        out["rope_factors_long.weight"] = np.linspace(1, 8, half, dtype=np.float32)
    if t.rope_freqs:
        out["rope_freqs.weight"] = np.geomspace(1, 8, half).astype(np.float32)
    return out


def quantise(data: np.ndarray, type_name: str) -> np.ndarray:
    """float32 (n, k) -> the type's bytes (n, row_bytes), or an array of floats.

    Types of small grids get blocks of other normal numbers, of make_blocks.py: setting up their
    quantiser takes seconds.
    """
    kind = gguf.GGMLQuantizationType[type_name]
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        if not type_name.startswith(("IQ1", "IQ2", "IQ3")):
            return libgguf.quantize_rows(data, int(kind))
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.load(BLOCKS)[type_name].reshape(-1, block_bytes)
    rng = np.random.default_rng(int(np.abs(data).sum()))
    chosen = rng.integers(0, len(blocks), (data.shape[0], data.shape[1] // block))
    return blocks[chosen].reshape(data.shape[0], -1)


def _write(path: Path, t: Tiny, split_max_tensors: int = 0) -> Path:
    writer = gguf.GGUFWriter(path, t.arch, split_max_tensors=split_max_tensors)
    _add_metadata(writer, t)
    _add_vocabulary(writer, t)
    for name, data in tensors(t).items():
        kind = "F32"
        if data.ndim == 2:
            kind = t.type if isinstance(t.type, str) else t.type(name)
        writer.add_tensor(name, quantise(data, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, t: Tiny) -> None:
    writer.add_name(f"tiny {t.arch}")
    writer.add_block_count(t.n_layers)
    writer.add_context_length(t.context)
    writer.add_embedding_length(t.dim)
    writer.add_feed_forward_length(t.ffn)
    writer.add_head_count(t.n_heads)
    writer.add_head_count_kv(t.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(t.freq_base)
    writer.add_rope_dimension_count(t.n_rot or t.d_head)
    writer.add_vocab_size(t.vocab)
    if t.head_dim is not None:
        writer.add_key_length(t.head_dim)
        writer.add_value_length(t.head_dim)
    if t.window:
        writer.add_sliding_window(t.window)
    if t.original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(t.original_context)
    for key, value in t.extra:
        _add(writer, key, value)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value by its Python type; an earlier value of the key is replaced."""
    writer.kv_data[0].pop(key, None)
    by_type: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    by_type.get(type(value), writer.add_array)(key, value)


def _add_vocabulary(writer: gguf.GGUFWriter, t: Tiny) -> None:
    """Ids: 256 bytes, then merges, then unused fillers, the control tokens last."""
    tokens = [*byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]
    n_fill = t.vocab - len(tokens) - len(CONTROL_TOKENS)
    if n_fill < 0:
        raise ValueError(f"a tiny vocabulary needs {t.vocab - n_fill} tokens, not {t.vocab}")
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.UNUSED] * n_fill
    tokens += [f"<|unused_{i}|>" for i in range(n_fill)]
    first_control = len(tokens)
    tokens += CONTROL_TOKENS
    kinds += [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(first_control)
    writer.add_eos_token_id(first_control + 2)
    writer.add_unk_token_id(first_control)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte 0..255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]
