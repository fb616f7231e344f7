"""Write a model of the shape of a real one whose weights are random blocks: for speed and memory.

    python tests/bench/make_shape.py Q4_0 OUT.gguf [--layers 8] [--arch llama] [--head Q8_0]

The first argument is a tensor type, or a mix by its name (`MIXES`). --arch is one of `SHAPES`:

phi3    Phi-4-mini: 32 layers, hidden 3072, 24 heads and 8 of keys and values, head dimension 128,
        feed-forward 8192, a vocabulary of 200,064, embedding and output head tied
llama   the same matrices cut into q, k, v and gate, up, for runtimes that do not load phi3
olmoe   OLMoE, but with 32 experts of which 4 are used: 16 layers, hidden 2048, 16 heads of keys and
        values too, experts of 1024, a vocabulary of 50,304, a head of its own; routers are F32

Blocks have random bytes, but their scales are set so that weights have a root mean square of 0.02:
activations stay finite. Same options, same bytes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from shape_vocabulary import add_vocabulary

CONTEXT, ORIGINAL_CONTEXT = 131_072, 4096
RMS = 0.02
FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

#: Where a block has its fp16 scale, and its fp16 minimum: type -> (offset, offset or None,
#: the minimum as a multiple of the scale that centres the weights).
SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q4_0": (0, None, 0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
    "IQ1_S": (0, None, 0),
    "IQ2_XXS": (0, None, 0),
    "IQ2_XS": (0, None, 0),
    "IQ2_S": (0, None, 0),
    "IQ3_XXS": (0, None, 0),
    "IQ3_S": (0, None, 0),
    "IQ4_NL": (0, None, 0),
    "IQ4_XS": (0, None, 0),
    "TQ1_0": (52, None, 0),
    "TQ2_0": (64, None, 0),
}
TYPES = (*FLOATS, *SCALES, "IQ1_M", "MXFP4")


def use_more_bits(i: int, n: int) -> bool:
    """The layers whose ffn_down a mix keeps finer: the outer eighths, every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _q4_k_m(part: str, i: int, n: int) -> str:
    if part in ("q", "k", "v"):
        return "Q5_K"
    return "Q6_K" if part == "down" and use_more_bits(i, n) else "Q4_K"


