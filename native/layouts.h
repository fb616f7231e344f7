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
 * Codes. A group of 32 k is eight steps of 4 k: step s, byte t is k 16 (s / 4) + 4 t + s % 4, so
 * that a byte that holds 4 weights in the file holds the same 4 in a panel. A vector of 64 bytes is
 * 16 rows of one step, row r in bytes 4 r .. 4 r + 3. Codes of 8 bits are eight such vectors; the
 * others are cut into planes of 4, 2 or 1 bits (5 = 4 + 1, 6 = 4 + 2, 3 = 2 + 1: low bits first),
 * and a plane of w bits is w vectors, whose bytes hold 8 / w steps, the first in the lowest bits:
 *   +----------------------+----------------------+
 *   | u8 low plane[w][64]  | u8 high plane[v][64] |   64 (w + v) bytes: w + v bits a weight
 *   +----------------------+----------------------+
 *
 * h32, h64, h128, e32: a float16 (h) or bfloat16 (e) scale per row and 32, 64 or 128 k. What two
 * scales belong to lies together, so that codes start on a cache line: a 64-byte load across two
 * lines costs what it would take to read both. An odd last scale has an empty twin.
 *   +----------------+-----------------------+-------------------------------+
 *   | scale[2][16]   | m only: min[2][16]    | codes of 2, 4 or 8 groups     |
 *   +----------------+-----------------------+-------------------------------+
 *   value = scale * v (+ min); v: the code, minus a zero, or through a table: see tables.h.
 *   c4h32 4.5, c4mh32 5, c5h32 5.5, c5mh32 6, c8h32 8.5, c4e32 4.5 bits a weight,
 *   c2h64 2.25, c2h128 2.13, c1h128 1.13
 *
 * u16: an unsigned float of 8 bits per row and 16 k: m in the low nibble, e in the high one.
 *   +-------------------+-------------------+
 *   | u8 scale[2][2][16]| codes of 2 groups |   value = m * 2^(e - 10) * v        c4u16 4.5 bits
 *   +-------------------+-------------------+
 *
 * b32, b16: super-blocks of 256 k, one float16 per row for all, and a small integer per row and
 * group of 32 or 16. The floats of all blocks come first, up to a multiple of 64 bytes:
 *   +----------------------------------------+------------------------------------------+
 *   | f16 d[16] (m: and f16 dmin[16])        | per block: integers, codes of 8 groups   |
 *   | per block                              |                                          |
 *   +----------------------------------------+------------------------------------------+
 *   value = d * unit * integer * v (- dmin * minimum)
 *   b32   i8 scale[8][16]                                  c2b32 2.31, c3b32 3.31, c4b32 4.31
 *   b16   i8 scale[8][2][16]                               c3b16 3.56, c6b16 6.56
 *   mb32  u8 a[8][16]: scale, 6 bits, | minimum >> 4 << 6;
 *         u8 b[4][16]: minimum & 15 of groups 2 i low, 2 i + 1 high
 *                                                          c4mb32 4.5, c5mb32 5.5
 *   mb16  u8 a[8][2][16]: scale low, minimum high nibble   c2mb16 2.63
 *
 * g<n>x<w>: super-blocks as above, whose codes are indices of n bits into a grid of w weights, and
 * signs; integers are 4 bits s and stand for 2 s + 1.
 *   +------------------------------+-----------------------------+------------------------------+
 *   | b32: u8 s[4][16] as b above  | u64 high[8][vectors][n - 8] | per group: u8 index[v][64],  |
 *   | b16: u8 s[8][16], low nibble | bit i: bit 8 (9) of index i | plane of 1 bit: signs        |
 *   |      k 0..15, high k 16..31  |                             |                              |
 *   +------------------------------+-----------------------------+------------------------------+
 *   x4: vector v, byte 4 r + t: the index of k 16 v + 4 t .. + 3 of row r
 *   x8: one vector, byte 16 (r / 4) + 8 h + 2 (r % 4) + i: the index of k 16 h + 8 i .. + 7
 *   g8x4b32 3.19, g9x4b32 3.44, g8x8b32 2.19, g9x8b16 2.44, g10x8b16 2.56 bits a weight
 *
 * Quantised activations (EDGE_BUFFER_Q8): columns (tokens) in tiles of kernels->tile, the last
 * tile as wide as what is left; a tile of c columns holds, for each group of 32 k, 48 c bytes:
 *   +------------------+--------------+------------------+------------------------+--------------+
 *   | i8 code[8][c][4] | f32 scale[c] | i32 minus_sum[c] | i16 minus_halves[c][2] | f32 total[c] |
 *   +------------------+--------------+------------------+------------------------+--------------+
 * code[s][j][t] is step s, byte t of column j, so that the kernel reads one address after the
 * other; scale = amax / 127, code = round-to-even(x * (127 / amax)). minus_sum is minus the sum of
 * the codes, minus_halves minus those of k 0..15 and of k 16..31, total the scale times the sum.
 *
 * EDGE_BUFFER_Q8X2 has two columns per token, 2 i and 2 i + 1. The second one holds what the first
 * lost by rounding, x - scale * code. Both products are added, which is as good as codes of some 15
 * bits. Where a few columns wait for the weights, as in the output head, it costs no time.
 */
