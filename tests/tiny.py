"""Small random models of any architecture and weight type, written with the `gguf` package.

Each is a whole model: weights, metadata, a byte-level BPE vocabulary and a ChatML template, so
that everything from the reader to the chat runs on it. Same options, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
from arches import arch_of, common
from arches.common import Tiny, filled

from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS

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


#: The package does not know these yet.
gguf.GGML_QUANT_SIZES |= {n: TENSOR_TYPES[n][1:] for n in TENSOR_TYPES if n & 0xFFFF == 42}


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
    """The weights in float32, before quantisation: name -> (n, k), (n,), or (experts, n, k)."""
    arch = arch_of(t.arch)
    return filled(arch.tensors(t), t.seed, getattr(arch, "SPREAD", 0.4))


def metadata(t: Tiny) -> dict[str, Any]:
    """The metadata of the model itself, without the vocabulary: key -> value."""
    arch = arch_of(t.arch)
    own = arch.metadata(t) if hasattr(arch, "metadata") else {}
    keys = common.metadata(t) | own
    out = {whole_key(t, key): value for key, value in keys.items() if value is not None}
    lists = {key: list(value) for key, value in t.extra if isinstance(value, tuple)}
    return out | dict(t.extra) | lists


def whole_key(t: Tiny, key: str) -> str:
    """A key with the architecture's name; some have another."""
    return key if key.startswith("xielu.") else f"{t.arch}.{key}"


#: Parts of the names of matrices that converters leave in float32.
_FLOATS = (
    "norm",
    "ffn_gate_inp",
    "conv",
    "position_embd",
    "token_types",
    "altup",
    "ssm_a",
    "ssm_d",
)


def is_quantised(name: str, data: np.ndarray) -> bool:
    """Whether a tensor gets the type of the model's matrices."""
    is_matrix = data.ndim > 1 and name.endswith(".weight")
    return is_matrix and not any(part in name for part in _FLOATS)


def quantise(data: np.ndarray, type_name: str) -> np.ndarray:
    """float32 (..., k) -> the type's bytes (..., row_bytes), or an array of floats.

    Types of small grids get blocks of other normal numbers, of make_blocks.py: setting up their
    quantiser takes seconds.
    """
    if type_name.startswith("Q2_0"):
        return _q2_0(data, TENSOR_TYPES[TYPE_NUMBERS[type_name]].block)
    kind = gguf.GGMLQuantizationType[type_name]
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        if not type_name.startswith(("IQ1", "IQ2", "IQ3")):
            rows = libgguf.quantize_rows(data.reshape(-1, data.shape[-1]), int(kind))
            return rows.reshape(*data.shape[:-1], -1)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.load(BLOCKS)[type_name].reshape(-1, block_bytes)
    rng = np.random.default_rng(int(np.abs(data).sum()))
    chosen = rng.integers(0, len(blocks), (*data.shape[:-1], data.shape[-1] // block))
    return blocks[chosen].reshape(*data.shape[:-1], -1)


def _q2_0(data: np.ndarray, block: int) -> np.ndarray:
    """-1, 0, 1 or 2 times the largest magnitude of a block."""
    blocks = data.reshape(-1, block)
    scales = np.abs(blocks).max(axis=1, keepdims=True).astype("<f2")
    codes = np.clip(np.rint(blocks / np.maximum(scales.astype("f4"), 1e-8)) + 1, 0, 3).astype("u1")
    fields = codes.reshape(len(blocks), -1, 4) << np.array([0, 2, 4, 6], "u1")
    raw = np.concatenate([scales.view("u1"), fields.sum(axis=2, dtype="u1")], axis=1)
    return raw.reshape(data.shape[0], -1)


def add_tensor(writer: gguf.GGUFWriter, name: str, data: np.ndarray, type_name: str) -> None:
    """A tensor of any type, data as `quantise` gives them."""
    number = TYPE_NUMBERS[type_name]
    writer.add_tensor(name, data, raw_dtype=number)
    writer.tensors[-1][name].dtype = number & 0xFFFF  # as files number it


def _write(path: Path, t: Tiny, split_max_tensors: int = 0) -> Path:
    writer = gguf.GGUFWriter(path, t.arch, split_max_tensors=split_max_tensors)
    writer.add_name(f"tiny {t.arch}")
    for key, value in metadata(t).items():
        _add(writer, key, value)
    _add_vocabulary(writer, t)
    for name, data in tensors(t).items():
        kind = "F32"
        if is_quantised(name, data):
            kind = t.type if isinstance(t.type, str) else t.type(name)
        add_tensor(writer, name, quantise(data, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value by its Python type."""
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
