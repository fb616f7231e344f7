"""The weight types that a GGUF file can hold, with the numbers, names and sizes of ggml."""

from __future__ import annotations

from typing import NamedTuple


class TensorType(NamedTuple):
    """How a row of weights is stored: in blocks of `block` elements and `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int


#: Files number blocks of both sizes 42; a fork of ggml writes the large ones. The offsets of a
#: file's tensors tell which it has.
_Q2_0, _Q2_0_128 = 42, 42 | 128 << 16

#: Number in the file -> type: all types that ggml stores today, also those that edge cannot run.
TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 36),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
    _Q2_0: TensorType("Q2_0", 64, 18),
    _Q2_0_128: TensorType("Q2_0_128", 128, 34),
}

#: A type whose blocks may be larger than its number says -> the type with the larger blocks.
LARGER_BLOCKS = {TENSOR_TYPES[_Q2_0].name: TENSOR_TYPES[_Q2_0_128]}

#: Name of a type -> its number.
TYPE_NUMBERS = {t.name: number for number, t in TENSOR_TYPES.items()}


def type_name(number: int) -> str:
    """GGUF's spelling of a type; `type 99` for a number that edge does not know: a newer type, or
    one that ggml has removed.
    """
    known = TENSOR_TYPES.get(number)
    return known.name if known else f"type {number}"
