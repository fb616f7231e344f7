/* Matmul tiles: 16 rows of a weight times c columns, c known to the compiler.
 *
 * A group of 32 k is unpacked once and used for every column. Integer dot products are exact in
 * any order; the float part is one fma per group (two with a minimum), in k order, so that every
 * c and every instruction set gives the same bits. Layouts are drawn in layouts.h.
 *
 * In this file:
 *   k, n, c    shared dimension, rows of a weight, columns (tokens) of a tile
 *   s          one of the 8 steps of a group: 4 k of each row, 64 bytes of a panel
 *   p, panels  a panel of 16 rows; 1 or 2 of them at a time
 *   r          row of a panel; a lane of every vf and vi is a row
 *   j          column; index p * c + j of an array (panels, c) is panel p, column j
 *   w          weights of a group, (panels, STEPS); byte 4 r + t of w[p * STEPS + s] is row r and
 *              k 16 (s / 4) + 4 t + s % 4 */
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

/* ---- from codes to weights --------------------------------------------------------------- */

/* A layout, and how its codes become weights. The compiler knows all of it but the contents of
 * table and grid. */
typedef struct {
    layout_info layout;
    const uint8_t *table;  /* (16), the weight of each code; NULL: codes are the weights */
    const grid_info *grid; /* of layouts whose codes are indices into a grid */
    int zero_shift, max;   /* of the weights, as vc_dot wants them */
} code_recipe;

/* One group of one panel or two, in memory. */
typedef struct {
    const uint8_t *block; /* of the first panel: header, then the codes of its groups */
    int64_t panel_bytes;  /* from there to the same block of the second panel */
    int i;                /* the group in the block */
} group_place;

/* A plane of `width` bits (4, 2 or 1) into all steps of w.
 * plane: u8 [width][64]; a byte of vector v holds 8 / width steps, the first in its lowest bits.
 * up: the bit of a weight where the plane begins. 0 is the first plane and sets w; a later plane
 * is added above the bits that w has. */
INLINE void unpack_plane(vc w[STEPS], const uint8_t *plane, int width, int up) {
    const int steps = 8 / width, mask = ((1 << width) - 1) << up;
    UNROLL for (int v = 0; v < width; v++) {
        const vc p = vc_load(plane + 64 * v);
        UNROLL for (int i = 0; i < steps; i++) {
            const int s = v * steps + i; /* its bits are i * width .. of each byte of p */
            w[s] =
                up == 0 ? vc_bits(p, i * width, mask) : vc_or_bits(w[s], p, up - i * width, mask);
        }
    }
}

/* Indices through their grid, and the signs as the bit above the codes of the magnitudes.
 * codes: u8 index[vectors][64], then a plane of 1 bit, the signs; vectors is 2 for entries of 4
 * weights, 1 for entries of 8. high: u64 [vectors][index_bits - 8], the upper bits of the indices.
 * An entry of the grid has 16 bits; vc_grid gives the low bytes of 64 entries and the high ones. */
INLINE void unpack_grid(vc w[STEPS], code_recipe recipe, const uint8_t *codes,
                        const uint8_t *high) {
    const int index_bits = recipe.layout.index_bits;
    if (recipe.layout.weights == 4) { /* 4 bits a weight: 3 of magnitude, then the sign */
        UNROLL for (int v = 0; v < 2; v++) {
            vc a, b; /* (16 rows, 4 t): weights 0 and 1 of an entry, weights 2 and 3 */
            vc_grid(recipe.grid, index_bits, codes + 64 * v, high + v * (index_bits - 8) * 8, &a,
                    &b);
            w[4 * v] = vc_bits(a, 0, 15);
            w[4 * v + 1] = vc_bits(a, 4, 15);
            w[4 * v + 2] = vc_bits(b, 0, 15);
            w[4 * v + 3] = vc_bits(b, 4, 15);
        }
        unpack_plane(w, codes + 128, 1, 3);
    } else {                /* 2 bits a weight, and the sign */
        vc a, b, halves[2]; /* a, b: weights 0..3, 4..7 of an entry; halves: k 0..15, k 16..31 */
        vc_grid(recipe.grid, index_bits, codes, high, &a, &b);
        vc_zip(a, b, &halves[0], &halves[1]);
        UNROLL for (int s = 0; s < STEPS; s++) { w[s] = vc_bits(halves[s / 4], 2 * (s % 4), 3); }
        unpack_plane(w, codes + 64, 1, 2);
    }
}

