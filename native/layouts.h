/* Panel layouts: how packed weights and quantised activations lie in memory.
 *
 * A panel is 16 output rows on every instruction set, so packed weights are portable. A lane is
 * an output row: no horizontal sums, one scale vector per group, activations broadcast.
 *
 * f32, f16, bf16: one step = 16 rows of one k
 *   +------------------------------+
 *   | value[16], row 0 .. row 15   |   x k
 *   +------------------------------+
 *
 * The others keep two groups of 32 k together, so that codes start on a cache line: a 64-byte
 * load across two lines costs what it would take to read both. An odd last group has an empty twin.
 *
 * c4h32: 4-bit codes, one fp16 scale per row and group of 32.   576 bytes, 4.5 bits a weight
 *   +-------------------+---------------------------------------------------------------+
 *   | fp16 scale[2][16] | u8 code[2][4][64]  byte 4 r + t of step s: row r, k 8 s + t   |
 *   |                   |                    low nibble, k 8 s + 4 + t high nibble      |
 *   +-------------------+---------------------------------------------------------------+
 *   value = scale * (code - 8), or scale * table[code]
 *
 * c4mh32: the same with a minimum.                              640 bytes, 5 bits a weight
 *   +-------------------+-----------------+-------------------+
 *   | fp16 scale[2][16] | fp16 min[2][16] | u8 code[2][4][64] |   value = scale * code + min
 *   +-------------------+-----------------+-------------------+
 *
 * c8h32: 8-bit signed codes.                                    1088 bytes, 8.5 bits a weight
 *   +-------------------+---------------------------------------------------------------+
 *   | fp16 scale[2][16] | i8 code[2][8][64]  byte 4 r + t of step s: row r, k 4 s + t   |
 *   +-------------------+---------------------------------------------------------------+
 *   value = scale * code
 *
 * Quantised activations (EDGE_BUFFER_Q8): columns (tokens) in tiles of kernels->tile, the last
 * tile as wide as what is left; a tile of c columns holds, for each group of 32 k:
 *   +-------------------+--------------+------------------+----------------------+
 *   | i8 code[8][c][4]  | f32 scale[c] | i32 minus_sum[c] | f32 scale_x_sum[c]   |   44 c bytes
 *   +-------------------+--------------+------------------+----------------------+
 *   code[s][j][t]: k 4 s + t of column j, so that the kernel reads one address after the other.
 *   scale = amax / 127, code = round-to-even(x * (127 / amax)), sum = that of the codes.
 * EDGE_BUFFER_Q8X2 has two columns per token, 2 i and 2 i + 1: the second holds x - scale * code of
 * the first, so that their products add up to some 15 bits. Where weights are read once for a few
 * columns, as for the output head, the second column is free.
 */
#ifndef EDGE_LAYOUTS_H
#define EDGE_LAYOUTS_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

enum {
    PANEL_ROWS = 16,
    GROUP = 32,
    SCALES_BYTES = 4 * PANEL_ROWS, /* fp16 of 16 rows and two groups */
    C4_CODES_BYTES = 256,          /* of 16 rows and one group */
    C8_CODES_BYTES = 512,
    Q8_COLUMN_BYTES = 44, /* per group and column of quantised activations */
    MAX_DIM = 1 << 24,    /* of a vector of activations */
    PAGE_POSITIONS = 64,
    MAX_HEAD_DIM = 256
};

/* One row per layout. */
typedef struct {
    const char *name;
    int block;        /* k that lie together in a panel */
    int block_bytes;  /* of one panel */
    int header_bytes; /* of a block: scales and minima, before the codes */
    int codes_bytes;  /* of one group of 32; 0: no codes */
    bool takes_q8;    /* activations: quantised, or float32 */
} layout_info;

extern const layout_info layout_table[EDGE_N_LAYOUTS];

/* Values of the IQ4_NL codes, a fact of the format. */
extern const int8_t iq4_nl_values[16];

static inline int64_t panel_count(int64_t n) { return (n + PANEL_ROWS - 1) / PANEL_ROWS; }

static inline int64_t panel_bytes(int32_t layout, int64_t k) {
    const layout_info *l = &layout_table[layout];
    return (k + l->block - 1) / l->block * l->block_bytes;
}

#endif
