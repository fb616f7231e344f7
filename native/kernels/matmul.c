/* Matmul tiles: 16 rows of a weight times c columns, c known to the compiler.
 *
 * A group of 32 k is unpacked once and used for every column. Integer dot products are exact in
 * any order; the float part is one fma per group (two with a minimum), in k order, so that every
 * c and every instruction set gives the same bits. Layouts are drawn in layouts.h. */
#include "formats/formats.h"
#include "kernels/isa.h"
#include "tables.h"

/* Few columns are bound by memory: ask for what comes PREFETCH_BYTES later, which is past the page
 * where hardware prefetchers stop. 7 to 15 % on 4-bit codes. */
enum { PREFETCH_BYTES = 4096 };

INLINE void prefetch_ahead(const uint8_t *p, int bytes, int c) {
    if (c <= 2) {
        for (int i = 0; i < bytes; i += 64) {
            __builtin_prefetch(p + PREFETCH_BYTES + i);
        }
    }
}

/* A layout and how its codes become weights, which the compiler knows but for what the table holds.
 * table: 16 weights to look codes up in, NULL: codes are weights as they are; zero_shift, max: as
 * vc_dot wants them. */
typedef struct {
    layout_info layout;
    const uint8_t *table;
    int zero_shift, max;
} recipe;

/* A plane of 4, 2 or 1 bits to the bits from `up` on of w. */
INLINE void unpack_plane(vc w[STEPS], const uint8_t *plane, int width, int up) {
    const int steps = 8 / width, mask = ((1 << width) - 1) << up;
    UNROLL for (int v = 0; v < width; v++) {
        const vc p = vc_load(plane + 64 * v);
        UNROLL for (int i = 0; i < steps; i++) {
            const int s = v * steps + i;
            w[s] =
                up == 0 ? vc_bits(p, i * width, mask) : vc_or_bits(w[s], p, up - i * width, mask);
        }
    }
}

/* Indices through their grid, signs above the codes of the magnitudes. */
INLINE void unpack_grid(vc w[STEPS], layout_info l, const grid_info *grid, const uint8_t *codes,
                        const uint8_t *high) {
    if (l.weights == 4) {
        UNROLL for (int v = 0; v < 2; v++) {
            vc a, b;
            vc_grid(grid, l.index_bits, codes + 64 * v, high + v * (l.index_bits - 8) * 8, &a, &b);
            w[4 * v] = vc_bits(a, 0, 15);
            w[4 * v + 1] = vc_bits(a, 4, 15);
            w[4 * v + 2] = vc_bits(b, 0, 15);
            w[4 * v + 3] = vc_bits(b, 4, 15);
        }
        unpack_plane(w, codes + 128, 1, 3);
    } else {
        vc a, b, halves[2];
        vc_grid(grid, l.index_bits, codes, high, &a, &b);
        vc_zip(a, b, &halves[0], &halves[1]);
        UNROLL for (int s = 0; s < STEPS; s++) { w[s] = vc_bits(halves[s / 4], 2 * (s % 4), 3); }
        unpack_plane(w, codes + 64, 1, 2);
    }
}

INLINE void unpack(vc w[STEPS], recipe how, const grid_info *grid, const uint8_t *codes,
                   const uint8_t *high) {
    const layout_info l = how.layout;
    if (l.kind == SCALE_GRID) {
        unpack_grid(w, l, grid, codes, high);
    } else if (l.bits == 8) {
        UNROLL for (int s = 0; s < STEPS; s++) { w[s] = vc_signed(vc_load(codes + 64 * s)); }
    } else {
        const int low = l.bits >= 4 ? 4 : 2;
        unpack_plane(w, codes, low, 0);
        if (l.bits > low) {
            unpack_plane(w, codes + low * PLANE_BYTES, l.bits - low, low);
        }
    }
    if (how.table != NULL) {
        UNROLL for (int s = 0; s < STEPS; s++) { w[s] = vc_table(how.table, w[s], how.max); }
    }
}

/* Scales of one group: float (groups of 32), or integers of its halves beside the block's floats.
 */