/* One group of one panel. codes: its planes; high: as in unpack_grid. */
INLINE void unpack(vc w[STEPS], code_recipe recipe, const uint8_t *codes, const uint8_t *high) {
    const layout_info l = recipe.layout;
    if (l.kind == SCALE_GRID) {
        unpack_grid(w, recipe, codes, high);
    } else if (l.bits == 8) { /* as they are: i8 [8][64] */
        UNROLL for (int s = 0; s < STEPS; s++) { w[s] = vc_signed(vc_load(codes + 64 * s)); }
    } else if (l.bits == 1) { /* weights 0 or 2 around a zero of 1: each bit becomes bit 1 */
        const vc plane = vc_load(codes), none = vc_bits(plane, 0, 0);
        UNROLL for (int s = 0; s < STEPS; s++) { w[s] = vc_or_bits(none, plane, 1 - s, 2); }
    } else { /* the low plane, and above it the other one of 3, 5 or 6 bits */
        const int low = l.bits >= 4 ? 4 : 2;
        unpack_plane(w, codes, low, 0);
        if (l.bits > low) {
            unpack_plane(w, codes + low * PLANE_BYTES, l.bits - low, low);
        }
    }
    if (recipe.table != NULL) {
        UNROLL for (int s = 0; s < STEPS; s++) { w[s] = vc_table(recipe.table, w[s], recipe.max); }
    }
}

/* A group of each panel: CODE_ROWS rows from `row` on into w (panels, STEPS). In a vector of codes
 * row r begins at byte 4 r, in the upper bits of indices at bit 4 r. */
INLINE void unpack_rows(vc *w, int row, code_recipe recipe, group_place at, int panels) {
    const layout_info l = recipe.layout;
    UNROLL for (int p = 0; p < panels; p++) {
        const uint8_t *header = at.block + p * at.panel_bytes;
        const uint8_t *codes = header + l.header_bytes + at.i * l.codes_bytes;
        /* of grids: behind the block's integers, 8 bytes for each upper bit of 64 indices */
        const uint8_t *high =
            header + 64 * (GROUP / l.group) + at.i * (8 / l.weights) * (l.index_bits - 8) * 8;
        unpack(w + p * STEPS, recipe, codes + 4 * row, high + row / 2);
    }
}

/* ---- scales ------------------------------------------------------------------------------ */

/* The floats of a super-block, for 16 rows; 0 where the layout has none. */
typedef struct {
    vf d;                /* of scales, the table's unit included */
    vf dmin, minus_dmin; /* of minima */
} block_floats;

/* Scales of one group of 16 rows. A float scale, maybe a float minimum, of 32 k or more; two floats
 * for the halves of 32 k; or integers for the halves, which the block's floats are to be multiplied
 * with. */
typedef struct {
    vf scale;   /* groups of 16: d, or of k 0..15 */
    vf second;  /* two floats: of k 16..31 */
    vf min;     /* groups of 32: to be added, so minus the minimum of a super-block */
    vi half[2]; /* groups of 16: integer scales of k 0..15, k 16..31 */
    vi mins;    /* groups of 16: minima of the halves, a pair of 16 bits in each lane */
    vf dmin;    /* groups of 16: of mins */
} group_scales;

/* 16 unsigned floats of 8 bits, see u16 in layouts.h. */
INLINE vf vf_from_bytes(const uint8_t *p) {
    const vi b = vi_from_u8(p), exponent = vi_add(vi_bits(b, 4, 15), vi_set1(-10));
    return vf_mul(vf_from_int(vi_bits(b, 0, 15)), vf_pow2(exponent));
}

