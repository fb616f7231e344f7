#include "panels.h"

#include <string.h>

#include "tables.h"

/* ---- codes ------------------------------------------------------------------------------- */

/* The k of step s, byte t. */
static int k_of(int s, int t) { return 16 * (s / 4) + 4 * t + s % 4; }

/* Bits shift .. shift + width - 1 of the codes of row r into a plane. */
static inline void put_plane(uint8_t *plane, int r, int width, int shift,
                             const int8_t code[GROUP]) {
    const int steps = 8 / width, mask = (1 << width) - 1;
    for (int v = 0; v < width; v++) {
        for (int t = 0; t < 4; t++) {
            unsigned byte = 0;
            for (int i = 0; i < steps; i++) {
                byte |= (unsigned)((uint8_t)code[k_of(v * steps + i, t)] >> shift & mask)
                        << (i * width);
            }
            plane[64 * v + 4 * r + t] = (uint8_t)byte;
        }
    }
}

static inline void get_plane(const uint8_t *plane, int r, int width, int shift,
                             uint8_t code[GROUP]) {
    const int steps = 8 / width, mask = (1 << width) - 1;
    for (int v = 0; v < width; v++) {
        for (int t = 0; t < 4; t++) {
            const int byte = plane[64 * v + 4 * r + t];
            for (int i = 0; i < steps; i++) {
                code[k_of(v * steps + i, t)] |= (uint8_t)((byte >> (i * width) & mask) << shift);
            }
        }
    }
}

/* The low plane of codes of so many bits; what is left is the high one. */
static int low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

static void put_codes(uint8_t *codes, int r, int bits, const int8_t code[GROUP]) {
    const int low = low_bits(bits);
    put_plane(codes, r, low, 0, code);
    if (bits > low) {
        put_plane(codes + low * PLANE_BYTES, r, bits - low, low, code);
    }
}

static void get_codes(const uint8_t *codes, int r, int bits, uint8_t code[GROUP]) {
    const int low = low_bits(bits);
    memset(code, 0, GROUP);
    get_plane(codes, r, low, 0, code);
    if (bits > low) {
        get_plane(codes + low * PLANE_BYTES, r, bits - low, low, code);
    }
}

/* ---- grids: where the index of entry i (in order of k) of row r lies ----------------------- */

typedef struct {
    int vector, byte;
} index_place;

static index_place index_at(const grid_info *grid, int r, int i) {
    if (grid->weights == 4) {
        return (index_place){i / 4, 4 * r + i % 4};
    }
    return (index_place){0, 16 * (r / 4) + 8 * (i / 2) + 2 * (r % 4) + i % 2};
}

/* The bits of indices above the eighth, of vector v of group g: 8 bytes per bit. */
static uint8_t *high_bits(const layout_info *l, const grid_info *grid, uint8_t *block, int g,
                          int v) {
    const int vectors = 8 / grid->weights, n = grid->index_bits - 8;
    return block + 64 * (GROUP / l->group) + (g * vectors + v) * n * 8;
}

static void put_indices(const layout_info *l, const grid_info *grid, uint8_t *block, int g, int r,
                        const uint16_t *index) {
    uint8_t *codes = block + l->header_bytes + g * l->codes_bytes;
    for (int i = 0; i < GROUP / grid->weights; i++) {
        const index_place at = index_at(grid, r, i);
        codes[64 * at.vector + at.byte] = (uint8_t)index[i];
        uint8_t *high = high_bits(l, grid, block, g, at.vector);
        for (int b = 0; b < grid->index_bits - 8; b++) {
            high[8 * b + at.byte / 8] |= (uint8_t)((index[i] >> (8 + b) & 1) << at.byte % 8);
        }
    }
}

/* Codes of the magnitudes with the sign above them. */
static void get_grid_codes(const layout_info *l, const grid_info *grid, const uint8_t *block, int g,
                           int r, uint8_t code[GROUP]) {
    const uint8_t *codes = block + l->header_bytes + g * l->codes_bytes;
    const int bits = 16 / grid->weights, sign_bit = bits == 4 ? 3 : 2;
    memset(code, 0, GROUP);
    get_plane(codes + 64 * (8 / grid->weights), r, 1, sign_bit, code);
    for (int i = 0; i < GROUP / grid->weights; i++) {
        const index_place at = index_at(grid, r, i);
        const uint8_t *high = high_bits(l, grid, (uint8_t *)block, g, at.vector);
        int index = codes[64 * at.vector + at.byte];
        for (int b = 0; b < grid->index_bits - 8; b++) {
            index |= (high[8 * b + at.byte / 8] >> at.byte % 8 & 1) << (8 + b);
        }
        const int entry = grid->entries[index];
        for (int w = 0; w < grid->weights; w++) {
            code[i * grid->weights + w] |= (uint8_t)(entry >> (bits * w) & ((1 << bits) - 1));
        }
    }
}