typedef struct {
    vf scale, min;
    vi half[2], mins; /* mins: pairs of 16 bits */
} group_scales;

/* i: the group in its block; d, minus_dmin: the block's floats, units included. */
INLINE group_scales scales_at(recipe how, const uint8_t *header, int i, vf d, vf minus_dmin) {
    const layout_info l = how.layout;
    group_scales r = {.scale = d};
    if (l.kind == SCALE_GRID) {
        const vi both = vi_from_u8(header + PANEL_ROWS * (l.group == 16 ? i : i / 2));
        const vi low = vi_bits(both, 0, 15), high = vi_bits(both, 4, 15), one = vi_set1(1);
        if (l.group == 16) {
            r.half[0] = vi_add(vi_add(low, low), one);
            r.half[1] = vi_add(vi_add(high, high), one);
        } else {
            const vi s = i % 2 == 0 ? low : high;
            r.scale = vf_mul(d, vf_from_int(vi_add(vi_add(s, s), one)));
        }
    } else if (l.kind == SCALE_B && l.group == 16) {
        const uint8_t *a = header + 2 * PANEL_ROWS * i, *b = a + PANEL_ROWS;
        if (l.has_min) {
            r.half[0] = vi_bits(vi_from_u8(a), 0, 15);
            r.half[1] = vi_bits(vi_from_u8(b), 0, 15);
            r.mins = vi_pair(vi_bits(vi_from_u8(a), 4, 15), vi_bits(vi_from_u8(b), 4, 15));
        } else {
            r.half[0] = vi_from_i8(a);
            r.half[1] = vi_from_i8(b);
        }
    } else if (l.kind == SCALE_B && l.has_min) {
        const vi a = vi_from_u8(header + PANEL_ROWS * i);
        const vi b = vi_from_u8(header + PANEL_ROWS * (SUPER / GROUP + i / 2));
        const vi low = i % 2 == 0 ? vi_bits(b, 0, 15) : vi_bits(b, 4, 15);
        const vi high = vi_bits(a, 6, 3);
        const vi twice = vi_add(high, high), four = vi_add(twice, twice);
        const vi eight = vi_add(four, four);
        r.scale = vf_mul(d, vf_from_int(vi_bits(a, 0, 63)));
        r.min = vf_mul(minus_dmin, vf_from_int(vi_add(vi_add(eight, eight), low)));
    } else if (l.kind == SCALE_B) {
        r.scale = vf_mul(d, vf_from_int(vi_from_i8(header + PANEL_ROWS * i)));
    } else {
        const uint16_t *p = (const uint16_t *)header + PANEL_ROWS * i;
        r.scale = l.kind == SCALE_E ? vf_from_bfloat(p) : vf_from_half(p);
        if (l.has_min) {
            r.min = vf_from_half(p + 2 * PANEL_ROWS);
        }
    }
    return r;
}

/* Dot products of one group of some panels with c columns: of the whole group, or of its first half
 * and its second, which have scales of their own. w: panels from `row` on. */
typedef struct {
    vi all[PANELS * MAX_TILE], second[PANELS * MAX_TILE];
} group_dots;

INLINE void dot_group(group_dots *dots, int row, recipe how, const vc *w, int panels, q8_group q,
                      int c) {
    const int n = how.layout.group == GROUP ? STEPS : STEPS / 2;
    vc_dot(dots->all, row, w, panels, 0, n, q, how.zero_shift, how.max, c);
    if (n < STEPS) {
        vc_dot(dots->second, row, w, panels, n, n, q, how.zero_shift, how.max, c);
    }
}

