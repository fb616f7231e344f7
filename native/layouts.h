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
 * c4h32: 4-bit codes, one fp16 scale per row and group of 32.   288 bytes, 4.5 bits a weight
 *   one group = 16 rows x 32 k
 *   +----------------+------------------------------------------------------------------+
 *   | fp16 scale[16] | u8 code[4][64]  byte 4 r + t of step s: row r, k 8 s + t in the   |
 *   |                |                 low nibble, k 8 s + 4 + t in the high nibble      |
 *   +----------------+------------------------------------------------------------------+
 *   value = scale * (code - 8), or scale * table[code]
 *
 * c4mh32: the same with a minimum.                              320 bytes, 5 bits a weight
 *   +----------------+--------------+----------------+
 *   | fp16 scale[16] | fp16 min[16] | u8 code[4][64] |      value = scale * code + min
 *   +----------------+--------------+----------------+
 *
 * c8h32: 8-bit signed codes.                                    544 bytes, 8.5 bits a weight
 *   +----------------+------------------------------------------------------------------+
 *   | fp16 scale[16] | i8 code[8][64]  byte 4 r + t of step s: row r, k 4 s + t          |
 *   +----------------+------------------------------------------------------------------+
 *   value = scale * code
 *
 * Quantised activations (EDGE_BUFFER_Q8): columns (tokens) in tiles of kernels->tile, the last
 * tile as wide as what is left; a tile of c columns holds, for each group of 32 k:
 *   +-----------------+--------------+------------------+----------------------+
 *   | i8 code[c][32]  | f32 scale[c] | i32 minus_sum[c] | f32 scale_x_sum[c]   |   44 c bytes
 *   +-----------------+--------------+------------------+----------------------+
 *   scale = amax / 127, code = round-to-even(x * (127 / amax)), sum = that of the codes.
 */
#ifndef EDGE_LAYOUTS_H
#define EDGE_LAYOUTS_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

enum {
    PANEL_ROWS = 16,
    GROUP = 32,
    C4H32_BYTES = 288,
    C4MH32_BYTES = 320,
    C8H32_BYTES = 544,
    Q8_COLUMN_BYTES = 44, /* per group and column of quantised activations */
    PAGE_POSITIONS = 64,
    MAX_HEAD_DIM = 256
};

/* One row per layout. */
typedef struct {
    const char *name;
    int group;            /* k per group */
    int group_bytes;      /* of one panel */
    bool takes_q8;        /* activations: quantised, or float32 */
} layout_info;

extern const layout_info layout_table[EDGE_N_LAYOUTS];

/* Values of the IQ4_NL codes, a fact of the format. */
extern const int8_t iq4_nl_values[16];

static inline int64_t panel_count(int64_t n) { return (n + PANEL_ROWS - 1) / PANEL_ROWS; }

static inline int64_t panel_bytes(int32_t layout, int64_t k) {
    const layout_info *l = &layout_table[layout];
    return (k + l->group - 1) / l->group * l->group_bytes;
}

#endif
