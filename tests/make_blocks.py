"""Regenerate tests/data/blocks.npz: normal numbers as `libgguf` quantises them, by type.

    python tests/make_blocks.py

Kept in a file, because the tables that some of the IQ types need take seconds to set up.
"""

from __future__ import annotations

from pathlib import Path

import libgguf
import numpy as np
import refmath
from tiny import quantise

from edge.files.tensor_types import TYPE_NUMBERS

DATA = Path(__file__).parent / "data" / "blocks.npz"
SHAPE = (3, 512)


def numbers() -> np.ndarray:
    """What was quantised, of SHAPE."""
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def main() -> None:
    """Write the file."""
    blocks, importance = {}, np.ones(SHAPE[1], np.float32)
    for name in refmath.TYPES:
        if name not in ("F32", "F16", "BF16"):
            if name.startswith("Q2_0"):  # which the package does not know
                blocks[name] = quantise(numbers(), name)
                continue
            blocks[name] = libgguf.quantize_rows(numbers(), TYPE_NUMBERS[name], importance)
    np.savez_compressed(DATA, **blocks)


if __name__ == "__main__":
    main()