#: Name -> the type of a part of layer i of n, and of the head.
MIXES: dict[str, tuple[Callable[[str, int, int], str], str]] = {
    "Q4_K_M": (_q4_k_m, "Q6_K"),
    "Q4_K_S": (lambda part, i, n: "Q5_K" if part == "down" and i < n // 8 else "Q4_K", "Q6_K"),
    "IQ3_XXS": (lambda part, i, n: "IQ3_S" if part == "out" else "IQ3_XXS", "Q5_K"),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. n_rot: of a head, as much as phi3 rotates; ffn: of an expert, if any."""

    dim: int = 3072
    ffn: int = 8192
    heads: int = 24
    kv_heads: int = 8
    head_dim: int = 128
    n_rot: int = 96
    vocab: int = 200_064
    experts: int = 0
    experts_used: int = 0
    name: str = "Phi-4-mini"
    layers: int = 32


PHI = Shape()
OLMOE = Shape(2048, 1024, 16, 16, 128, 128, 50_304, 32, 4, name="OLMoE", layers=16)
SHAPES = {"phi3": PHI, "llama": PHI, "olmoe": OLMOE}


@dataclass(frozen=True)
class Matrix:
    """A matrix of the model: rows of k, seeds of its parts (row counts and what seeds them).

    stacked: of each expert, if the matrices of several are one tensor.
    """

    name: str
    type: str
    k: int
    parts: tuple[tuple[str, int], ...]
    stacked: int = 0

    @property
    def n(self) -> int:
        """Rows."""
        return sum(rows for _, rows in self.parts)


def random_rows(type_name: str, n: int, k: int, seed: str) -> np.ndarray:
    """(n, bytes of a row) uint8, or (n, k) of a float type: valid blocks of the type."""
    rng = np.random.default_rng(list(seed.encode()))
    if type_name in FLOATS:
        rows = max(1, (1 << 20) // k)
        base = (RMS * rng.standard_normal((min(n, rows), k))).astype(np.float32)
        rolled = [np.roll(base, i, axis=1) for i in range(-(-n // len(base)))]
        values = np.concatenate(rolled)[:n]
        if type_name == "BF16":
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return values.astype(FLOATS[type_name])
    block, block_bytes = gguf.GGML_QUANT_SIZES[Type[type_name]]
    raw = np.frombuffer(rng.bytes(n * k // block * block_bytes), np.uint8).reshape(-1, block_bytes)
    raw = set_scales(type_name, raw.copy(), unit_scale(type_name))
    return raw.reshape(n, -1)


def set_scales(type_name: str, raw: np.ndarray, scale: float) -> np.ndarray:
    """Put a scale, and the minimum that goes with it, into blocks (n, block_bytes)."""
    if type_name == "MXFP4":  # a power of two: the exponent's byte
        raw[:, 0] = 128 + round(np.log2(scale))
    elif type_name == "IQ1_M":  # four bits each in the high nibbles of four 16-bit words
        bits = int(np.float16(scale).view(np.uint16))
        for i in range(4):
            raw[:, 49 + 2 * i] = raw[:, 49 + 2 * i] & 15 | (bits >> 4 * i & 15) << 4
    else:
        at, at_min, share = SCALES[type_name]
        _put(raw, at, scale)
        if at_min is not None:
            _put(raw, at_min, share * scale)
        if type_name == "TQ2_0":  # codes 0..2: 3 becomes 1
            codes = raw[:, :64]
            codes &= ~((codes & 0x55) << 1 & codes)
    return raw


def _put(raw: np.ndarray, at: int, value: float) -> None:
    raw[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)


def unit_scale(type_name: str) -> float:
    """The scale that gives weights of a root mean square of RMS."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[Type[type_name]]
    raw = np.random.default_rng(0).integers(0, 256, (256, block_bytes), np.uint8)
    probe = 2.0**-4
    values = gguf.quants.dequantize(set_scales(type_name, raw, probe), Type[type_name])
    return float(probe * RMS / np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def matrices(
    kind: str, head: str | None, layers: int, arch: str, shape: Shape = PHI
) -> Iterator[Matrix]:
    """All matrices, in the order of the file."""
    simple = kind if kind in ("F32", "F16", "BF16", "Q8_0") else "Q6_K"
    of, head_of = MIXES.get(kind, (lambda part, i, n: kind, simple))
    dim, ffn = shape.dim, shape.ffn
    yield Matrix("token_embd", head or head_of, dim, (("embd", shape.vocab),))
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if arch == "olmoe":
        yield Matrix("output", head or head_of, dim, (("head", shape.vocab),))
    for i in range(layers):
        qkv, gate_up = [("q", q), ("k", kv), ("v", kv)], [("gate", ffn), ("up", ffn)]
        groups = [("attn_output", q, [("out", dim)])]
        if not shape.experts:
            groups += [("ffn_down", ffn, [("down", dim)])]
        if arch == "phi3":
            groups = [("attn_qkv", dim, qkv), ("ffn_up", dim, gate_up), *groups]
        else:
            groups += [(f"attn_{part}", dim, [(part, n)]) for part, n in qkv]
        if arch == "llama":
            groups += [(f"ffn_{part}", dim, [(part, n)]) for part, n in gate_up]
        for name, k, parts in groups:
            seeds = tuple((f"{i}.{part}", n) for part, n in parts)
            yield Matrix(f"blk.{i}.{name}", of(parts[0][0], i, layers), k, seeds)
        for part, n, k in (("gate", ffn, dim), ("up", ffn, dim), ("down", dim, ffn)):
            seeds = tuple((f"{i}.{part}.{e}", n) for e in range(shape.experts))
            if seeds:
                yield Matrix(f"blk.{i}.ffn_{part}_exps", of(part, i, layers), k, seeds, n)


def vectors(layers: int, arch: str, shape: Shape) -> dict[str, np.ndarray]:
    """Norm weights, the rotary factors of phi3, the routers of experts."""
    ones = np.ones(shape.dim, np.float32)
    out = {"output_norm.weight": ones}
    for i in range(layers):
        out |= {f"blk.{i}.attn_norm.weight": ones, f"blk.{i}.ffn_norm.weight": ones}
        if arch == "olmoe":
            out |= {f"blk.{i}.attn_q_norm.weight": ones, f"blk.{i}.attn_k_norm.weight": ones}
            router = random_rows("F32", shape.experts, shape.dim, f"{i}.router")
            out[f"blk.{i}.ffn_gate_inp.weight"] = router
    if arch == "phi3":
        out["rope_factors_long.weight"] = np.geomspace(1, 32, shape.n_rot // 2).astype(np.float32)
        out["rope_factors_short.weight"] = np.ones(shape.n_rot // 2, np.float32)
    return out


def add_metadata(writer: gguf.GGUFWriter, name: str, layers: int, arch: str, shape: Shape) -> None:
    """The architecture's keys."""
    writer.add_name(name)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(shape.vocab)
    writer.add_rope_dimension_count(shape.n_rot if arch == "phi3" else shape.head_dim)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(ORIGINAL_CONTEXT)
        writer.add_rope_scaling_attn_factors(1.1902)
        writer.add_sliding_window(2 * CONTEXT)


def write(
    path: Path,
    kind: str,
    *,
    layers: int = 32,
    arch: str = "phi3",
    head: str = "",
    shape: Shape = PHI,
) -> None:
    """Write the file, a tensor at a time; the embedding is the largest."""
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, arch)
    add_metadata(writer, f"{shape.name} shape, {kind}, random weights", layers, arch, shape)
    add_vocabulary(writer, shape.vocab)
    plain = vectors(layers, arch, shape)
    all_matrices = list(matrices(kind, head or None, layers, arch, shape))
    for name, vector in plain.items():
        writer.add_tensor_info(name, vector.shape, vector.dtype, vector.nbytes)
    for m in all_matrices:
        block, block_bytes = gguf.GGML_QUANT_SIZES[Type[m.type]]
        row = m.k // block * block_bytes
        of_bytes = (len(m.parts), m.stacked, row) if m.stacked else (m.n, row)
        writer.add_tensor_info(  # which makes elements of bytes
            f"{m.name}.weight", of_bytes, np.dtype(np.uint8), m.n * row, raw_dtype=Type[m.type]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for vector in plain.values():
        writer.write_tensor_data(vector)
    for m in all_matrices:
        rows = [random_rows(m.type, n, m.k, seed) for seed, n in m.parts]
        data = np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in rows])
        writer.write_tensor_data(data)
    writer.close()
    os.replace(partial, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = sorted({*TYPES, *MIXES})
    parser.add_argument("type", choices=names, metavar="TYPE", help=", ".join(names))
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--layers", type=int, help="by default as many as the real model")
    parser.add_argument("--arch", choices=list(SHAPES), default="phi3")
    parser.add_argument("--head", choices=sorted(TYPES), default="", help="type of the embedding")
    args = parser.parse_args()
    shape = SHAPES[args.arch]
    layers = args.layers or shape.layers
    write(args.out, args.type, layers=layers, arch=args.arch, head=args.head, shape=shape)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
