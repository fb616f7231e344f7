"""Which type a tensor may have.

The rules are those of llama.cpp's `llama-quantize`, so that both write the same types: only
matrices are quantised, and of these not the ones that are small and decide much, such as norms and
the routers of experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edge.errors import InputError, UnsupportedError
from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS, TensorType
from edge.quantizer.encode import ENCODED_TYPES

if TYPE_CHECKING:
    from edge.files.gguf import GGUF, Tensor

__all__ = [
    "FLOATS",
    "NEEDS_IMPORTANCE",
    "TARGETS",
    "ModelTensors",
    "bits_per_weight",
    "file_type",
    "fitting",
    "is_quantised",
    "kind_of",
    "layer_of",
    "n_bytes",
    "need_target",
    "needs_importance",
]

FLOATS = ("F32", "F16", "BF16")
#: The types that a matrix can get.
TARGETS = ENCODED_TYPES

#: Types that are of no use without an importance; embedding and output do without.
NEEDS_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_ENDS = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")

#: Parts of the names of matrices that keep their type.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "position_embd",
    "token_types.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "attn_rel_b.weight",
)

#: A type of blocks of 256 -> the one that rows of another width get.
_FALLBACKS = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
    ),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

#: Type -> `general.file_type` of a file whose matrices have it.
_FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10},
    **{"Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20},
    **{"IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30},
    **{"IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39},
    **{"Q1_0": 40, "Q2_0": 41},
}


@dataclass(frozen=True)
class ModelTensors:
    """What the choice of types depends on. tensors: in the order in which llama.cpp takes them, by
    layer and name; head_count, kv_head_count: of the first layer; expert_count: 0: it has none.
    """

    architecture: str
    layer_count: int
    head_count: int
    kv_head_count: int
    expert_count: int
    tensors: Sequence[Tensor]

    @classmethod
    def of(cls, gguf: GGUF) -> ModelTensors:
        """The tensors of a model's file. Numbers that the file does not have, or not as numbers,
        are 0.
        """
        architecture = str(gguf.metadata.get("general.architecture", ""))

        def count(name: str, otherwise: int = 0) -> int:
            value = gguf.metadata.get(f"{architecture}.{name}", otherwise)
            value = value[0] if isinstance(value, list) and value else value
            return value if type(value) is int else 0

        heads = count("attention.head_count")
        kv_heads = count("attention.head_count_kv", heads)
        layers, experts = count("block_count"), count("expert_count")
        by_layer = sorted(gguf.tensors.values(), key=lambda t: (layer_of(t.name), t.name))
        return cls(architecture, layers, heads, kv_heads, experts, by_layer)

    @cached_property
    def matrices(self) -> list[Tensor]:
        """Those that are quantised."""
        return [tensor for tensor in self.tensors if is_quantised(tensor.name, tensor.shape)]


def layer_of(name: str) -> int:
    """The layer of a tensor; -1: it is in none."""
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    is_layer = head == "blk" and number.isascii() and number.isdigit() and len(number) < 9
    return int(number) if is_layer else -1


def kind_of(name: str) -> str:
    """What a tensor is, in every layer the same: `attn_q` of `blk.3.attn_q.weight`."""
    short = name.removesuffix(".weight")
    return short.split(".", 2)[2] if layer_of(name) >= 0 and short.count(".") > 1 else short


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that gets another type; all others are copied."""
    is_matrix = name.endswith("weight") and math.prod(shape[:-1]) > 1
    return is_matrix and not any(part in name for part in _KEPT)


def need_target(type_name: str, what: str) -> None:
    """Raise InputError unless a matrix can get this type. what: where it is said."""
    if type_name not in TARGETS:
        raise InputError(f"{what} {type_name!r:.40}: one of {', '.join(TARGETS)}")


def fitting(type_name: str, k: int) -> str:
    """The type itself, or the one that rows of k weights get, which are no multiple of its block.

    Raises UnsupportedError for a type that none replaces.
    """
    if k % _type(type_name).block == 0:
        return type_name
    instead = _FALLBACKS.get(type_name, type_name)
    if instead == type_name and _type(type_name).block > 32:
        raise UnsupportedError(
            f"rows of {k} weights cannot be {type_name}, whose blocks have "
            f"{_type(type_name).block}, and no other type replaces it",
            what=type_name,
        )
    return instead if k % _type(instead).block == 0 else "F16"


def needs_importance(name: str, type_name: str) -> bool:
    """Whether this tensor cannot get this type without an importance."""
    return type_name in NEEDS_IMPORTANCE and name not in _ENDS


def n_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    kind = _type(type_name)
    return math.prod(shape) // kind.block * kind.block_bytes


def bits_per_weight(tensors: Sequence[Tensor], types: Mapping[str, str]) -> float:
    """Bits of all tensors by their elements. types: tensor -> type; others have their own."""
    n_weights = sum(math.prod(tensor.shape) for tensor in tensors)
    total = sum(n_bytes(types[t.name], t.shape) if t.name in types else t.n_bytes for t in tensors)
    return 8 * total / max(1, n_weights)


def file_type(types: Mapping[str, str]) -> int:
    """`general.file_type` by the type that most tensors have; 0 without any."""
    most = Counter(types.values()).most_common(1)
    return _FILE_TYPES.get(most[0][0], 0) if most else 0


def _type(type_name: str) -> TensorType:
    return TENSOR_TYPES[TYPE_NUMBERS[type_name]]