#ifndef EDGE_LAYOUTS_H
#define EDGE_LAYOUTS_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

enum {
    LAYOUT_VERSION = 1, /* raise it with every change of a drawing above */
    PANEL_ROWS = 16,
    ALIGNMENT = 64, /* of what the API says is aligned, bytes */
    GROUP = 32,
    SUPER = 256,
    STEPS = 8,            /* of a group */
    PLANE_BYTES = 64,     /* of one bit of a group of 16 rows */
    Q8_COLUMN_BYTES = 48, /* per group and column of quantised activations */
    MAX_DIM = 1 << 24,    /* of a vector of activations */
    PAGE_POSITIONS = 64,
    MAX_HEAD_DIM = 512,
    MAX_EXPERTS = 1024,   /* of a layer */
    MAX_EXPERTS_USED = 64 /* by a token */
};

typedef enum { SCALE_NONE, SCALE_H, SCALE_E, SCALE_U, SCALE_B, SCALE_GRID } scale_kind;

/* One row per layout. */
typedef struct {
    const char *name;
    scale_kind kind; /* NONE: floats */
    int bits;        /* of a code; of a float */
    int group;       /* k of a scale */
    bool has_min;
    int block;        /* k that lie together in a panel */
    int front_bytes;  /* of a block, before all blocks */
    int header_bytes; /* of a block, before its codes */
    int codes_bytes;  /* of a group */
    uint32_t tables;  /* bit i: may have table i */
    int index_bits;   /* of a grid */
    int weights;      /* of an entry of it */
} layout_info;

#define T(name) (1u << EDGE_TABLE_##name)
#define FLOATS(name, bits) {name, SCALE_NONE, bits, 0, false, 1, 0, 0, 0, T(NONE), 8, 8}
/* Two float scales, of `group` k each. */
#define GROUPS(name, kind, bits, group, min, tables)                                               \
    {name,   kind, bits, group, min, 2 * (group), 0, 64 * (1 + (min)), PLANE_BYTES * (bits),       \
     tables, 8,    8}
/* Four scales of 8 bits, of 16 k each. */
#define BYTES(name, bits, tables)                                                                  \
    {name, SCALE_U, bits, 16, false, 2 * GROUP, 0, 64, PLANE_BYTES * (bits), tables, 8, 8}
/* Super-blocks; min of groups of 32: 12 bits for scale and minimum, else 8. */
#define SUPERS(name, bits, group, min, tables)                                                     \
    {name,                                                                                         \
     SCALE_B,                                                                                      \
     bits,                                                                                         \
     group,                                                                                        \
     min,                                                                                          \
     SUPER,                                                                                        \
     2 * PANEL_ROWS * (1 + (min)),                                                                 \
     (min) && (group) == GROUP ? 192 : PANEL_ROWS * (SUPER / (group)),                             \
     PLANE_BYTES * (bits),                                                                         \
     tables,                                                                                       \
     8,                                                                                            \
     8}
#define GRID(name, index, weights, group, table)                                                   \
    {name,                                                                                         \
     SCALE_GRID,                                                                                   \
     (weights) == 4 ? 4 : 3,                                                                       \
     group,                                                                                        \
     false,                                                                                        \
     SUPER,                                                                                        \
     2 * PANEL_ROWS,                                                                               \
     64 * (GROUP / (group)) + ((index) - 8) * PANEL_ROWS * (SUPER / (weights)) / 8,                \
     PANEL_ROWS * (GROUP / (weights)) + PLANE_BYTES,                                               \
     table,                                                                                        \
     index,                                                                                        \
     weights}

