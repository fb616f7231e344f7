"""The native ops of a plan, and the buffers that they read and write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from edge.native import ffi, lib

F32: int = lib.EDGE_BUFFER_F32
Q8: int = lib.EDGE_BUFFER_Q8
Q8X2: int = lib.EDGE_BUFFER_Q8X2
LOGITS: int = lib.EDGE_BUFFER_LOGITS
#: The most weights of an op.
MAX_WEIGHTS = len(ffi.new("edge_op *").w)


@dataclass
class Buffer:
    """A value in the arena: (rows, dim).

    kind: F32, Q8, Q8X2 or LOGITS; logit_rows: it has rows for the tokens whose logits are wanted,
    else for all tokens; first, last: the ops that write it first and read it last; offset: bytes.
    """

    kind: int
    dim: int
    logit_rows: bool
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclass(frozen=True)
class _PlanOp:
    """The fields of every native op. Further fields of a subclass are named as in edge_op.

    kind: the name in edge_op_kind, lower case; inputs, output: buffers; weights: their names.
    """

    kind: ClassVar[str]
    inputs: tuple[int, ...]
    output: int
    weights: tuple[str, ...]

    def native(
        self, index: Mapping[str, int], places: Mapping[int, tuple[int, int]]
    ) -> dict[str, int | float | list[int]]:
        """The fields of its edge_op. index: weight -> index; places: see `KVLayout.places`."""
        fields: dict[str, int | float | list[int]] = asdict(self)
        for name in ("inputs", "output", "weights"):
            del fields[name]
        fields["kind"] = getattr(lib, f"EDGE_OP_{self.kind.upper()}")
        fields["in"], fields["in2"] = (*self.inputs, -1, -1)[:2]
        fields["out"] = self.output
        indices = [index[name] for name in self.weights]
        fields["w"] = indices + [-1] * (MAX_WEIGHTS - len(indices))
        return fields


@dataclass(frozen=True)
class PlanEmbed(_PlanOp):
    """The row of a table for each token."""

    kind = "embed"


@dataclass(frozen=True)
class PlanAngles(_PlanOp):
    """cos and sin of the angles of `Rope`, by position: (rows, n_rot)."""

    kind = "angles"
    n_rot: int
    base: float
    scale: float
    magnitude: float
    has_ramp: bool = False
    ramp_low: float = 0.0
    ramp_high: float = 0.0


@dataclass(frozen=True)
class PlanNorm(_PlanOp):
    """A norm of whole vectors; quantised if the output buffer is."""

    kind = "norm"
    eps: float
    centred: bool


@dataclass(frozen=True)
class PlanQuantize(_PlanOp):
    """The quantised form of a value."""

    kind = "quantize"


@dataclass(frozen=True)
class PlanMatmul(_PlanOp):
    """Products side by side, from `column` of the output on, plus the second input, if any."""

    kind = "matmul"
    column: int


@dataclass(frozen=True)
class PlanGatedMatmul(_PlanOp):
    """activation(gate x) * (up x)."""

    kind = "gated_matmul"
    activation: int


@dataclass(frozen=True)
class PlanGated(_PlanOp):
    """activation(gate) * up; the input is [gate | up]."""

    kind = "gated"
    activation: int


@dataclass(frozen=True)
class PlanAdd(_PlanOp):
    """A sum."""

    kind = "add"


@dataclass(frozen=True)
class _PlanHeads(_PlanOp):
    """An op on the [q | k | v] of a layer."""

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def native(
        self, index: Mapping[str, int], places: Mapping[int, tuple[int, int]]
    ) -> dict[str, int | float | list[int]]:
        fields = super().native(index, places)
        fields["group"], fields["layer"] = places[self.layer]
        return fields


@dataclass(frozen=True)
class PlanStore(_PlanHeads):
    """Rotate queries and keys in place by the second input, if any; store keys and values."""

    kind = "store"
    n_rot: int = 0
    interleaved: bool = False


@dataclass(frozen=True)
class PlanAttention(_PlanHeads):
    """Attention of the queries over the cache. weights: the sinks, if any."""

    kind = "attention"
    window: int
    attention_scale: float
    softcap: float


@dataclass(frozen=True)
class PlanRotate(_PlanOp):
    """Rotate the first heads in place by the second input."""

    kind = "rotate"
    n_heads: int
    head_dim: int
    n_rot: int
    interleaved: bool


@dataclass(frozen=True)
class PlanTemperature(_PlanOp):
    """The first n elements times a factor of the position, in place."""

    kind = "temperature"
    n: int
    beta: float
    length: int


@dataclass(frozen=True)
class PlanSparsify(_PlanOp):
    """Of the first n elements what is above their mean and scale standard deviations."""

    kind = "sparsify"
    n: int
    scale: float


@dataclass(frozen=True)
class PlanRescale(_PlanOp):
    """The first input, as large as the second; eps: the least mean square of the first."""

    kind = "rescale"
    eps: float


@dataclass(frozen=True)
class PlanGather(_PlanOp):
    """The rows whose logits are wanted."""

    kind = "gather"


@dataclass(frozen=True)
class PlanHeadNorm(_PlanOp):
    """A norm of each head, from `column` on."""

    kind = "head_norm"
    column: int
    n_heads: int
    head_dim: int
    eps: float
    centred: bool


@dataclass(frozen=True)
class PlanBias(_PlanOp):
    """The input plus vectors side by side, from `column` on."""

    kind = "bias"
    column: int


@dataclass(frozen=True)
class PlanGain(_PlanOp):
    """The input, but n elements from `column` on times a vector of n or of one element."""

    kind = "gain"
    column: int
    n: int


@dataclass(frozen=True)
class PlanScale(_PlanOp):
    """The input times a number."""

    kind = "scale"
    scale: float


@dataclass(frozen=True)
class PlanActivate(_PlanOp):
    """activation(x)."""

    kind = "activate"
    activation: int


@dataclass(frozen=True)
class PlanXielu(_PlanOp):
    """See `Xielu`."""

    kind = "xielu"
    alpha_p: float
    alpha_n: float
    beta: float
    eps: float


@dataclass(frozen=True)
class PlanSoftcap(_PlanOp):
    """softcap * tanh(x / softcap)."""

    kind = "softcap"
    softcap: float


@dataclass(frozen=True)
class PlanMultiply(_PlanOp):
    """A product; the second input has as many elements as the first, or one."""

    kind = "multiply"


@dataclass(frozen=True)
class PlanSlice(_PlanOp):
    """Elements of the input, from `column` on."""

    kind = "slice"
    column: int


@dataclass(frozen=True)
class PlanRoute(_PlanOp):
    """A token's experts and their weights. score: an edge_score."""

    kind = "route"
    n_experts: int
    n_used: int
    score: int
    is_normed: bool
    expert_scale: float