/* One group added to sum (panels, c); dmin: of the blocks, for minima of groups of 16. */
INLINE void add_group(vf *sum, recipe how, const group_dots *dots, int panels, q8_group q,
                      const group_scales *r, const vf *dmin, int c) {
    const layout_info l = how.layout;
    vi dot[PANELS * MAX_TILE];
    UNROLL for (int i = 0; i < panels * c; i++) {
        dot[i] = dots->all[i];
        if (l.group < GROUP) { /* still exact */
            dot[i] =
                vi_add(vi_mul(dot[i], r[i / c].half[0]), vi_mul(dots->second[i], r[i / c].half[1]));
        }
    }
    UNROLL for (int i = 0; i < panels * c; i++) {
        const vf scale = vf_mul(r[i / c].scale, vf_set1(q.scale[i % c]));
        sum[i] = vf_fma(vf_from_int(dot[i]), scale, sum[i]);
    }
    if (l.has_min && l.group == GROUP) {
        UNROLL for (int i = 0; i < panels * c; i++) {
            sum[i] = vf_fma(r[i / c].min, vf_set1(q.total[i % c]), sum[i]);
        }
    } else if (l.has_min) {
        UNROLL for (int i = 0; i < panels * c; i++) {
            const vf minima = vf_from_int(vi_pair_dot(r[i / c].mins, q.minus_halves + 2 * (i % c)));
            sum[i] = vf_fma(minima, vf_mul(dmin[i / c], vf_set1(q.scale[i % c])), sum[i]);
        }
    }
}

/* Group i of a block of each panel: CODE_ROWS rows from `row` on. */
INLINE void unpack_rows(vc *w, int row, recipe how, const tile_args *a, const uint8_t *block,
                        int panels, int i) {
    const layout_info l = how.layout;
    UNROLL for (int p = 0; p < panels; p++) {
        const uint8_t *header = block + p * a->panel_bytes;
        const uint8_t *high =
            header + 64 * (GROUP / l.group) + i * (8 / l.weights) * (l.index_bits - 8) * 8;
        unpack(w + p * STEPS, how, a->grid, header + l.header_bytes + i * l.codes_bytes + 4 * row,
               high + row / 2);
    }
}

/* `part` columns at a time of one or two panels: a group is unpacked once for all parts. */
INLINE void tile_codes(recipe how, const tile_args *a, int panels, int c, int part) {
    const layout_info l = how.layout;
    const bool supers = l.block == SUPER;
    const int groups = l.block / GROUP;
    const int64_t n = a->k / GROUP, n_blocks = (n + groups - 1) / groups;
    const uint8_t *block = (const uint8_t *)a->panel + front_bytes(&l, n_blocks);
    const vf unit = vf_set1(code_tables[a->table].unit);
    vf sum[PANELS * MAX_TILE], d[PANELS], dmin[PANELS], minus_dmin[PANELS];
    UNROLL for (int i = 0; i < panels * c; i++) { sum[i] = vf_zero(); }
    UNROLL for (int p = 0; p < panels; p++) { d[p] = dmin[p] = minus_dmin[p] = vf_zero(); }
    for (int64_t b = 0; b < n_blocks; b++) {
        UNROLL for (int p = 0; supers && p < panels; p++) {
            const uint8_t *floats =
                (const uint8_t *)a->panel + p * a->panel_bytes + b * l.front_bytes;
            d[p] = vf_mul(vf_from_half((const uint16_t *)floats), unit);
            if (l.has_min) {
                dmin[p] = vf_from_half((const uint16_t *)floats + PANEL_ROWS);
                minus_dmin[p] = vf_sub(vf_zero(), dmin[p]);
            }
        }
        prefetch_ahead(block, l.header_bytes, c);
        for (int i = 0; i < groups && b * groups + i < n; i++) {
            vc w[PANELS * STEPS];
            group_scales r[PANELS];
            UNROLL for (int p = 0; p < panels; p++) {
                const uint8_t *header = block + p * a->panel_bytes;
                prefetch_ahead(header + l.header_bytes + i * l.codes_bytes, l.codes_bytes, c);
                r[p] = scales_at(how, header, i, d[p], minus_dmin[p]);
            }
            if (CODE_ROWS == PANEL_ROWS) {
                unpack_rows(w, 0, how, a, block, panels, i);
            }
            UNROLL for (int j = 0; j < c; j += part) {
                const q8_group q = q8_at(a->x, b * groups + i, c, j);
                group_dots dots;
                for (int row = 0; row < PANEL_ROWS; row += CODE_ROWS) {
                    if (CODE_ROWS < PANEL_ROWS) {
                        unpack_rows(w, row, how, a, block, panels, i);
                    }
                    dot_group(&dots, row, how, w, panels, q, part);
                }
                add_group(sum + panels * j, how, &dots, panels, q, r, dmin, part);
            }
        }
        block += block_bytes(&l);
    }
    UNROLL for (int j = 0; j < c; j += part) {
        UNROLL for (int p = 0; p < panels; p++) {
            store_tile(a, j * a->stride + p * PANEL_ROWS, sum + panels * j + p * part, part);
        }
    }
}

