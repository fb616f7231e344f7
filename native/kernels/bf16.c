/* Matmul tiles of bfloat16 weights by the instruction for them, where the instruction set has one:
 * it rounds activations to bfloat16 and sums in an order of its own, so the bits of results are not
 * those of other tables. Only plans with native_bf16 use it. */
#include "kernels/isa.h"

#ifdef HAS_BF16_DOT

enum { WIDTH = 32 }; /* k that are rounded at a time */

BF16_TARGET INLINE void tile_native_bf16(const tile_args *a, int c) {
    const uint16_t *w = a->panel;
    vf even[MAX_TILE], odd[MAX_TILE];
    UNROLL for (int j = 0; j < c; j++) { even[j] = odd[j] = vf_zero(); }
    for (int64_t i = 0; i < a->k; i += WIDTH, w += WIDTH * PANEL_ROWS) {
        const int n = a->k - i < WIDTH ? (int)(a->k - i) : WIDTH;
        uint16_t x[MAX_TILE][WIDTH];
        UNROLL for (int j = 0; j < c; j++) {
            const float *column = (const float *)a->x + j * a->k + i;
            vf_to_bfloat(x[j], vf_load_n(column, n), vf_load_n(column + 16, n - 16));
        }
        int p = 0;
        for (; p + 4 <= n; p += 4) {
            const uint16_t *row = w + p * PANEL_ROWS;
            const vi two = vi_pair_rows(row, row + PANEL_ROWS);
            const vi next = vi_pair_rows(row + 2 * PANEL_ROWS, row + 3 * PANEL_ROWS);
            UNROLL for (int j = 0; j < c; j++) {
                even[j] = vf_dot_bfloat(even[j], two, x[j] + p);
                odd[j] = vf_dot_bfloat(odd[j], next, x[j] + p + 2);
            }
        }
        for (; p < n; p += 2) { /* past n, x is zero */
            const uint16_t *row = w + p * PANEL_ROWS;
            const vi two = vi_pair_rows(row, p + 1 < n ? row + PANEL_ROWS : row);
            UNROLL for (int j = 0; j < c; j++) { even[j] = vf_dot_bfloat(even[j], two, x[j] + p); }
        }
    }
    UNROLL for (int j = 0; j < c; j++) { even[j] = vf_add(even[j], odd[j]); }
    store_tile(a, 0, even, c);
}

#define FOR_COLUMNS(c)                                                                             \
    BF16_TARGET static void native_bf16_##c(const tile_args *a) { tile_native_bf16(a, c); }
FOR_COLUMNS(1)
FOR_COLUMNS(2)
FOR_COLUMNS(3)
FOR_COLUMNS(4)
FOR_COLUMNS(5)
FOR_COLUMNS(6)
FOR_COLUMNS(7)
FOR_COLUMNS(8)

const tile_function FN(native_bf16)[MAX_TILE] = {native_bf16_1, native_bf16_2, native_bf16_3,
                                                 native_bf16_4, native_bf16_5, native_bf16_6,
                                                 native_bf16_7, native_bf16_8};
#else
typedef int nothing_here; /* ISO C wants a declaration */
#endif
