#include "tables.h"

#include "api.h"

#define CODES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define MAGNITUDES(z, a, b, c, d, e, f, g, h)                                                      \
    {z + a, z + b, z + c, z + d, z + e, z + f, z + g, z + h,                                       \
     z - a, z - b, z - c, z - d, z - e, z - f, z - g, z - h}

const code_table code_tables[EDGE_N_TABLES] = {
    [EDGE_TABLE_NONE] = {CODES, 0, 15, 1.0f},
    [EDGE_TABLE_MINUS_1] = {CODES, 1, 3, 1.0f},
    [EDGE_TABLE_MINUS_4] = {CODES, 4, 7, 1.0f},
    [EDGE_TABLE_MINUS_8] = {CODES, 8, 15, 1.0f},
    [EDGE_TABLE_MINUS_16] = {CODES, 16, 31, 1.0f},
    [EDGE_TABLE_MINUS_32] = {CODES, 32, 63, 1.0f},
    /* -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 */
    [EDGE_TABLE_IQ4_NL] =
        {{1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}, 128, 255, 1.0f},
    [EDGE_TABLE_IQ3_S] = {MAGNITUDES(15, 1, 3, 5, 7, 9, 11, 13, 15), 15, 30, 1.0f},
    [EDGE_TABLE_IQ3_XXS] = {MAGNITUDES(62, 4, 12, 20, 28, 36, 44, 52, 62), 62, 124, 0.25f},
    /* 3-bit codes: 8, 25, 43 and, from 4 on, their negatives */
    [EDGE_TABLE_IQ2] = {{51, 68, 86, 43, 35, 18, 0, 43}, 43, 86, 0.125f},
    /* 3-bit codes: -1, 0, 1, shifted by 1/8 up or, from 4 on, down */
    [EDGE_TABLE_IQ1] = {{2, 10, 18, 9, 0, 8, 16, 9}, 9, 18, 0.125f},
    /* 0, 1, 2, 3, 4, 6, 8, 12 and, from 8 on, their negatives */
    [EDGE_TABLE_MXFP4] = {{12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0},
                          12,
                          24,
                          1.0f},
};