/* Through a table, whose weights are moved to stand around 1 << zero_shift, a constant. */
INLINE void tile_with_table(layout_info l, int zero_shift, int max, const tile_args *a, int panels,
                            int c, int part) {
    const code_table *table = &code_tables[a->table];
    const int zero = SIGNED_WEIGHTS ? 0 : 1 << zero_shift;
    uint8_t moved[16];
    for (int i = 0; i < 16; i++) {
        moved[i] = (uint8_t)(table->shifted[i] + zero - table->zero);
    }
    const recipe how = {l, moved, SIGNED_WEIGHTS ? -1 : zero_shift,
                        SIGNED_WEIGHTS ? 1 << zero_shift : max};
    tile_codes(how, a, panels, c, part);
}

/* Instruction sets that count bits of products get one function for each size of weights that the
 * tables of a layout have; of the others one serves all. */
INLINE void tile_looked_up(layout_info l, const tile_args *a, int panels, int c, int part) {
    const uint32_t table = 1u << a->table, others = ~(uint32_t)(TABLES_TO_31 | TABLES_TO_127);
    if (NEEDS_MAX && (l.tables & TABLES_TO_31) != 0 && (table & TABLES_TO_31) != 0) {
        tile_with_table(l, 4, 31, a, panels, c, part);
    } else if (NEEDS_MAX && (l.tables & TABLES_TO_127) != 0 && (table & TABLES_TO_127) != 0) {
        tile_with_table(l, 6, 127, a, panels, c, part);
    } else if (!NEEDS_MAX || (l.tables & others) != 0) {
        tile_with_table(l, 7, 255, a, panels, c, part);
    }
}

/* One function per layout. Without a look-up codes are weights minus the table's zero, or have a
 * minimum. */
