/* Matmul tiles: 16 rows of a weight times c columns, c known to the compiler.
 *
 * A group of 32 k is unpacked once and used for every column. Integer dot products are exact in
 * any order; the float part is one fma per group (two with a minimum), in k order, so that every
 * c and every instruction set gives the same bits. */
#include "kernels/isa.h"

/* Scales and sums of one group of a Q8 tile of c columns. */
typedef struct {
    const int8_t *codes;      /* (8, c, 4) */
    const float *scale;       /* (c) */
    const int32_t *minus_sum; /* (c) */
    const float *scale_x_sum; /* (c) */
} q8_group;

INLINE q8_group q8_at(const uint8_t *tile, int64_t i_group, int c) {
    const uint8_t *p = tile + i_group * Q8_COLUMN_BYTES * c;
    return (q8_group){(const int8_t *)p, (const float *)(p + GROUP * c),
                      (const int32_t *)(p + (GROUP + 4) * c), (const float *)(p + (GROUP + 8) * c)};
}

INLINE void store_tile(float *out, const vf *sum, int c) {
    UNROLL for (int j = 0; j < c; j++) { vf_store(out + PANEL_ROWS * j, sum[j]); }
}

/* A group of 32 k: where a panel keeps its scales and codes. Groups lie in pairs, see layouts.h. */
typedef struct {
    const uint16_t *scale, *min;
    const uint8_t *codes;
} packed_group;

INLINE packed_group group_at(const uint8_t *panel, int64_t g, int headers, int codes_bytes) {
    const uint8_t *block = panel + g / 2 * (headers * SCALES_BYTES + 2 * codes_bytes);
    const uint16_t *scale = (const uint16_t *)block + g % 2 * PANEL_ROWS;
    return (packed_group){scale, scale + 2 * PANEL_ROWS,
                          block + headers * SCALES_BYTES + g % 2 * codes_bytes};
}

/* Few columns are bound by memory: ask for what comes PREFETCH_BYTES later, which is past the page
 * where hardware prefetchers stop. 7 to 15 % on 4-bit codes. */
enum { PREFETCH_BYTES = 4096 };

INLINE void prefetch_ahead(const uint8_t *codes, int bytes, int c) {
    if (c <= 2) {
        for (int i = 0; i < bytes; i += 64) {
            __builtin_prefetch(codes + PREFETCH_BYTES + i);
        }
    }
}

/* 4-bit codes: minus 8, through a table, or with a minimum. */
INLINE void tile_c4(const uint8_t *panel, int64_t k, const uint8_t *x, const int8_t *values,
                    bool has_min, float *out, int c) {
    vf sum[MAX_TILE];
    UNROLL for (int j = 0; j < c; j++) { sum[j] = vf_zero(); }
    for (int64_t g = 0; g < k / GROUP; g++) {
        const packed_group p = group_at(panel, g, has_min ? 2 : 1, C4_CODES_BYTES);
        prefetch_ahead(p.codes, C4_CODES_BYTES + SCALES_BYTES, c);
        vc w[8];
        UNROLL for (int s = 0; s < 4; s++) {
            const vc both = vc_load(p.codes + 64 * s);
            w[2 * s] = vc_low(both);
            w[2 * s + 1] = vc_high(both);
        }
        if (values != NULL) {
            UNROLL for (int s = 0; s < 8; s++) { w[s] = vc_table(values, w[s]); }
        }
        const q8_group q = q8_at(x, g, c);
        vi dot[MAX_TILE];
        if (values != NULL) {
            vc_dot_signed(dot, w, q.codes, q.minus_sum, c);
        } else {
            vc_dot_nibbles(dot, w, q.codes, q.minus_sum, has_min ? 0 : 8, c);
        }
        const vf scale = vf_from_half(p.scale);
        UNROLL for (int j = 0; j < c; j++) {
            sum[j] = vf_fma(vf_from_int(dot[j]), vf_mul(scale, vf_set1(q.scale[j])), sum[j]);
        }
        if (has_min) {
            const vf min = vf_from_half(p.min);
            UNROLL for (int j = 0; j < c; j++) {
                sum[j] = vf_fma(min, vf_set1(q.scale_x_sum[j]), sum[j]);
            }
        }
    }
    store_tile(out, sum, c);
}

INLINE void tile_c4h32(const void *panel, int64_t k, const void *x, int32_t table, float *out,
                       int c) {
    if (table == EDGE_TABLE_IQ4_NL) {
        tile_c4(panel, k, x, iq4_nl_values, false, out, c);
    } else {
        tile_c4(panel, k, x, NULL, false, out, c);
    }
}

