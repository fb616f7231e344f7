"""Regenerate tests/data/encoded.npz: weights as `libgguf` quantises them, to the types for which it
builds tables for many seconds.

    python tests/make_encoded.py

Keys are "<type> <kind of importance> <case>", values blocks (3, bytes of a row).
"""

from __future__ import annotations

import functools
from pathlib import Path

import libgguf
import numpy as np

from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS

DATA = Path(__file__).parent / "data" / "encoded.npz"
#: Types whose blocks are kept -> kinds of importance that these take.
KEPT = {
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS"), ("positive", "with zeros")),
    **dict.fromkeys(("IQ1_M", "IQ2_S"), ("none", "positive", "with zeros")),
}
KINDS = ("none", "positive", "with zeros")
#: What is special about some weights -> blocks of a row.
CASES = {
    "one block": 1,
    "three blocks": 3,
    "zeros": 2,
    "minus zeros": 1,
    "a block of zeros": 3,
    "one huge": 2,
    "tiny": 2,
    "denormal": 2,
    "negative": 2,
    "constant": 2,
    "spread": 2,
    "halves": 3,
}


def weights(case: str, type_name: str) -> np.ndarray:
    """(3, k) float32, k a multiple of 32."""
    block = max(TENSOR_TYPES[TYPE_NUMBERS[type_name]].block, 32)
    rng = np.random.default_rng(len(case))
    x = rng.normal(size=(3, CASES[case] * block))
    if "zeros" in case:
        x[:, : 2 * block] *= -0.0 if "minus" in case else 0.0
    elif case == "one huge":
        x[1, block // 3] = 2000
    elif case in ("tiny", "denormal"):
        x *= 1e-9 if case == "tiny" else 1e-41
    elif case == "negative":
        x = -np.abs(x)
    elif case == "constant":
        x[...] = [[0.3], [-0.7], [1e-3]]
    elif case == "spread":
        x = np.ldexp(x, rng.integers(-40, 10, x.shape))
    elif case == "halves":
        x = rng.integers(-24, 25, x.shape) / 2
    return x.astype(np.float32)


def importance(kind: str, k: int) -> np.ndarray | None:
    """None, or (k,) float32, with zeros in some columns."""
    if kind == "none":
        return None
    out = np.random.default_rng(k).normal(size=k).astype(np.float32) ** 2
    if kind == "with zeros":
        out[::3] = 0
    return out


@functools.cache
def kept() -> dict[str, np.ndarray]:
    """The blocks of the file."""
    return dict(np.load(DATA))


def reference(type_name: str, x: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    """The blocks of libgguf, (n, bytes of a row)."""
    return libgguf.quantize_rows(x, TYPE_NUMBERS[type_name], counts).view(np.uint8)


def main() -> None:
    """Write the file."""
    blocks = {}
    for type_name, kinds in KEPT.items():
        for kind in kinds:
            for case in CASES:
                x = weights(case, type_name)
                counts = importance(kind, x.shape[1])
                blocks[f"{type_name} {kind} {case}"] = reference(type_name, x, counts)
    np.savez_compressed(DATA, **blocks)


if __name__ == "__main__":
    main()
