"""Random LoRA adapters for tiny models, as GGUF files and as PEFT has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import arches
import gguf
import numpy as np
from arches.common import Case, Tiny, halves, hf_name
from tiny import add_tensor, quantise, tensors

RANK = 4
REFERENCES = Path(__file__).parent / "data" / "lora.npz"


@dataclass(frozen=True)
class Lora:
    """An adapter of every matrix whose name contains one of `targets`.

    alpha: 0: products are not divided by the rank; type: of the tensors.
    """

    targets: tuple[str, ...]
    rank: int = RANK
    alpha: float = 2.0 * RANK
    type: str = "F32"
    seed: int = 0

    @property
    def factor(self) -> float:
        """What products are multiplied by."""
        return self.alpha / self.rank if self.alpha else 1.0


MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
EVERYTHING = Lora((*MATRICES, "token_embd"))

#: Name of a reference -> the model's case and its adapter.
CASES: dict[str, tuple[Case, Lora]] = {
    "llama": (arches.CASES["llama"], EVERYTHING),
    "llama-head": (arches.CASES["llama-untied"], Lora(("attn_q", "output.weight"), rank=3)),
    "phi3": (arches.CASES["phi3"], Lora(("attn_qkv", "ffn_up", "ffn_down"))),
    "qwen2": (arches.CASES["qwen2"], Lora(("attn_q", "attn_v"), rank=8, alpha=0)),
}


def pairs(t: Tiny, lora: Lora) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor of the model -> A (rank, k) and B (n, rank), float32."""
    out = {}
    for name, w in tensors(t).items():
        if w.ndim != 2 or not any(target in name for target in lora.targets):
            continue
        if not name.endswith(".weight") or "norm" in name:
            continue
        rng = np.random.default_rng([lora.seed, *name.encode()])
        a, b = (
            rng.normal(0, 0.2, shape).astype(np.float32)
            for shape in ((lora.rank, w.shape[1]), (w.shape[0], lora.rank))
        )
        out[name] = (a, b)
    return out


def in_file(t: Tiny, lora: Lora) -> dict[str, np.ndarray]:
    """The tensors of the file. The A of the embedding, whose rows are looked up, has other axes:
    A is (n_vocab, rank), B is (dim, rank).
    """
    out = {}
    for name, (a, b) in pairs(t, lora).items():
        is_table = name == "token_embd.weight"
        out[f"{name}.lora_a"], out[f"{name}.lora_b"] = (b, a.T.copy()) if is_table else (a, b)
    return out


def merged(t: Tiny, lora: Lora, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The model's weights with the adapter's products added, in float64."""
    weights = {name: w.astype(np.float64) for name, w in tensors(t).items()}
    for name, (a, b) in pairs(t, lora).items():
        weights[name] = weights[name] + scale * lora.factor * b.astype(float) @ a.astype(float)
    return weights


def write_lora(
    path: Path,
    t: Tiny,
    lora: Lora,
    *,
    keys: Mapping[str, Any] | None = None,
    changed: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write an adapter. keys: more metadata, None: absent; changed: tensors, None: absent."""
    metadata: dict[str, Any] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(lora.alpha),
        "general.architecture": t.arch,
    } | dict(keys or {})
    writer = gguf.GGUFWriter(path, str(metadata.pop("general.architecture")))
    kinds = {str: "add_string", float: "add_float32", list: "add_array", bool: "add_bool"}
    for key, value in metadata.items():
        if value is not None:
            getattr(writer, kinds[type(value)])(key, value)
    for name, data in (in_file(t, lora) | dict(changed or {})).items():
        if data is not None:
            fits = data.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[lora.type]][0]
            kind = "F16" if fits and lora.type != "F32" else lora.type
            add_tensor(writer, name, quantise(data, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def peft_state(t: Tiny, lora: Lora) -> dict[str, np.ndarray]:
    """The adapter's tensors as PEFT names and orders them."""
    arch, out = arches.arch_of(t.arch), {}
    for name, (a, b) in pairs(t, lora).items():
        if getattr(arch, "PAIRED", False) and ("attn_q." in name or "attn_k." in name):
            b = halves(b, t.d_head)
        module = hf_name(name, getattr(arch, "NAMES", {})).removesuffix(".weight")
        prefix = f"base_model.model.{module}.lora_"
        if name == "token_embd.weight":  # looks rows of A^T up: W^T + A^T B^T
            out |= {f"{prefix}embedding_A.default": b.T, f"{prefix}embedding_B.default": a.T}
        else:
            out |= {f"{prefix}A.default.weight": a, f"{prefix}B.default.weight": b}
    return out


def names(t: Tiny, lora: Lora) -> Sequence[str]:
    """The last parts of the names of the modules that the adapter is for, in transformers."""
    keys = (key.partition(".lora_")[0] for key in peft_state(t, lora))
    return sorted({key.rpartition(".")[2] for key in keys})


def with_type(lora: Lora, kind: str) -> Lora:
    """The same adapter with tensors of another type."""
    return replace(lora, type=kind)