INLINE void tile_c4mh32(const void *panel, int64_t k, const void *x, int32_t table, float *out,
                        int c) {
    (void)table;
    tile_c4(panel, k, x, NULL, true, out, c);
}

INLINE void tile_c8h32(const void *panel, int64_t k, const void *x, int32_t table, float *out,
                       int c) {
    (void)table;
    vf sum[MAX_TILE];
    UNROLL for (int j = 0; j < c; j++) { sum[j] = vf_zero(); }
    for (int64_t g = 0; g < k / GROUP; g++) {
        const packed_group p = group_at(panel, g, 1, C8_CODES_BYTES);
        prefetch_ahead(p.codes, C8_CODES_BYTES + SCALES_BYTES, c);
        vc w[8];
        UNROLL for (int s = 0; s < 8; s++) { w[s] = vc_signed(vc_load(p.codes + 64 * s)); }
        const q8_group q = q8_at(x, g, c);
        vi dot[MAX_TILE];
        vc_dot_signed(dot, w, q.codes, q.minus_sum, c);
        const vf scale = vf_from_half(p.scale);
        UNROLL for (int j = 0; j < c; j++) {
            sum[j] = vf_fma(vf_from_int(dot[j]), vf_mul(scale, vf_set1(q.scale[j])), sum[j]);
        }
    }
    store_tile(out, sum, c);
}

/* Float weights: one fma per k. load: 16 rows of one k. */
#define FLOAT_TILE(name, element, load)                                                            \
    INLINE void name(const void *panel, int64_t k, const void *x, int32_t table, float *out,       \
                     int c) {                                                                      \
        (void)table;                                                                               \
        const element *w = panel;                                                                  \
        const float *columns = x;                                                                  \
        vf sum[MAX_TILE];                                                                          \
        UNROLL for (int j = 0; j < c; j++) { sum[j] = vf_zero(); }                                 \
        for (int64_t i = 0; i < k; i++, w += PANEL_ROWS) {                                         \
            const vf row = load(w);                                                                \
            UNROLL for (int j = 0; j < c; j++) {                                                   \
                sum[j] = vf_fma(row, vf_set1(columns[j * k + i]), sum[j]);                         \
            }                                                                                      \
        }                                                                                          \
        store_tile(out, sum, c);                                                                   \
    }
FLOAT_TILE(tile_f32, float, vf_load)
FLOAT_TILE(tile_f16, uint16_t, vf_from_half)
FLOAT_TILE(tile_bf16, uint16_t, vf_from_bfloat)

/* One function per layout and number of columns. */
#define FOR_COLUMNS(name, c)                                                                       \
    static void name##_##c(const void *panel, int64_t k, const void *x, int32_t table,             \
                           float *out) {                                                           \
        name(panel, k, x, table, out, c);                                                          \
    }
#if TILE > 4
#define FOR_ALL_COLUMNS(name)                                                                      \
    FOR_COLUMNS(name, 1)                                                                           \
    FOR_COLUMNS(name, 2)                                                                           \
    FOR_COLUMNS(name, 3)                                                                           \
    FOR_COLUMNS(name, 4)                                                                           \
    FOR_COLUMNS(name, 5)                                                                           \
    FOR_COLUMNS(name, 6) FOR_COLUMNS(name, 7) FOR_COLUMNS(name, 8)
#define LIST(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8}
#else
#define FOR_ALL_COLUMNS(name)                                                                      \
    FOR_COLUMNS(name, 1) FOR_COLUMNS(name, 2) FOR_COLUMNS(name, 3) FOR_COLUMNS(name, 4)
#define LIST(name) {name##_1, name##_2, name##_3, name##_4}
#endif

FOR_ALL_COLUMNS(tile_f32)
FOR_ALL_COLUMNS(tile_f16)
FOR_ALL_COLUMNS(tile_bf16)
FOR_ALL_COLUMNS(tile_c4h32)
FOR_ALL_COLUMNS(tile_c4mh32)
FOR_ALL_COLUMNS(tile_c8h32)

const tile_function FN(tiles)[EDGE_N_LAYOUTS][MAX_TILE] = {
    [EDGE_LAYOUT_F32] = LIST(tile_f32),       [EDGE_LAYOUT_F16] = LIST(tile_f16),
    [EDGE_LAYOUT_BF16] = LIST(tile_bf16),     [EDGE_LAYOUT_C4H32] = LIST(tile_c4h32),
    [EDGE_LAYOUT_C4MH32] = LIST(tile_c4mh32), [EDGE_LAYOUT_C8H32] = LIST(tile_c8h32),
};
