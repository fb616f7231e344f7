"""Write grids.c, from the tables of the `gguf` package.

python native/formats/generate_grids.py > native/formats/grids.c
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import quants

#: Layout -> the type that it holds.
LAYOUTS = {
    "G8X4B32": "IQ3_XXS",
    "G9X4B32": "IQ3_S",
    "G8X8B32": "IQ2_XXS",
    "G9X8B16": "IQ2_XS",
    "G10X8B16": "IQ2_S",
}

HEAD = """\
/* Grids of the IQ types: which codes an index stands for. Written by generate_grids.py.
 *
 * An entry has 16 bits: 4 weights of 4 bits or 8 of 2, the first in the lowest. Those of compact
 * layouts are here whole, and in bytes, low and high, which is how byte permutes look them up.
 */
#include <stddef.h>

#include "formats.h"

/* clang-format off */
"""

GRID_OF = """\
/* clang-format on */

const grid_info *grid_of(int32_t layout) {
    static const grid_info grids[EDGE_N_LAYOUTS] = {
%s    };
    if (layout < 0 || layout >= EDGE_N_LAYOUTS || grids[layout].low == NULL) {
        return NULL;
    }
    return &grids[layout];
}
"""


def entries(type_name: str) -> np.ndarray:
    """(entries,) uint16 of a type's grid."""
    kind = getattr(quants, type_name)
    kind.init_grid()
    values = kind.grid.reshape(kind.grid_shape)
    codes = np.searchsorted(kind.grid_map, values).astype(np.uint16)  # grid_map ascends
    bits = 16 // codes.shape[1]
    return (codes << (bits * np.arange(codes.shape[1], dtype=np.uint16))).sum(1, dtype=np.uint16)


def array(declaration: str, values: np.ndarray) -> Iterator[str]:
    """The lines of a C array, hexadecimal."""
    digits = values.dtype.itemsize * 2
    per_line = 96 // (digits + 4)
    yield f"{declaration}[{values.size}] = {{\n"
    for i in range(0, values.size, per_line):
        yield "    " + ", ".join(f"0x{v:0{digits}x}" for v in values[i : i + per_line]) + ",\n"
    yield "};\n\n"


def text() -> str:
    """The whole of grids.c."""
    parts, rows = [HEAD], []
    for layout, type_name in LAYOUTS.items():
        grid, name = entries(type_name), type_name.lower()
        weights = int(layout.split("X")[1][0])
        bits = grid.size.bit_length() - 1
        parts += array(f"static const uint16_t {name}_entries", grid)
        for half, shift in (("low", 0), ("high", 8)):
            values = (grid >> shift).astype(np.uint8)
            parts += array(f"static const _Alignas(64) uint8_t {name}_{half}", values)
        rows.append(
            f"        [EDGE_LAYOUT_{layout}] = "
            f"{{{name}_entries, {name}_low, {name}_high, {bits}, {weights}}},\n"
        )
    parts += array("const uint16_t iq1_grid", entries("IQ1_S"))
    return "".join(parts) + GRID_OF % "".join(rows)


if __name__ == "__main__":
    print(text(), end="")
