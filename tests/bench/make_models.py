"""Write the files of one model, one per weight type, that the benchmarks compare.

    python tests/bench/make_models.py model-Q4_1.gguf OUT_DIR [--types Q4_0 Q8_0 | all]

Metadata is copied as it is, except for the file type. The matrices of the layers (`blk.*`, two
dimensions) are dequantised and quantised anew; in a float file the embedding too, else it keeps
its bytes. What a row cannot hold (K and IQ types come in blocks of 256) becomes the type that
llama.cpp's quantizer falls back to, so that of SmolLM2, with its width of 576, only ffn_down gets
them. A file made from a 4-bit one is for timing, not for judging quality.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf
import libgguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from make_shape import use_more_bits

FLOATS = ("F32", "F16", "BF16")
FALLBACKS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
    ),
}
TYPES = (*FLOATS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", *FALLBACKS)


@dataclass(frozen=True)
class Mix:
    """Types by tensor: down: ffn_down, of the first eighth of the layers, of those that
    `use_more_bits`; v: attn_v, likewise; out: attn_output; base: all that is not said."""

    base: str
    down_first: str | None = None
    down_more: str | None = None
    v: str | None = None
    v_more: str | None = None
    out: str | None = None

    def type_of(self, name: str, i: int, n: int) -> str:
        """The type of tensor blk.<i>.<name>.weight of n layers, before any fallback."""
        more, first = use_more_bits(i, n), i < n // 8
        choices = {
            "ffn_down": (first and self.down_first) or (more and self.down_more),
            "attn_v": (more and self.v_more) or self.v,
            "attn_output": self.out,
        }
        return choices.get(name) or self.base


MIXES = {
    "Q3_K_M": Mix("Q3_K", down_first="Q5_K", v="Q4_K", out="Q4_K"),
    "Q4_K_S": Mix("Q4_K", down_first="Q5_K"),
    "Q4_K_M": Mix("Q4_K", down_more="Q6_K", v_more="Q6_K"),
    "Q5_K_M": Mix("Q5_K", down_more="Q6_K", v_more="Q6_K"),
    "IQ3_M": Mix("IQ3_S", down_first="Q4_K", v="Q4_K", out="Q4_K"),
    "IQ2_M": Mix("IQ2_S", down_first="IQ3_S"),
}
NAMES = (*TYPES, *MIXES)


def quantise(weights: np.ndarray, type_name: str) -> np.ndarray:
    """float32 (n, k) -> the rows of a type, all weights of the same importance."""
    kind = GGMLQuantizationType[type_name]
    if type_name in FLOATS:
        return gguf.quants.quantize(weights, kind)
    importance = None
    if libgguf.quantize_requires_imatrix(kind):
        importance = np.ones(weights.shape[1], np.float32)
    return libgguf.quantize_rows(weights, int(kind), imatrix=importance)


def wanted_type(mix: Mix, tensor: gguf.ReaderTensor, n_layers: int) -> str:
    """The type that a tensor of a model of n_layers gets: its own, where it is not to change."""
    of_layer = tensor.name.startswith("blk.") and len(tensor.shape) == 2
    if of_layer:
        _, i, name, _ = tensor.name.split(".")
        wanted = mix.type_of(name, int(i), n_layers)
    elif len(tensor.shape) == 2 and mix.base in FLOATS:
        wanted = mix.base
    else:
        return str(tensor.tensor_type.name)
    block, _ = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[wanted]]
    return FALLBACKS[wanted] if tensor.shape[0] % block else wanted


def copy_metadata(reader: GGUFReader, writer: GGUFWriter, file_type: str) -> None:
    """Copy every key of the source but its header fields, the architecture and the file type."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    known = {f.name.removeprefix("MOSTLY_").removeprefix("ALL_"): f for f in LlamaFileType}
    writer.add_file_type(known.get(file_type, LlamaFileType.GUESSED))


def requantise(source: Path, target: Path, name: str) -> Counter[str]:
    """Write `source` to `target` in a type or a mix; counts tensors by type."""
    reader, mix = GGUFReader(source), MIXES.get(name, Mix(name))
    arch = reader.fields["general.architecture"].contents()
    n_layers = reader.fields[f"{arch}.block_count"].contents()
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, arch)
    copy_metadata(reader, writer, name)
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        data, wanted = tensor.data, wanted_type(mix, tensor, n_layers)
        if wanted != tensor.tensor_type.name:
            weights = gguf.quants.dequantize(data, tensor.tensor_type)
            data = quantise(weights.astype(np.float32, copy=False), wanted)
        kind = GGMLQuantizationType[wanted]
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
        counts[wanted] += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)
    return counts


def main() -> None:
    """Parse the command line and write one file per type."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument(
        "--types", nargs="+", choices=["all", *sorted(NAMES)], default=["Q4_0", "Q8_0"]
    )
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name in NAMES if "all" in args.types else args.types:
        target = args.out_dir / f"{args.source.stem}-{name.lower()}.gguf"
        counts = requantise(args.source, target, name)
        kinds = ", ".join(f"{kind} x{count}" for kind, count in sorted(counts.items()))
        print(f"{target}: {target.stat().st_size:,} bytes, {kinds}")


if __name__ == "__main__":
    main()