/* header: of the block; i: the group in it. */
INLINE group_scales scales_at(code_recipe recipe, const uint8_t *header, int i, block_floats f) {
    const layout_info l = recipe.layout;
    group_scales r = {.scale = f.d, .dmin = f.dmin};
    if (l.kind == SCALE_GRID) { /* integers of 4 bits, which stand for 2 s + 1 */
        const vi both = vi_from_u8(header + PANEL_ROWS * (l.group == 16 ? i : i / 2));
        const vi low = vi_bits(both, 0, 15), high = vi_bits(both, 4, 15), one = vi_set1(1);
        if (l.group == 16) { /* u8 s[8][16]: both halves of a group */
            r.half[0] = vi_add(vi_add(low, low), one);
            r.half[1] = vi_add(vi_add(high, high), one);
        } else { /* u8 s[4][16]: groups 2 i and 2 i + 1 */
            const vi s = i % 2 == 0 ? low : high;
            r.scale = vf_mul(f.d, vf_from_int(vi_add(vi_add(s, s), one)));
        }
    } else if (l.kind == SCALE_B && l.group == 16) { /* b16, mb16: [8][2][16] */
        const uint8_t *a = header + 2 * PANEL_ROWS * i, *b = a + PANEL_ROWS;
        if (l.has_min) { /* scale low, minimum high nibble */
            r.half[0] = vi_bits(vi_from_u8(a), 0, 15);
            r.half[1] = vi_bits(vi_from_u8(b), 0, 15);
            r.mins = vi_pair(vi_bits(vi_from_u8(a), 4, 15), vi_bits(vi_from_u8(b), 4, 15));
        } else {
            r.half[0] = vi_from_i8(a);
            r.half[1] = vi_from_i8(b);
        }
    } else if (l.kind == SCALE_B && l.has_min) { /* mb32: u8 a[8][16], then b[4][16] */
        const vi a = vi_from_u8(header + PANEL_ROWS * i);
        const vi b = vi_from_u8(header + PANEL_ROWS * (SUPER / GROUP + i / 2));
        /* the minimum: 4 bits of b, and above them the upper 2 of a */
        const vi low = i % 2 == 0 ? vi_bits(b, 0, 15) : vi_bits(b, 4, 15);
        const vi high = vi_bits(a, 6, 3);
        const vi twice = vi_add(high, high), four = vi_add(twice, twice);
        const vi eight = vi_add(four, four);
        r.scale = vf_mul(f.d, vf_from_int(vi_bits(a, 0, 63)));
        r.min = vf_mul(f.minus_dmin, vf_from_int(vi_add(vi_add(eight, eight), low)));
    } else if (l.kind == SCALE_B) { /* b32: i8 [8][16] */
        r.scale = vf_mul(f.d, vf_from_int(vi_from_i8(header + PANEL_ROWS * i)));
    } else if (l.kind == SCALE_U) { /* u16: [2][2][16] */
        r.scale = vf_from_bytes(header + 2 * PANEL_ROWS * i);
        r.second = vf_from_bytes(header + 2 * PANEL_ROWS * i + PANEL_ROWS);
    } else { /* h32, h64, h128, e32: scale[2][16], then min[2][16] */
        const uint16_t *p = (const uint16_t *)header + PANEL_ROWS * (i * GROUP / l.group);
        r.scale = l.kind == SCALE_E ? vf_from_bfloat(p) : vf_from_half(p);
        if (l.has_min) {
            r.min = vf_from_half(p + 2 * PANEL_ROWS);
        }
    }
    return r;
}

/* ---- groups, one after the other --------------------------------------------------------- */

/* How many panels and columns at a time; the compiler knows both. */
typedef struct {
    int panels, c;
} extent;

