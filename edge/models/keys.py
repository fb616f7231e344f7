"""The metadata keys `<architecture>.*`: which of them edge knows, and how it reads them.

Most of these keys state a number of the arithmetic, so none is ignored without a reason. Either a
key is read, or its value changes nothing, or the file is refused with the key's name in the
message. A key that is in none of the tables is named in a warning. Names and meanings are those of
the GGUF format, as llama.cpp reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edge.errors import ModelFileError, UnsupportedError, brief

#: Keys that `Config.read`, `rope_of` or an architecture read: they use the value, or compare it
#: with the tensors.
READ = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
        "vocab_size",
    }
)

#: Keys that change no logits -> why.
HARMLESS = {
    key: why
    for why, keys in {
        "the width of the shared expert says it": ("expert_shared_count",),
        "how it was trained": ("rope.scaling.finetuned",),
        "of embeddings of whole texts": ("pooling_type", "classifier.output_labels"),
    }.items()
    for key in keys
}

#: Keys that are not built -> the values with which they change nothing. In a list, each entry must
#: be one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.q_lora_rank": (0,),
    "attention.recurrent_layers": (False,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_length_per_layer_input": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "hidden_activation": ("silu", "swish"),
    "logit_scale": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
    "swiglu_clamp_shexp": (0,),
    "swin_norm": (False,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
    "use_parallel_residual": (False,),
}

#: Keys of experts -> the values with which they change nothing; any value where a file has none.
EXPERTS: dict[str, tuple[Any, ...]] = {
    "expert_chunk_feed_forward_length": (0,),
    "expert_feed_forward_length": (0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_scale": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0, 1),
    "experts_per_group": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "moe_latent_size": (0,),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
}

#: Keys that are not built -> the key whose value they must repeat.
SAME = {
    "attention.key_length_swa": "attention.key_length",
    "attention.value_length_swa": "attention.value_length",
    "embedding_length_out": "embedding_length",
    "rope.dimension_count_swa": "rope.dimension_count",
    "rope.freq_base_swa": "rope.freq_base",
}

#: How keys begin that change the arithmetic, and are not built, whatever their value: of recurrent
#: layers, of looped ones, of attention that selects tokens, of other branches beside the layers.
#: A key that is in a table above is built, or changes nothing.
NOT_BUILT = (
    "activation.",
    "adapters.",
    "attention.compress_",
    "attention.decay_lora_rank",
    "attention.gate_lora_rank",
    "attention.group_norm_",
    "attention.iclr_lora_rank",
    "attention.indexer.",
    "attention.key_length_mla",
    "attention.kv_lora_rank_swa",
    "attention.output_group_count",
    "attention.output_lora_rank",
    "attention.relative_buckets_count",
    "attention.rope_pattern",
    "attention.value_length_mla",
    "attention.value_residual_mix_lora_rank",
    "attn_res.",
    "conv_",
    "convnext.",
    "decision.",
    "decoder_block_count",
    "deepstack_mapping",
    "dense_",
    "expert_latent_length",
    "full_attention_interval",
    "hash_layer_count",
    "hrm.",
    "hyper_connection.",
    "kda.",
    "norm_before_",
    "num_loops",
    "ple.",
    "posnet.",
    "rescale_every_n_layers",
    "selector_",
    "shortconv.",
    "skip_loop_final_norm",
    "ssm.",
    "time_",
    "token_shift_count",
    "wkv.",
)

#: Prefixes of keys that change the arithmetic, but do not begin with the architecture's name. An
#: architecture that reads such keys names them whole.
_ELSEWHERE = ("xielu.", "diffusion.")

#: Unknown keys that a warning names; it counts the others.
_MOST_NAMED = 8

#: `general.quantization_version`: the version of the formats of the weight types.
_QUANTIZATION = 2


class Keys:
    """The metadata keys `<architecture>.<key>` of a file; each is checked when it is read. own:
    keys that the architecture's file reads.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        architecture: str,
        path: str,
        own: Collection[str] = (),
    ) -> None:
        self.metadata, self.architecture, self.path = metadata, architecture, path
        self.own = frozenset(own)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is in the file, not checked."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def error(self, key: str, message: str) -> ModelFileError:
        """The error to raise for a wrong value."""
        return ModelFileError(message, path=self.path, field=f"{self.architecture}.{key}")

    def not_built(self, key: str, message: str) -> UnsupportedError:
        """The error to raise for a valid value that edge cannot run."""
        field = f"{self.architecture}.{key}"
        return UnsupportedError(f"{self.path}, {field}: {message}", what=field)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        least: float,
        most: float = 2**31 - 1,
    ) -> float:
        """A number from `least` to `most`.

        Raises ModelFileError for any other value, and for a missing key without a default.
        """
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "the key is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "must be one number")
        if not least <= value <= most:  # NaN fails too
            raise self.error(key, f"{value} is out of range")
        return value

    def optional(self, key: str, default: float = 0, *, least: float, most: float) -> float:
        """A number from `least` to `most`, or 0, which stands for none. Errors: as of `number`."""
        if self.number(key, default, least=0, most=most) == 0:
            return 0
        return self.number(key, default, least=least, most=most)

    def whole(
        self,
        key: str,
        default: int | None = None,
        *,
        least: int = 1,
        most: int = 2**31 - 1,
    ) -> int:
        """A whole number from `least` to `most`; errors: as of `number`."""
        value = self.number(key, default, least=least, most=most)
        if value != int(value):
            raise self.error(key, f"{value} must be whole")
        return int(value)

    def softcap(self, key: str, default: float = 0) -> float:
        """What caps scores or logits; 0: nothing. Errors: as of `number`."""
        return self.optional(key, default, least=1e-3, most=1e4)

    def wholes(
        self,
        key: str,
        n_layers: int,
        default: int | None = None,
        *,
        least: int = 1,
        most: int = 2**31 - 1,
    ) -> list[int]:
        """A whole number for each layer: the file has one for all, or a list. Errors: as of
        `number`.
        """
        value = self.get(key)
        if not isinstance(value, list):
            return [self.whole(key, default, least=least, most=most)] * n_layers
        if len(value) != n_layers:
            raise self.error(key, f"{len(value)} values for {n_layers} layers")
        for number in value:
            if isinstance(number, bool) or not isinstance(number, int):
                raise self.error(key, f"{brief(number)} must be whole")
            if not least <= number <= most:
                raise self.error(key, f"{number} is out of range")
        return value

    def numbers(
        self, key: str, n_layers: int, default: float | None = None, *, least: float, most: float
    ) -> list[float]:
        """A number for each layer: the file has one for all, or a list. Errors: as of `number`."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.number(key, default, least=least, most=most)] * n_layers
        if len(value) != n_layers:
            raise self.error(key, f"{len(value)} values for {n_layers} layers")
        for number in value:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise self.error(key, f"{brief(number)} must be a number")
            if not least <= number <= most:  # NaN fails too
                raise self.error(key, f"{number} is out of range")
        return value

    def neutral(self, key: str, values: tuple[Any, ...]) -> None:
        """Raise UnsupportedError for a key that the file has with another value than these."""
        value = self.get(key)
        if value is None or all(_is_one_of(v, values) for v in _listed(value)):
            return
        raise self.not_built(key, f"{brief(value)} is not built, it must be {values[-1]!r}")

    def check(self) -> None:
        """Raise UnsupportedError for a key that changes the arithmetic and is not built."""
        n_experts = self.get("expert_count", 0)
        if n_experts != 0 and "expert_count" not in self.own:
            raise self.not_built(
                "expert_count",
                f"a mixture of {brief(n_experts)} experts, which is not built: take a dense model",
            )
        for key, values in (NEUTRAL | (EXPERTS if n_experts != 0 else {})).items():
            if key not in self.own:
                self.neutral(key, values)
        for key, other in SAME.items():
            value = None if key in self.own else self.get(key)
            if value is not None and value != self.get(other):
                raise self.not_built(key, f"{brief(value)} is not built, it must be as {other}")
        version = self.metadata.get("general.quantization_version", _QUANTIZATION)
        if version != _QUANTIZATION:
            raise UnsupportedError(
                f"{self.path}: blocks of quantization version {brief(version)}: convert it again",
                what=f"quantization version {brief(version)}",
                supported=[str(_QUANTIZATION)],
            )
        not_built = tuple(f"{self.architecture}.{key}" for key in NOT_BUILT)
        fields = [field for field in self._unknown() if field.startswith(not_built)]
        elsewhere = (field for field in self.metadata if field.startswith(_ELSEWHERE))
        fields += [field for field in elsewhere if field not in self.own]
        if fields:
            raise UnsupportedError(
                f"{self.path}: the key {brief(fields[0])} changes what the model computes, and is "
                "not built",
                what=brief(fields[0]),
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """A line that names the keys of the architecture that are in no table, if there are any."""
        unknown = self._unknown()
        if not unknown:
            return ()
        named = ", ".join(brief(field) for field in unknown[:_MOST_NAMED])
        more = len(unknown) - _MOST_NAMED
        named += f" and {more} more" if more > 0 else ""
        return (f"keys that no code reads, they may change what the model computes: {named}",)

    def _unknown(self) -> list[str]:
        """The keys of the architecture that are in no table, with its name before them."""
        known = READ | HARMLESS.keys() | NEUTRAL.keys() | EXPERTS.keys() | SAME.keys() | self.own
        prefix = f"{self.architecture}."
        fields = (field for field in self.metadata if field.startswith(prefix))
        return [field for field in fields if field.removeprefix(prefix) not in known]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether value equals one of `values`; here true is not equal to 1."""
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