#define CODES(name, layout, table)                                                                 \
    SPECIALIZED void name(const tile_args *a, int panels, int c, int part) {                       \
        const layout_info l = layout_table[EDGE_LAYOUT_##layout];                                  \
        const code_table t = code_tables[EDGE_TABLE_##table];                                      \
        const bool is_signed = SIGNED_WEIGHTS && l.bits == 8;                                      \
        const int zero_shift = is_signed ? -1 : l.bits == 8 ? 7 : t.zero_shift;                    \
        const recipe how = {l, NULL, zero_shift, is_signed ? 128 : (1 << l.bits) - 1};             \
        tile_codes(how, a, panels, c, part);                                                       \
    }
#define LOOKED_UP(name, layout)                                                                    \
    SPECIALIZED void name(const tile_args *a, int panels, int c, int part) {                       \
        tile_looked_up(layout_table[EDGE_LAYOUT_##layout], a, panels, c, part);                    \
    }
CODES(tile_c4h32_minus_8, C4H32, MINUS_8)
LOOKED_UP(tile_c4h32_table, C4H32)
CODES(tile_c4mh32, C4MH32, NONE)
CODES(tile_c5h32, C5H32, MINUS_16)
CODES(tile_c5mh32, C5MH32, NONE)
CODES(tile_c8h32, C8H32, NONE)
LOOKED_UP(tile_c4e32, C4E32)
CODES(tile_c2b32, C2B32, MINUS_1)
CODES(tile_c2mb16, C2MB16, NONE)
LOOKED_UP(tile_c3b32, C3B32)
LOOKED_UP(tile_c3b16, C3B16)
LOOKED_UP(tile_c4b32, C4B32)
CODES(tile_c4mb32, C4MB32, NONE)
CODES(tile_c5mb32, C5MB32, NONE)
CODES(tile_c6b16, C6B16, MINUS_32)
LOOKED_UP(tile_g8x4b32, G8X4B32)
LOOKED_UP(tile_g9x4b32, G9X4B32)
LOOKED_UP(tile_g8x8b32, G8X8B32)
LOOKED_UP(tile_g9x8b16, G9X8B16)
LOOKED_UP(tile_g10x8b16, G10X8B16)

SPECIALIZED void tile_c4h32(const tile_args *a, int panels, int c, int part) {
    if (a->table == EDGE_TABLE_MINUS_8) {
        tile_c4h32_minus_8(a, panels, c, part);
    } else {
        tile_c4h32_table(a, panels, c, part);
    }
}

/* Float weights: one fma per k, the even and the odd k apart and added at the end, so that one
 * column alone hides the latency; of many columns as many at a time as registers hold. load: 16
 * rows of one k. */
#define FLOATS(name, element, load)                                                                \
    INLINE void name##_part(const tile_args *a, int first, int c) {                                \
        const element *w = a->panel;                                                               \
        const int64_t k = a->k;                                                                    \
        const float *x = (const float *)a->x + first * k;                                          \
        vf even[MAX_TILE], odd[MAX_TILE];                                                          \
        UNROLL for (int j = 0; j < c; j++) { even[j] = odd[j] = vf_zero(); }                       \
        int64_t i = 0;                                                                             \
        for (; i + 1 < k; i += 2, w += 2 * PANEL_ROWS) {                                           \
            prefetch_ahead((const uint8_t *)w, (int)(2 * PANEL_ROWS * sizeof *w), c);              \
            const vf row = load(w), next = load(w + PANEL_ROWS);                                   \
            UNROLL for (int j = 0; j < c; j++) {                                                   \
                even[j] = vf_fma(row, vf_set1(x[j * k + i]), even[j]);                             \
                odd[j] = vf_fma(next, vf_set1(x[j * k + i + 1]), odd[j]);                          \
            }                                                                                      \
        }                                                                                          \
        if (i < k) {                                                                               \
            const vf row = load(w);                                                                \
            UNROLL for (int j = 0; j < c; j++) {                                                   \
                even[j] = vf_fma(row, vf_set1(x[j * k + i]), even[j]);                             \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int j = 0; j < c; j++) { even[j] = vf_add(even[j], odd[j]); }                  \
        store_tile(a, first * a->stride, even, c);                                                 \
    }                                                                                              \
    SPECIALIZED void name(const tile_args *a, int panels, int c, int part) {                       \
        (void)panels, (void)part;                                                                  \
        UNROLL for (int j = 0; j < c; j += FLOAT_COLUMNS) {                                        \
            name##_part(a, j, c - j < FLOAT_COLUMNS ? c - j : FLOAT_COLUMNS);                      \
        }                                                                                          \
    }
FLOATS(tile_f32, float, vf_load)
FLOATS(tile_f16, uint16_t, vf_from_half)
FLOATS(tile_bf16, uint16_t, vf_from_bfloat)

/* One function per layout and number of columns. */
#ifndef FLUSHES_DENORMALS
#define FOR_COLUMNS(layout, name, c)                                                               \
    static void name##_##c(const tile_args *a) { name(a, 1, c, c); }
#else
_Static_assert(TILE == 4 && PANELS == 1, "the scalar kernels' tiles, for they take the same");

/* The residual may be where the result goes: added at last, and not by vectors. */
static void exact_tile(tile_function tile, int32_t layout, int c, const tile_args *a) {
    float aside[TILE * PANEL_ROWS];
    tile_args args = *a;
    if (a->residual != NULL) {
        args.out = aside;
        args.stride = PANEL_ROWS;
        args.residual = NULL;
    }
    EXACT(tile(&args), kernels_scalar.tiles[layout][c - 1](&args));
    for (int j = 0; a->residual != NULL && j < c; j++) {
        const int64_t at = j * a->stride;
        FN(add)(aside + j * PANEL_ROWS, a->residual + at, PANEL_ROWS, a->out + at);
    }
}

#define FOR_COLUMNS(layout, name, c)                                                               \
    static void name##_##c##_flushed(const tile_args *a) { name(a, 1, c, c); }                     \
    static void name##_##c(const tile_args *a) {                                                   \
        exact_tile(name##_##c##_flushed, EDGE_LAYOUT_##layout, c, a);                              \
    }
#endif
#if TILE > 4
#define FOR_ALL_COLUMNS(layout, name)                                                              \
    FOR_COLUMNS(layout, name, 1)                                                                   \
    FOR_COLUMNS(layout, name, 2)                                                                   \
    FOR_COLUMNS(layout, name, 3)                                                                   \
    FOR_COLUMNS(layout, name, 4)                                                                   \
    FOR_COLUMNS(layout, name, 5)                                                                   \
    FOR_COLUMNS(layout, name, 6) FOR_COLUMNS(layout, name, 7) FOR_COLUMNS(layout, name, 8)
#define LIST(name) {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8}
#else
#define FOR_ALL_COLUMNS(layout, name)                                                              \
    FOR_COLUMNS(layout, name, 1)                                                                   \
    FOR_COLUMNS(layout, name, 2) FOR_COLUMNS(layout, name, 3) FOR_COLUMNS(layout, name, 4)
#define LIST(name) {name##_1, name##_2, name##_3, name##_4}
#endif

#define FOR_FLOATS(DO) DO(F32, f32) DO(F16, f16) DO(BF16, bf16)
#define FOR_PAIRED(DO)                                                                             \
    DO(C4H32, c4h32)                                                                               \
    DO(C5H32, c5h32)                                                                               \
    DO(C8H32, c8h32)                                                                               \
    DO(C4E32, c4e32)                                                                               \
    DO(C2B32, c2b32)                                                                               \
    DO(C3B32, c3b32)                                                                               \
    DO(C4B32, c4b32)                                                                               \
    DO(G8X4B32, g8x4b32)                                                                           \
    DO(G9X4B32, g9x4b32)                                                                           \
    DO(G8X8B32, g8x8b32)
#define FOR_OTHERS(DO)                                                                             \
    DO(C4MH32, c4mh32)                                                                             \
    DO(C5MH32, c5mh32)                                                                             \
    DO(C2MB16, c2mb16)                                                                             \
    DO(C3B16, c3b16)                                                                               \
    DO(C4MB32, c4mb32)                                                                             \
    DO(C5MB32, c5mb32)                                                                             \
    DO(C6B16, c6b16)                                                                               \
    DO(G9X8B16, g9x8b16)                                                                           \
    DO(G10X8B16, g10x8b16)
#define FOR_ALL_LAYOUTS(DO) FOR_FLOATS(DO) FOR_PAIRED(DO) FOR_OTHERS(DO)
#define FUNCTIONS(layout, name) FOR_ALL_COLUMNS(layout, tile_##name)
#define ROW(layout, name) [EDGE_LAYOUT_##layout] = LIST(tile_##name),

FOR_ALL_LAYOUTS(FUNCTIONS)

const tile_function FN(tiles)[EDGE_N_LAYOUTS][MAX_TILE] = {FOR_ALL_LAYOUTS(ROW)};

/* A full tile against two panels: not with minima or groups of 16, whose scales take the registers
 * that this needs. */
#if PANELS > 1
#define PAIR(layout, name)                                                                         \
    static void tile_##name##_pair(const tile_args *a) {                                           \
        tile_##name(a, PANELS, TILE, PANEL_COLUMNS);                                               \
    }
#define PAIR_ROW(layout, name) [EDGE_LAYOUT_##layout] = tile_##name##_pair,
FOR_PAIRED(PAIR)
const tile_function FN(pairs)[EDGE_N_LAYOUTS] = {FOR_PAIRED(PAIR_ROW)};
#else
const tile_function FN(pairs)[EDGE_N_LAYOUTS] = {NULL};
#endif