/* Dot products of one group of some panels with c columns: of the whole group, or of its first half
 * and its second, which have scales of their own. */
typedef struct {
    vi all[PANELS * MAX_TILE];    /* (panels, c); groups of 16: of k 0..15 */
    vi second[PANELS * MAX_TILE]; /* (panels, c); groups of 16: of k 16..31 */
} group_dots;

/* w: (panels, STEPS), CODE_ROWS rows from `row` on. q: the group of the c columns. */
INLINE void dot_group(group_dots *dots, int row, code_recipe recipe, const vc *w, q8_group q,
                      extent e) {
    const int n = recipe.layout.group >= GROUP ? STEPS : STEPS / 2; /* steps that share a scale */
    const int zero_shift = recipe.zero_shift, max = recipe.max;
    vc_dot(dots->all, row, w, e.panels, 0, n, q, zero_shift, max, e.c);
    if (n < STEPS) {
        vc_dot(dots->second, row, w, e.panels, n, n, q, zero_shift, max, e.c);
    }
}

/* One group added to sum (panels, c). r: (panels).
 * One scale: sum += dot * (scale * x.scale) + min * x.total.
 * Two floats: the same for the first half, then for the second.
 * Groups of 16: dot is half[0] * dot of the first half + half[1] * that of the second, an integer;
 * minima times the sums of the codes of x, also an integer, are scaled by dmin * x.scale. */
INLINE void add_group(vf *sum, code_recipe recipe, const group_dots *dots, const group_scales *r,
                      q8_group q, extent e) {
    const layout_info l = recipe.layout;
    const int n = e.panels * e.c;
    vi dot[PANELS * MAX_TILE]; /* (panels, c) */
    UNROLL for (int i = 0; i < n; i++) {
        dot[i] = dots->all[i];
        if (l.group < GROUP && l.kind != SCALE_U) { /* still exact */
            dot[i] = vi_add(vi_mul(dot[i], r[i / e.c].half[0]),
                            vi_mul(dots->second[i], r[i / e.c].half[1]));
        }
    }
    UNROLL for (int i = 0; i < n; i++) {
        const vf scale = vf_mul(r[i / e.c].scale, vf_set1(q.scale[i % e.c]));
        sum[i] = vf_fma(vf_from_int(dot[i]), scale, sum[i]);
    }
    if (l.kind == SCALE_U) {
        UNROLL for (int i = 0; i < n; i++) {
            const vf scale = vf_mul(r[i / e.c].second, vf_set1(q.scale[i % e.c]));
            sum[i] = vf_fma(vf_from_int(dots->second[i]), scale, sum[i]);
        }
    }
    if (l.has_min && l.group == GROUP) {
        UNROLL for (int i = 0; i < n; i++) {
            sum[i] = vf_fma(r[i / e.c].min, vf_set1(q.total[i % e.c]), sum[i]);
        }
    } else if (l.has_min) {
        UNROLL for (int i = 0; i < n; i++) {
            const group_scales *of = &r[i / e.c];
            const vf minima = vf_from_int(vi_pair_dot(of->mins, q.minus_halves + 2 * (i % e.c)));
            sum[i] = vf_fma(minima, vf_mul(of->dmin, vf_set1(q.scale[i % e.c])), sum[i]);
        }
    }
}

/* A whole tile: one or two panels, all k, c columns. `part` columns at a time: as many as have
 * their sums in registers; a group is unpacked once for all parts. */
