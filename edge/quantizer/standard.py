"""The mixes of llama.cpp: the types that `llama-quantize` gives, for each name that it takes.

A mix has a type for most matrices, and others for those that matter more or less: the rules below
are the facts of `llama_tensor_get_type` in llama.cpp's `llama-quant.cpp`. A test compares them,
tensor by tensor, with what the program chose.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edge.files.gguf import Tensor
from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from edge.quantizer.types import FLOATS, TARGETS, ModelTensors, fitting, layer_of

__all__ = ["ALIASES", "MIXES", "Mix", "standard_types"]


@dataclass(frozen=True)
class Mix:
    """A name of `llama-quantize`. base: the type of most matrices; file_type: its number in
    `general.file_type`.
    """

    name: str
    base: str
    file_type: int


_ALL = (
    *(Mix("F32", "F32", 0), Mix("F16", "F16", 1), Mix("BF16", "BF16", 32)),
    *(Mix("Q4_0", "Q4_0", 2), Mix("Q4_1", "Q4_1", 3), Mix("Q5_0", "Q5_0", 8)),
    *(Mix("Q5_1", "Q5_1", 9), Mix("Q8_0", "Q8_0", 7), Mix("MXFP4_MOE", "MXFP4", 38)),
    *(Mix("Q2_K", "Q2_K", 10), Mix("Q2_K_S", "Q2_K", 21), Mix("Q3_K_S", "Q3_K", 11)),
    *(Mix("Q3_K_M", "Q3_K", 12), Mix("Q3_K_L", "Q3_K", 13), Mix("Q4_K_S", "Q4_K", 14)),
    *(Mix("Q4_K_M", "Q4_K", 15), Mix("Q5_K_S", "Q5_K", 16), Mix("Q5_K_M", "Q5_K", 17)),
    *(Mix("Q6_K", "Q6_K", 18), Mix("IQ1_S", "IQ1_S", 24), Mix("IQ1_M", "IQ1_M", 31)),
    *(Mix("IQ2_XXS", "IQ2_XXS", 19), Mix("IQ2_XS", "IQ2_XS", 20), Mix("IQ2_S", "IQ2_XS", 28)),
    *(Mix("IQ2_M", "IQ2_S", 29), Mix("IQ3_XXS", "IQ3_XXS", 23), Mix("IQ3_XS", "IQ3_S", 22)),
    *(Mix("IQ3_S", "IQ3_S", 26), Mix("IQ3_M", "IQ3_S", 27), Mix("IQ4_NL", "IQ4_NL", 25)),
    *(Mix("IQ4_XS", "IQ4_XS", 30), Mix("TQ1_0", "TQ1_0", 36), Mix("TQ2_0", "TQ2_0", 37)),
    *(Mix("Q1_0", "Q1_0", 40), Mix("Q2_0", "Q2_0", 41)),
)
#: Name -> mix, of those whose types can be encoded.
MIXES = {mix.name: mix for mix in _ALL if mix.base in TARGETS}
#: Names that stand for others.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

#: The mixes below 3 bits have rules of their own.
_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_LOW_S = ("IQ2_S", "IQ2_M")

#: Models with so many layers, and fewer heads of keys than of queries, have a small `attn_v`.
_70B_LAYERS = {"llama": 80, "qwen2": 80}


def standard_types(mix: Mix, model: ModelTensors, has_importance: bool) -> dict[str, str]:
    """The type of each matrix of a model that is quantised, as `llama-quantize` chooses it.

    has_importance: whether an importance matrix is given. Raises UnsupportedError where a row's
    width fits neither the type nor one that replaces it.
    """
    if mix.base in FLOATS:
        return {tensor.name: mix.base for tensor in model.matrices}
    choice = _Choice(mix, model, has_importance)
    return {t.name: fitting(choice.of(t), t.shape[-1]) for t in model.matrices}


class _Choice:
    """The types of the tensors, asked for one after the other: some rules count them."""

    def __init__(self, mix: Mix, model: ModelTensors, has_importance: bool) -> None:
        self._mix, self._model, self._has_importance = mix, model, has_importance
        self._seen: Counter[str] = Counter()  # tensors so far, by group
        groups = [_group(tensor.name) for tensor in model.tensors]
        self._is_tied = "output" not in groups
        self._n_values = groups.count("value")
        kv = model.kv_head_count
        self._is_grouped = kv > 0 and model.head_count // kv >= 4
        self._has_8_experts = model.expert_count == 8

    def of(self, tensor: Tensor) -> str:
        """The type of the next matrix, whatever its width."""
        mix, group = self._mix, _group(tensor.name)
        if group == "output" or (self._is_tied and group == "embedding"):
            return self._output(tensor.shape[-1])
        if mix.name == "MXFP4_MOE":
            return "MXFP4" if math.prod(tensor.shape[:-2]) > 1 else "Q8_0"
        if group == "embedding":
            return _EMBEDDING.get(mix.name, mix.base)
        rules = _LOW_RULES if mix.name in _LOW else _RULES
        chosen = rules[group](self, tensor) if group in rules else mix.base
        self._seen[group] += 1
        return chosen

    def _output(self, k: int) -> str:
        mix = self._mix
        if mix.name in ("MXFP4_MOE", "Q8_0") or k % TENSOR_TYPES[TYPE_NUMBERS[mix.base]].block:
            return "Q8_0"
        return "Q5_K" if mix.name in (*_LOW, "IQ3_XXS") else "Q6_K"

    def _place(self, group: str, tensor: Tensor) -> tuple[int, int]:
        """The layer of a feed-forward matrix, as the rules count it, and how many there are."""
        n = self._model.layer_count
        return (layer_of(tensor.name) if self._model.expert_count > 1 else self._seen[group]), n

    # ---- groups of tensors ----

    def value(self, tensor: Tensor) -> str:
        mix, chosen, i = self._mix, self._mix.base, self._seen["value"]
        if mix.name in ("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and self._is_grouped:
            chosen = "Q4_K"
        elif mix.name == "Q2_K":
            chosen = "Q3_K"
        elif mix.name == "IQ3_XXS":
            chosen = "IQ3_XXS" if self._has_importance else "IQ3_S"
        elif mix.name == "IQ3_M":
            chosen = "Q4_K"
        elif mix.name == "Q3_K_M":
            chosen = "Q5_K" if i < 2 else "Q4_K"
        elif (
            mix.name == "Q3_K_L"
            or (mix.name in ("IQ4_NL", "IQ4_XS") and self._is_grouped)
            or (mix.name == "Q4_K_S" and i < 4)
        ):
            chosen = "Q5_K"
        elif mix.name in ("Q4_K_M", "Q5_K_M") and _is_favoured(i, self._n_values):
            chosen = "Q6_K"
        if self._is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self._has_8_experts else chosen

    def key(self, tensor: Tensor) -> str:
        return "Q8_0" if self._has_8_experts else self.query(tensor)

    def query(self, tensor: Tensor) -> str:
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self._mix.name, self._mix.base)

    def down(self, tensor: Tensor) -> str:
        mix, (i, n) = self._mix, self._place("down", tensor)
        is_early = i < n // 8
        if mix.name == "Q2_K":
            return "Q3_K"
        if mix.name == "IQ3_XXS" and not self._has_importance:
            return "Q4_K" if is_early else "Q3_K"
        if mix.name == "Q3_K_M":
            return "Q5_K" if i < n // 16 else "Q4_K"
        if mix.name == "Q3_K_L":
            return "Q5_K"
        is_favoured = _is_favoured(i, n)
        if mix.name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if is_favoured else mix.base
        if mix.name == "IQ3_M":
            return "Q4_K" if is_early or (self._has_8_experts and is_favoured) else mix.base
        early = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K"}
        early |= (
            {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
            if self._has_importance
            else {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
        )
        return early.get(mix.name, mix.base) if is_early else mix.base

    def attention_output(self, tensor: Tensor) -> str:
        types = _OUTPUT_OF_8_EXPERTS if self._has_8_experts else _ATTENTION_OUTPUT
        return types.get(self._mix.name, self._mix.base)

    def gate(self, tensor: Tensor) -> str:
        return self._inner("gate", tensor)

    def up(self, tensor: Tensor) -> str:
        return self._inner("up", tensor)

    def _inner(self, group: str, tensor: Tensor) -> str:
        i, n = self._place(group, tensor)
        is_inner = n // 8 <= i < 7 * n // 8
        return "IQ3_XXS" if self._mix.name == "IQ3_XS" and is_inner else self._mix.base

    @property
    def _is_70b(self) -> bool:
        model = self._model
        if model.layer_count != _70B_LAYERS.get(model.architecture):
            return False
        return model.architecture != "llama" or model.head_count != model.kv_head_count

    # ---- below 3 bits ----

    def low_value(self, tensor: Tensor) -> str:
        if self._is_grouped or self._model.expert_count >= 4:
            return "Q4_K"
        return self._low_better

    def low_key(self, tensor: Tensor) -> str:
        return "Q4_K" if self._has_8_experts else self._mix.base

    def low_down(self, tensor: Tensor) -> str:
        is_early = self._seen["down"] < self._model.layer_count // 8
        return self._low_better if is_early else self._mix.base

    def low_attention_output(self, tensor: Tensor) -> str:
        if self._has_8_experts:
            return "Q5_K"
        better = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
        return better.get(self._mix.name, self._mix.base)

    @property
    def _low_better(self) -> str:
        return "IQ3_S" if self._mix.name in _LOW_S else "Q2_K"


_Rule = Callable[[_Choice, Tensor], str]
_RULES: dict[str, _Rule] = {
    "value": _Choice.value,
    "key": _Choice.key,
    "query": _Choice.query,
    "down": _Choice.down,
    "attention output": _Choice.attention_output,
    "gate": _Choice.gate,
    "up": _Choice.up,
}
_LOW_RULES: dict[str, _Rule] = {
    "value": _Choice.low_value,
    "key": _Choice.low_key,
    "down": _Choice.low_down,
    "attention output": _Choice.low_attention_output,
}

#: Mix -> type of an embedding beside an output of its own.
_EMBEDDING = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}
_ATTENTION_OUTPUT = {
    **{"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"},
}
_OUTPUT_OF_8_EXPERTS = dict.fromkeys(
    (
        *("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M"),
        *("IQ3_S", "IQ3_M", "IQ4_XS"),
    ),
    "Q5_K",
)


def _group(name: str) -> str:
    """What the rules take a tensor for, "": nothing of it."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((group for part, group in _GROUPS.items() if part in name), "")


#: Part of a name -> group; the first that is in the name counts.
_GROUPS = {
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_q.weight": "query",
    "attn_output.weight": "attention output",
    "ffn_up": "up",
    "ffn_gate": "gate",
    "ffn_down": "down",
}


def _is_favoured(i: int, n: int) -> bool:
    """Whether layer i of n is among those with more bits: the first and last eighth, and every
    third between.
    """
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