/* ---- blocks ------------------------------------------------------------------------------ */

static uint8_t *block_at(const layout_info *l, const uint8_t *panel, int64_t k, int64_t j) {
    const int64_t n_blocks = (k + l->block - 1) / l->block;
    return (uint8_t *)panel + front_bytes(l, n_blocks) + j * block_bytes(l);
}

static void put_floats(const layout_info *l, uint8_t *panel, int64_t j, int r, uint16_t scale,
                       uint16_t min) {
    uint8_t *front = panel + j * l->front_bytes + 2 * r;
    memcpy(front, &scale, 2);
    if (l->has_min) {
        memcpy(front + 2 * PANEL_ROWS, &min, 2);
    }
}

/* The scales of a super-block, or of 8 bits; drawn in layouts.h. */
static void put_integers(const layout_info *l, uint8_t *header, int r, const decoded_block *in) {
    for (int g = 0; g < l->block / l->group; g++) {
        const int scale = in->group_scale[g], min = in->group_min[g];
        if (!l->has_min) {
            header[PANEL_ROWS * g + r] = (uint8_t)scale;
        } else if (l->group == 16) {
            header[PANEL_ROWS * g + r] = (uint8_t)(scale | min << 4);
        } else {
            uint8_t *low = header + PANEL_ROWS * (SUPER / GROUP + g / 2) + r;
            header[PANEL_ROWS * g + r] = (uint8_t)(scale | min >> 4 << 6);
            *low = (uint8_t)(g % 2 == 0 ? min & 15 : *low | (min & 15) << 4);
        }
    }
}

void panel_put(int32_t layout, uint8_t *panel, int64_t k, int64_t j, int r,
               const decoded_block *in) {
    const layout_info *l = &layout_table[layout];
    const bool whole = l->kind == SCALE_B || l->kind == SCALE_U; /* else half of a panel's block */
    const int n = (whole ? l->block : l->group) / GROUP, half = whole ? 0 : (int)(j % 2);
    uint8_t *block = block_at(l, panel, k, whole ? j : j / 2);
    if (l->kind == SCALE_B) {
        put_floats(l, panel, j, r, in->scale, in->min);
    }
    if (whole) {
        put_integers(l, block, r, in);
    } else {
        uint8_t *scale = block + half * 2 * PANEL_ROWS + 2 * r;
        memcpy(scale, &in->scale, 2);
        if (l->has_min) {
            memcpy(scale + 4 * PANEL_ROWS, &in->min, 2);
        }
    }
    for (int g = 0; g < n; g++) {
        put_codes(block + l->header_bytes + (half * n + g) * l->codes_bytes, r, l->bits,
                  in->code + GROUP * g);
    }
}

void panel_put_grid(int32_t layout, uint8_t *panel, int64_t k, int64_t j, int r,
                    const decoded_grid *in) {
    const layout_info *l = &layout_table[layout];
    const grid_info *grid = grid_of(layout);
    uint8_t *block = block_at(l, panel, k, j);
    put_floats(l, panel, j, r, in->scale, 0);
    for (int g = 0; g < SUPER / GROUP; g++) {
        if (l->group == 16) {
            block[PANEL_ROWS * g + r] =
                (uint8_t)(in->group_scale[2 * g] | in->group_scale[2 * g + 1] << 4);
        } else {
            uint8_t *pair = block + PANEL_ROWS * (g / 2) + r;
            *pair = (uint8_t)(g % 2 == 0 ? in->group_scale[g] : *pair | in->group_scale[g] << 4);
        }
        put_indices(l, grid, block, g, r, in->index + g * GROUP / grid->weights);
        int8_t sign[GROUP];
        for (int i = 0; i < GROUP; i++) {
            sign[i] = in->sign[g * GROUP / 8 + i / 8] >> i % 8 & 1;
        }
        uint8_t *codes = block + l->header_bytes + g * l->codes_bytes;
        put_plane(codes + 64 * (8 / grid->weights), r, 1, 0, sign);
    }
}

/* ---- reading ----------------------------------------------------------------------------- */

/* An unsigned float of 8 bits, see u16 in layouts.h. */
static float byte_to_float(uint8_t b) {
    return (float)(b & 15) * (float)(1 << (b >> 4)) * 0x1p-10f;
}