INLINE void tile_codes(code_recipe recipe, const tile_args *a, int panels, int c, int part) {
    const layout_info l = recipe.layout;
    const bool supers = l.front_bytes > 0;
    const int groups = l.block / GROUP; /* of a block; the last block may have fewer */
    const int64_t n = a->k / GROUP, n_blocks = (n + groups - 1) / groups;
    const uint8_t *block = (const uint8_t *)a->panel + front_bytes(&l, n_blocks);
    const vf unit = vf_set1(code_tables[a->table].unit);
    vf sum[PANELS * MAX_TILE]; /* (c / part, panels, part) */
    vf d[PANELS], dmin[PANELS], minus_dmin[PANELS];
    UNROLL for (int i = 0; i < panels * c; i++) { sum[i] = vf_zero(); }
    UNROLL for (int p = 0; p < panels; p++) { d[p] = dmin[p] = minus_dmin[p] = vf_zero(); }
    for (int64_t b = 0; b < n_blocks; b++) {
        UNROLL for (int p = 0; supers && p < panels; p++) {
            const uint8_t *floats = /* f16 d[16], maybe dmin[16] */
                (const uint8_t *)a->panel + p * a->panel_bytes + b * l.front_bytes;
            d[p] = vf_mul(vf_from_half((const uint16_t *)floats), unit);
            if (l.has_min) {
                dmin[p] = vf_from_half((const uint16_t *)floats + PANEL_ROWS);
                minus_dmin[p] = vf_sub(vf_zero(), dmin[p]);
            }
        }
        prefetch_ahead(block, l.header_bytes, c);
        for (int i = 0; i < groups && b * groups + i < n; i++) {
            const group_place at = {block, a->panel_bytes, i};
            vc w[PANELS * STEPS]; /* (panels, STEPS) */
            group_scales r[PANELS];
            UNROLL for (int p = 0; p < panels; p++) {
                const uint8_t *header = block + p * a->panel_bytes;
                prefetch_ahead(header + l.header_bytes + i * l.codes_bytes, l.codes_bytes, c);
                r[p] = scales_at(recipe, header, i, (block_floats){d[p], dmin[p], minus_dmin[p]});
            }
            if (CODE_ROWS == PANEL_ROWS) {
                unpack_rows(w, 0, recipe, at, panels);
            }
            UNROLL for (int j = 0; j < c; j += part) {
                const q8_group q = q8_at(a->x, b * groups + i, c, j);
                group_dots dots;
                for (int row = 0; row < PANEL_ROWS; row += CODE_ROWS) {
                    if (CODE_ROWS < PANEL_ROWS) { /* few registers: some rows at a time */
                        unpack_rows(w, row, recipe, at, panels);
                    }
                    dot_group(&dots, row, recipe, w, q, (extent){panels, part});
                }
                add_group(sum + panels * j, recipe, &dots, r, q, (extent){panels, part});
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

/* ---- one function per layout ------------------------------------------------------------- */

/* Codes through the table of the weight. recipe: without a table; zero_shift, a constant, and max
 * of unsigned weights. A table may stand around another zero: it is moved to 1 << zero_shift. Where
 * the instruction set takes signed weights it is moved to 0. */
INLINE void tile_with_table(code_recipe recipe, const tile_args *a, int panels, int c, int part) {
    const code_table *table = &code_tables[a->table];
    const int zero = SIGNED_WEIGHTS ? 0 : 1 << recipe.zero_shift;
    uint8_t moved[16]; /* the weight of each code */
    for (int i = 0; i < 16; i++) {
        moved[i] = (uint8_t)(table->shifted[i] + zero - table->zero);
    }
    recipe.table = moved;
    if (SIGNED_WEIGHTS) {
        recipe.max = 1 << recipe.zero_shift;
        recipe.zero_shift = -1;
    }
    tile_codes(recipe, a, panels, c, part);
}

/* Instruction sets that count the bits of products (NEEDS_MAX) get a function for each size of
 * weights that the tables of a layout have: up to 31, up to 127, any. Others get one for all. */
INLINE void tile_looked_up(layout_info l, const tile_args *a, int panels, int c, int part) {
    const uint32_t table = 1u << a->table, others = ~(uint32_t)(TABLES_TO_31 | TABLES_TO_127);
    if (NEEDS_MAX && (l.tables & TABLES_TO_31) != 0 && (table & TABLES_TO_31) != 0) {
        tile_with_table((code_recipe){l, NULL, a->grid, 4, 31}, a, panels, c, part);
    } else if (NEEDS_MAX && (l.tables & TABLES_TO_127) != 0 && (table & TABLES_TO_127) != 0) {
        tile_with_table((code_recipe){l, NULL, a->grid, 6, 127}, a, panels, c, part);
    } else if (!NEEDS_MAX || (l.tables & others) != 0) {
        tile_with_table((code_recipe){l, NULL, a->grid, 7, 255}, a, panels, c, part);
    }
}

/* Layouts without a look-up: codes are weights minus the zero of `table`, or have a minimum. Codes
 * of 8 bits have a sign: their zero is 128, or 0 where the instruction set takes signed weights. */
#define CODES(name, layout, table)                                                                 \
    SPECIALIZED void name(const tile_args *a, int panels, int c, int part) {                       \
        const layout_info l = layout_table[EDGE_LAYOUT_##layout];                                  \
        const code_table t = code_tables[EDGE_TABLE_##table];                                      \
        const bool is_signed = SIGNED_WEIGHTS && l.bits == 8;                                      \
        const int zero_shift = is_signed ? -1 : l.bits == 8 ? 7 : t.zero_shift;                    \
        const int max = is_signed ? 128 : l.bits == 1 ? t.max : (1 << l.bits) - 1;                 \
        tile_codes((code_recipe){l, NULL, a->grid, zero_shift, max}, a, panels, c, part);          \
    }
/* Layouts whose codes go through a table. */
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
CODES(tile_c1h128, C1H128, SIGN)
CODES(tile_c2h64, C2H64, MINUS_1)
CODES(tile_c2h128, C2H128, MINUS_1)
LOOKED_UP(tile_c4u16, C4U16)

/* Q4_0, and IQ4_NL with its table. */
SPECIALIZED void tile_c4h32(const tile_args *a, int panels, int c, int part) {
    if (a->table == EDGE_TABLE_MINUS_8) {
        tile_c4h32_minus_8(a, panels, c, part);
    } else {
        tile_c4h32_table(a, panels, c, part);
    }
}

/* ---- float weights ----------------------------------------------------------------------- */

/* One fma per k. The sums of even and of odd k are apart and added at the end, so that one column
 * alone hides the latency. Of many columns, as many at a time as registers hold: name_part does c
 * of them from `first` on.
 * w: element [k][16]; load makes a vf of 16 rows of one k. x: float [c][k]. even, odd: (c). */
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

/* ---- the tables -------------------------------------------------------------------------- */

/* One function per layout and number of columns: tile_<layout>_<c>, of one panel. */
#ifndef FLUSHES_DENORMALS
#define FOR_COLUMNS(layout, name, c)                                                               \
    static void name##_##c(const tile_args *a) { name(a, 1, c, c); }
#else
_Static_assert(TILE == 4 && PANELS == 1, "the scalar kernels' tiles, for they take the same");

/* Calls tile, and where it flushed a denormal the scalar kernel. The residual may be where the
 * result goes and must stay until then: it is added at last, and not by vectors. aside: (c, 16
 * rows). */
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

/* All layouts: those of floats, those with a function for pairs of panels, the others. */
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
    DO(G8X8B32, g8x8b32)                                                                           \
    DO(C1H128, c1h128)                                                                             \
    DO(C2H64, c2h64)                                                                               \
    DO(C2H128, c2h128)
#define FOR_OTHERS(DO)                                                                             \
    DO(C4MH32, c4mh32)                                                                             \
    DO(C5MH32, c5mh32)                                                                             \
    DO(C2MB16, c2mb16)                                                                             \
    DO(C3B16, c3b16)                                                                               \
    DO(C4MB32, c4mb32)                                                                             \
    DO(C5MB32, c5mb32)                                                                             \
    DO(C6B16, c6b16)                                                                               \
    DO(G9X8B16, g9x8b16)                                                                           \
    DO(G10X8B16, g10x8b16)                                                                         \
    DO(C4U16, c4u16)
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