/* It stands in a header, so that the compiler knows the layout that it makes a kernel for. */
static const layout_info layout_table[EDGE_N_LAYOUTS] = {
    [EDGE_LAYOUT_F32] = FLOATS("f32", 32),
    [EDGE_LAYOUT_F16] = FLOATS("f16", 16),
    [EDGE_LAYOUT_BF16] = FLOATS("bf16", 16),
    [EDGE_LAYOUT_C4H32] = GROUPS("c4h32", SCALE_H, 4, GROUP, false, T(MINUS_8) | T(IQ4_NL)),
    [EDGE_LAYOUT_C4MH32] = GROUPS("c4mh32", SCALE_H, 4, GROUP, true, T(NONE)),
    [EDGE_LAYOUT_C5H32] = GROUPS("c5h32", SCALE_H, 5, GROUP, false, T(MINUS_16)),
    [EDGE_LAYOUT_C5MH32] = GROUPS("c5mh32", SCALE_H, 5, GROUP, true, T(NONE)),
    [EDGE_LAYOUT_C8H32] = GROUPS("c8h32", SCALE_H, 8, GROUP, false, T(NONE)),
    [EDGE_LAYOUT_C4E32] = GROUPS("c4e32", SCALE_E, 4, GROUP, false, T(MXFP4)),
    [EDGE_LAYOUT_C2B32] = SUPERS("c2b32", 2, 32, false, T(MINUS_1)),
    [EDGE_LAYOUT_C2MB16] = SUPERS("c2mb16", 2, 16, true, T(NONE)),
    [EDGE_LAYOUT_C3B32] = SUPERS("c3b32", 3, 32, false, T(IQ2) | T(IQ1)),
    [EDGE_LAYOUT_C3B16] = SUPERS("c3b16", 3, 16, false, T(MINUS_4) | T(IQ2) | T(IQ1)),
    [EDGE_LAYOUT_C4B32] = SUPERS("c4b32", 4, 32, false, T(IQ4_NL) | T(IQ3_S) | T(IQ3_XXS)),
    [EDGE_LAYOUT_C4MB32] = SUPERS("c4mb32", 4, 32, true, T(NONE)),
    [EDGE_LAYOUT_C5MB32] = SUPERS("c5mb32", 5, 32, true, T(NONE)),
    [EDGE_LAYOUT_C6B16] = SUPERS("c6b16", 6, 16, false, T(MINUS_32)),
    [EDGE_LAYOUT_G8X4B32] = GRID("g8x4b32", 8, 4, 32, T(IQ3_XXS)),
    [EDGE_LAYOUT_G9X4B32] = GRID("g9x4b32", 9, 4, 32, T(IQ3_S)),
    [EDGE_LAYOUT_G8X8B32] = GRID("g8x8b32", 8, 8, 32, T(IQ2)),
    [EDGE_LAYOUT_G9X8B16] = GRID("g9x8b16", 9, 8, 16, T(IQ2)),
    [EDGE_LAYOUT_G10X8B16] = GRID("g10x8b16", 10, 8, 16, T(IQ2)),
    [EDGE_LAYOUT_C1H128] = GROUPS("c1h128", SCALE_H, 1, 128, false, T(SIGN)),
    [EDGE_LAYOUT_C2H64] = GROUPS("c2h64", SCALE_H, 2, 64, false, T(MINUS_1)),
    [EDGE_LAYOUT_C2H128] = GROUPS("c2h128", SCALE_H, 2, 128, false, T(MINUS_1)),
    [EDGE_LAYOUT_C4U16] = BYTES("c4u16", 4, T(MXFP4)),
};
#undef T
#undef FLOATS
#undef GROUPS
#undef BYTES
#undef SUPERS
#undef GRID

/* One group of a tile of quantised activations, from some column on. */
typedef struct {
    const int8_t *codes; /* (8, stride, 4) */
    int stride;          /* columns of the tile */
    const float *scale;
    const int32_t *minus_sum;
    const int16_t *minus_halves; /* (columns, 2) */
    const float *total;
} q8_group;

static inline q8_group q8_at(const void *tile, int64_t i_group, int columns, int first) {
    const uint8_t *p = (const uint8_t *)tile + i_group * Q8_COLUMN_BYTES * columns;
    const uint8_t *rest = p + GROUP * columns + 4 * first;
    return (q8_group){(const int8_t *)p + 4 * first,
                      columns,
                      (const float *)rest,
                      (const int32_t *)(rest + 4 * columns),
                      (const int16_t *)(rest + 8 * columns),
                      (const float *)(rest + 12 * columns)};
}

/* Matmul columns that hold `rows` rows of a buffer. */
static inline int64_t buffer_columns(int32_t kind, int64_t rows) {
    return kind == EDGE_BUFFER_Q8X2 ? 2 * rows : rows;
}

static inline bool takes_q8(int32_t layout) { return layout_table[layout].kind != SCALE_NONE; }

static inline int64_t panel_count(int64_t n) { return (n + PANEL_ROWS - 1) / PANEL_ROWS; }

static inline int block_bytes(const layout_info *l) {
    return l->kind == SCALE_NONE ? PANEL_ROWS * l->bits / 8
                                 : l->header_bytes + l->block / GROUP * l->codes_bytes;
}

static inline int64_t front_bytes(const layout_info *l, int64_t n_blocks) {
    return (n_blocks * l->front_bytes + 63) / 64 * 64;
}

static inline int64_t panel_bytes(int32_t layout, int64_t k) {
    const layout_info *l = &layout_table[layout];
    const int64_t n_blocks = (k + l->block - 1) / l->block;
    return front_bytes(l, n_blocks) + n_blocks * block_bytes(l);
}

#endif