float code_scale(const layout_info *layout, int32_t table, uint16_t scale, int integer) {
    switch (layout->kind) {
    case SCALE_U: return byte_to_float((uint8_t)integer);
    case SCALE_E: return bfloat_to_float(scale);
    case SCALE_H: return half_to_float(scale);
    default: /* exact: at most 24 bits */
        return half_to_float(scale) * code_tables[table].unit * (float)integer;
    }
}

float code_min(const layout_info *layout, uint16_t min, int integer) {
    if (!layout->has_min) {
        return -0.0f;
    }
    return layout->kind == SCALE_H ? half_to_float(min) : -(half_to_float(min) * (float)integer);
}

/* Integers of group g of a super-block, of k 0..15 and 16..31. */
typedef struct {
    int scale[2], min[2];
} integers;

static integers integers_of(const layout_info *l, const uint8_t *header, int g, int r) {
    const uint8_t *one = header + PANEL_ROWS * g + r;
    const uint8_t *two = header + 2 * PANEL_ROWS * g + r;
    if (l->kind == SCALE_GRID) {
        const uint8_t *pair = header + PANEL_ROWS * (l->group == 16 ? g : g / 2) + r;
        const int a = l->group == 16 ? *pair & 15 : *pair >> (g % 2 * 4) & 15;
        const int b = l->group == 16 ? *pair >> 4 : a;
        return (integers){{2 * a + 1, 2 * b + 1}, {0, 0}};
    }
    if (l->group == 16) {
        const int a = two[0], b = two[PANEL_ROWS];
        return l->has_min ? (integers){{a & 15, b & 15}, {a >> 4, b >> 4}}
                          : (integers){{(int8_t)a, (int8_t)b}, {0, 0}};
    }
    if (l->has_min) {
        const int low = header[PANEL_ROWS * (SUPER / GROUP + g / 2) + r] >> (g % 2 * 4) & 15;
        const int min = *one >> 6 << 4 | low;
        return (integers){{*one & 63, *one & 63}, {min, min}};
    }
    return (integers){{(int8_t)*one, (int8_t)*one}, {0, 0}};
}

static inline int8_t code_value(const layout_info *l, const code_table *table, uint8_t code) {
    return (int8_t)(l->bits <= 4 ? table->shifted[code] - table->zero : code - table->zero);
}

int panel_values(int32_t layout, int32_t table, int8_t *values) {
    const layout_info *l = &layout_table[layout];
    for (int code = 0; code < 1 << l->bits; code++) {
        values[code] = code_value(l, &code_tables[table], (uint8_t)code);
    }
    return 1 << l->bits;
}

void panel_codes(const edge_weight *w, const uint8_t *panel, int r, int64_t g, group_codes *out) {
    const layout_info *l = &layout_table[w->layout];
    const code_table *table = &code_tables[w->table];
    const int groups = l->block / GROUP, i = (int)(g % groups);
    const uint8_t *block = block_at(l, panel, w->k, g / groups);
    const uint8_t *codes = block + l->header_bytes + i * l->codes_bytes;
    uint16_t scale = 0, min = 0;
    integers n = {{0, 0}, {0, 0}};
    if (l->kind == SCALE_U) {
        n.scale[0] = block[PANEL_ROWS * 2 * i + r];
        n.scale[1] = block[PANEL_ROWS * (2 * i + 1) + r];
    } else if (l->kind == SCALE_H || l->kind == SCALE_E) {
        const uint8_t *p = block + i * GROUP / l->group * 2 * PANEL_ROWS + 2 * r;
        scale = read_u16(p);
        min = l->has_min ? read_u16(p + 4 * PANEL_ROWS) : 0;
    } else {
        const uint8_t *front = panel + g / groups * l->front_bytes + 2 * r;
        scale = read_u16(front);
        min = l->has_min ? read_u16(front + 2 * PANEL_ROWS) : 0;
        n = integers_of(l, block, i, r);
    }
    for (int h = 0; h < 2; h++) {
        out->scale[h] = code_scale(l, w->table, scale, n.scale[h]);
        out->min[h] = code_min(l, min, n.min[h]);
    }
    uint8_t code[GROUP];
    if (l->kind == SCALE_GRID) {
        get_grid_codes(l, grid_of(w->layout), block, i, r, code);
    } else {
        get_codes(codes, r, l->bits, code);
    }
    for (int k = 0; k < GROUP; k++) {
        out->code[k] = code_value(l, table, code[k]);
    }
}

void panel_get(const edge_weight *w, const uint8_t *panel, int r, int64_t g, float *out) {
    group_codes in;
    panel_codes(w, panel, r, g, &in);
    for (int k = 0; k < GROUP; k++) {
        const float product = in.scale[k / 16] * (float)in.code[k];
        out[k] = product + in.min[k / 16];
    }
}