@dataclass(frozen=True)
class _PlanExperts(_PlanOp):
    """An op on the pairs of a token and one of its experts, in columns ordered by expert."""

    n_experts: int
    n_used: int


@dataclass(frozen=True)
class PlanExpertColumns(_PlanExperts):
    """The order of the pairs, by the second input, and a column of the first one for each."""

    kind = "expert_columns"


@dataclass(frozen=True)
class PlanExpertMatmul(_PlanExperts):
    """Products with the weights of each column's expert, from `column` of the output on."""

    kind = "expert_matmul"
    column: int


@dataclass(frozen=True)
class PlanExpertGain(_PlanExperts):
    """n elements of each column from `column` on times its expert's number, in place."""

    kind = "expert_gain"
    column: int
    n: int


@dataclass(frozen=True)
class PlanExpertGated(_PlanExperts):
    """activation(gate) * up, after biases, if any; the input is [gate | up]."""

    kind = "expert_gated"
    activation: int


@dataclass(frozen=True)
class PlanExpertSum(_PlanExperts):
    """The weighted sum of each token's columns, after a bias, if any."""

    kind = "expert_sum"


#: Any native op.
PlanOp = (
    PlanEmbed
    | PlanAngles
    | PlanNorm
    | PlanQuantize
    | PlanMatmul
    | PlanGatedMatmul
    | PlanGated
    | PlanAdd
    | PlanStore
    | PlanAttention
    | PlanRotate
    | PlanTemperature
    | PlanSparsify
    | PlanRescale
    | PlanGather
    | PlanHeadNorm
    | PlanBias
    | PlanGain
    | PlanScale
    | PlanActivate
    | PlanXielu
    | PlanSoftcap
    | PlanMultiply
    | PlanSlice
    | PlanRoute
    | PlanExpertColumns
    | PlanExpertMatmul
    | PlanExpertGain
    | PlanExpertGated
    | PlanExpertSum
)
