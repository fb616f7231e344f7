/* Int8 dot products of numbers in registers: no matmul of this instruction set can be faster. */
#include <string.h>

#include "kernels/isa.h"

int64_t FN(dots)(int64_t n_rounds, int32_t *out) {
    enum { PARTS = PANEL_ROWS / CODE_ROWS };
    vc w[PARTS][PANELS * STEPS];
    const uint8_t codes[4 * PANEL_ROWS] = {1, 2, 3};
    for (int i = 0; i < PARTS * PANELS * STEPS; i++) {
        w[i % PARTS][i / PARTS] = vc_load(codes + 4 * CODE_ROWS * (i % PARTS));
    }
    /* The compiler knows x, and it is the same in every step: one register a column holds it. */
    int8_t x[GROUP * PANEL_COLUMNS];
    UNROLL for (int step = 0; step < STEPS; step++) {
        UNROLL for (int j = 0; j < PANEL_COLUMNS; j++) {
            const int32_t four = 0x01010101 * (j + 1);
            memcpy(x + 4 * (step * PANEL_COLUMNS + j), &four, 4);
        }
    }
    const q8_group q = {.codes = x, .stride = PANEL_COLUMNS};
    vi sum[PANELS * PANEL_COLUMNS];
    UNROLL for (int j = 0; j < PANELS * PANEL_COLUMNS; j++) { sum[j] = vi_set1(0); }
    for (int64_t i = 0; i < n_rounds; i++) {
        __asm__ volatile(""
                         :
                         : "r"(w)
                         : "memory"); /* w may have changed: each round must be calculated */
        vi dot[PANELS * PANEL_COLUMNS];
        for (int p = 0; p < PARTS; p++) {
            vc_dot(dot, p * CODE_ROWS, w[p], PANELS, 0, STEPS, q, -1, 15, PANEL_COLUMNS);
        }
        UNROLL for (int j = 0; j < PANELS * PANEL_COLUMNS; j++) { sum[j] = vi_add(sum[j], dot[j]); }
    }
    for (int j = 1; j < PANELS * PANEL_COLUMNS; j++) {
        sum[0] = vi_add(sum[0], sum[j]);
    }
    memcpy(out, &sum[0], sizeof(int32_t[PANEL_ROWS]));
    return n_rounds * PANEL_ROWS * GROUP * PANELS * PANEL_COLUMNS;
}
