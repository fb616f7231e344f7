/* What codes stand for: facts of the formats. */
#ifndef EDGE_TABLES_H
#define EDGE_TABLES_H

#include "api.h"

/* value = unit * (shifted[code] - zero). Unsigned bytes, because the dot products of x86 multiply
 * unsigned by signed; max, their largest, says how many products fit 16 bits. zero is a power of
 * two, 1 << zero_shift, or 0 with zero_shift -1. */
typedef struct {
    uint8_t shifted[16];
    int32_t zero, zero_shift, max;
    float unit;
} code_table;

/* As bits, tables whose weights fit 0..31 around a zero of 16, and 0..127 around one of 64. */
enum {
    TABLES_TO_31 = 1 << EDGE_TABLE_MINUS_4 | 1 << EDGE_TABLE_IQ3_S | 1 << EDGE_TABLE_IQ1 |
        1 << EDGE_TABLE_MXFP4,
    TABLES_TO_127 = 1 << EDGE_TABLE_IQ3_XXS | 1 << EDGE_TABLE_IQ2
};

/* They stand in a header, so that the compiler knows their contents. */
#define PLAIN {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define ZERO(shift) 1 << (shift), shift
#define MAGNITUDES(z, a, b, c, d, e, f, g, h)                                                      \
    {z + a, z + b, z + c, z + d, z + e, z + f, z + g, z + h,                                       \
     z - a, z - b, z - c, z - d, z - e, z - f, z - g, z - h}

/* clang-format off */
static const code_table code_tables[EDGE_N_TABLES] = {
    [EDGE_TABLE_NONE] = {PLAIN, 0, -1, 15, 1.0f},
    [EDGE_TABLE_MINUS_1] = {PLAIN, ZERO(0), 3, 1.0f},
    [EDGE_TABLE_MINUS_4] = {PLAIN, ZERO(2), 7, 1.0f},
    [EDGE_TABLE_MINUS_8] = {PLAIN, ZERO(3), 15, 1.0f},
    [EDGE_TABLE_MINUS_16] = {PLAIN, ZERO(4), 31, 1.0f},
    [EDGE_TABLE_MINUS_32] = {PLAIN, ZERO(5), 63, 1.0f},
    /* -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 */
    [EDGE_TABLE_IQ4_NL] = {{1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
                           ZERO(7), 255, 1.0f},
    [EDGE_TABLE_IQ3_S] = {MAGNITUDES(16, 1, 3, 5, 7, 9, 11, 13, 15), ZERO(4), 31, 1.0f},
    [EDGE_TABLE_IQ3_XXS] = {MAGNITUDES(64, 4, 12, 20, 28, 36, 44, 52, 62), ZERO(6), 126, 0.25f},
    /* 3-bit codes: 8, 25, 43 and, from 4 on, their negatives; no grid has codes 3 and 7 */
    [EDGE_TABLE_IQ2] = {{64 + 8, 64 + 25, 64 + 43, 64 + 43, 64 - 8, 64 - 25, 64 - 43, 64 - 43},
                        ZERO(6), 107, 0.125f},
    /* 3-bit codes: -1, 0, 1, shifted by 1/8 up or, from 4 on, down; no grid has codes 3 and 7 */
    [EDGE_TABLE_IQ1] = {{16 - 7, 16 + 1, 16 + 9, 16 + 9, 16 - 9, 16 - 1, 16 + 7, 16 + 7},
                        ZERO(4), 25, 0.125f},
    /* 0, 1, 2, 3, 4, 6, 8, 12 and, from 8 on, their negatives */
    [EDGE_TABLE_MXFP4] = {MAGNITUDES(16, 0, 1, 2, 3, 4, 6, 8, 12), ZERO(4), 28, 1.0f},
    [EDGE_TABLE_SIGN] = {{0, 2}, ZERO(0), 2, 1.0f},
};
/* clang-format on */
#undef PLAIN
#undef ZERO
#undef MAGNITUDES

#endif
