/* Packing disk blocks into panels, and panels back to float32. */
#include <stdatomic.h>
#include <string.h>

#include "error.h"
#include "formats/formats.h"
#include "layouts.h"
#include "pool.h"

#define FLOATS(name, bytes) {name, 1, (bytes) * PANEL_ROWS, 0, 0, false}
#define CODES(name, headers, codes)                                                                \
    {name, 2 * GROUP, (headers) * SCALES_BYTES + 2 * (codes), (headers) * SCALES_BYTES, codes, true}

const layout_info layout_table[EDGE_N_LAYOUTS] = {
    [EDGE_LAYOUT_F32] = FLOATS("f32", 4),
    [EDGE_LAYOUT_F16] = FLOATS("f16", 2),
    [EDGE_LAYOUT_BF16] = FLOATS("bf16", 2),
    [EDGE_LAYOUT_C4H32] = CODES("c4h32", 1, C4_CODES_BYTES),
    [EDGE_LAYOUT_C4MH32] = CODES("c4mh32", 2, C4_CODES_BYTES),
    [EDGE_LAYOUT_C8H32] = CODES("c8h32", 1, C8_CODES_BYTES),
};

const char *edge_layout_name(int32_t layout) {
    return layout >= 0 && layout < EDGE_N_LAYOUTS ? layout_table[layout].name : NULL;
}

int32_t edge_layout_takes_q8(int32_t layout) {
    return layout >= 0 && layout < EDGE_N_LAYOUTS && layout_table[layout].takes_q8;
}

int32_t edge_weight_describe(int32_t type, int64_t n, int64_t k, edge_weight *weight,
                             edge_error *error) {
    const format_info *format = format_find(type);
    if (weight == NULL || format == NULL) {
        return fail(error, EDGE_BAD_ARGUMENT, "tensor type %d has no layout", type);
    }
    if (n < 1 || k < 1 || n > INT32_MAX || k > MAX_DIM || k % format->block != 0) {
        return fail(error, EDGE_BAD_ARGUMENT, "a (%lld, %lld) matrix cannot hold blocks of %d",
                    (long long)n, (long long)k, format->block);
    }
    weight->layout = format->layout;
    weight->table = format->table;
    weight->n = n;
    weight->k = k;
    weight->data = NULL;
    weight->n_bytes = panel_count(n) * panel_bytes(format->layout, k);
    return EDGE_OK;
}

/* ---- packing ----------------------------------------------------------------------------- */

/* Byte 4 r + t of step s: row r, k 8 s + t low nibble, k 8 s + 4 + t high. */
static void put_c4(uint8_t *codes, int r, const int8_t code[GROUP]) {
    for (int s = 0; s < 4; s++) {
        for (int t = 0; t < 4; t++) {
            codes[64 * s + 4 * r + t] = (uint8_t)(code[8 * s + t] | code[8 * s + 4 + t] << 4);
        }
    }
}

static void put_c8(uint8_t *codes, int r, const int8_t code[GROUP]) {
    for (int s = 0; s < 8; s++) {
        memcpy(codes + 64 * s + 4 * r, code + 4 * s, 4);
    }
}

/* Where a panel keeps the scales, minima and codes of group g. */
typedef struct {
    uint8_t *scales, *mins, *codes;
} group_place;

static group_place place_of(int32_t layout, const uint8_t *panel, int64_t g) {
    const layout_info *l = &layout_table[layout];
    uint8_t *block = (uint8_t *)panel + g / 2 * l->block_bytes;
    const int64_t half = g % 2;
    return (group_place){block + half * 2 * PANEL_ROWS,
                         block + SCALES_BYTES + half * 2 * PANEL_ROWS,
                         block + l->header_bytes + half * l->codes_bytes};
}

static void put_group(int32_t layout, uint8_t *panel, int64_t g, int r, const decoded_group *in) {
    const group_place at = place_of(layout, panel, g);
    memcpy(at.scales + 2 * r, &in->scale, 2);
    if (layout == EDGE_LAYOUT_C4MH32) {
        memcpy(at.mins + 2 * r, &in->min, 2);
    }
    if (layout == EDGE_LAYOUT_C8H32) {
        put_c8(at.codes, r, in->code);
    } else {
        put_c4(at.codes, r, in->code);
    }
}

static bool element_is_finite(int32_t bytes, int32_t layout, const uint8_t *p) {
    if (bytes == 4) {
        return (p[3] & 0x7f) != 0x7f || (p[2] & 0x80) == 0;
    }
    const uint16_t h = read_u16(p);
    return layout == EDGE_LAYOUT_F16 ? half_is_finite(h) : (h & 0x7f80) != 0x7f80;
}

typedef struct {
    const format_info *format;
    edge_weight *weight;
    const uint8_t *src;
    int64_t row_bytes;   /* on disk */
    _Atomic int64_t bad; /* first element that is not finite, as row * k + column; -1: none */
} packing;

static void report_bad(packing *p, int64_t row, int64_t column) {
    const int64_t element = row * p->weight->k + column;
    int64_t seen = atomic_load(&p->bad);
    while ((seen < 0 || element < seen) && !atomic_compare_exchange_weak(&p->bad, &seen, element)) {
    }
}

static void pack_panel(packing *p, int64_t i_panel) {
    const format_info *format = p->format;
    const edge_weight *w = p->weight;
    uint8_t *panel = (uint8_t *)w->data + i_panel * panel_bytes(w->layout, w->k);
    const int64_t rows = w->n - i_panel * PANEL_ROWS;
    if (rows < PANEL_ROWS || w->k % layout_table[w->layout].block != 0) {
        memset(panel, 0, (size_t)panel_bytes(w->layout, w->k));
    }
    for (int r = 0; r < PANEL_ROWS && r < rows; r++) {
        const int64_t row = i_panel * PANEL_ROWS + r;
        const uint8_t *src = p->src + row * p->row_bytes;
        for (int64_t j = 0; j < w->k / format->block; j++, src += format->block_bytes) {
            if (format->decode == NULL) {
                memcpy(panel + (j * PANEL_ROWS + r) * format->block_bytes, src,
                       (size_t)format->block_bytes);
                if (!element_is_finite(format->block_bytes, w->layout, src)) {
                    report_bad(p, row, j);
                    return;
                }
                continue;
            }
            decoded_group group;
            format->decode(src, &group);
            put_group(w->layout, panel, j, r, &group);
            if (!half_is_finite(group.scale) || !half_is_finite(group.min)) {
                report_bad(p, row, j * format->block);
                return;
            }
        }
    }
}

enum { PANELS_PER_CHUNK = 16 };

static uint32_t pack_chunks(void *context, uint32_t stage) {
    (void)stage;
    const packing *p = context;
    return (uint32_t)((panel_count(p->weight->n) + PANELS_PER_CHUNK - 1) / PANELS_PER_CHUNK);
}

static void pack_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    packing *p = context;
    const int64_t first = (int64_t)chunk * PANELS_PER_CHUNK, n = panel_count(p->weight->n);
    for (int64_t i = first; i < first + PANELS_PER_CHUNK && i < n; i++) {
        pack_panel(p, i);
    }
}

int32_t edge_weight_pack(edge_pool *pool, int32_t type, edge_weight *weight, const void *src,
                         int64_t src_bytes, edge_error *error) {
    const format_info *format = format_find(type);
    if (pool == NULL || weight == NULL || weight->data == NULL || src == NULL || format == NULL ||
        format->layout != weight->layout || weight->k % format->block != 0) {
        return fail(error, EDGE_BAD_ARGUMENT, "the weight was not described for type %d", type);
    }
    const int64_t row_bytes = weight->k / format->block * format->block_bytes;
    if (src_bytes != weight->n * row_bytes ||
        weight->n_bytes != panel_count(weight->n) * panel_bytes(weight->layout, weight->k)) {
        return fail(error, EDGE_BAD_ARGUMENT, "%lld bytes of blocks, the matrix needs %lld",
                    (long long)src_bytes, (long long)(weight->n * row_bytes));
    }
    packing p = {format, weight, src, row_bytes, -1};
    const pool_job job = {1, pack_chunks, pack_chunk, &p};
    pool_run(pool, &job);
    const int64_t bad = atomic_load(&p.bad);
    if (bad >= 0) {
        const int64_t row = bad / weight->k, column = bad % weight->k;
        fail(error, EDGE_BAD_DATA, "row %lld, column %lld is NaN or infinite", (long long)row,
             (long long)column);
        if (error != NULL) {
            error->row = row;
            error->column = column;
        }
        return EDGE_BAD_DATA;
    }
    return EDGE_OK;
}

/* ---- unpacking --------------------------------------------------------------------------- */

static int code4(const uint8_t *codes, int r, int64_t k) {
    const int64_t s = k / 8, t = k % 8;
    const uint8_t byte = codes[64 * s + 4 * r + t % 4];
    return t < 4 ? byte & 15 : byte >> 4;
}

static float unpack_one(const edge_weight *w, const uint8_t *panel, int r, int64_t k) {
    float f;
    switch (w->layout) {
    case EDGE_LAYOUT_F32: memcpy(&f, panel + (k * PANEL_ROWS + r) * 4, 4); return f;
    case EDGE_LAYOUT_F16: return half_to_float(read_u16(panel + (k * PANEL_ROWS + r) * 2));
    case EDGE_LAYOUT_BF16: return bfloat_to_float(read_u16(panel + (k * PANEL_ROWS + r) * 2));
    default: break;
    }
    const group_place at = place_of(w->layout, panel, k / GROUP);
    const float scale = half_to_float(read_u16(at.scales + 2 * r));
    k %= GROUP;
    if (w->layout == EDGE_LAYOUT_C8H32) {
        return scale * (float)((const int8_t *)at.codes)[k / 4 * 64 + 4 * r + k % 4];
    }
    const int code = code4(at.codes, r, k);
    if (w->layout == EDGE_LAYOUT_C4MH32) {
        return scale * (float)code + half_to_float(read_u16(at.mins + 2 * r));
    }
    return scale * (float)(w->table == EDGE_TABLE_IQ4_NL ? iq4_nl_values[code] : code - 8);
}

int32_t edge_weight_unpack(const edge_weight *weight, int64_t row, int64_t n_rows, float *dst) {
    if (weight == NULL || dst == NULL || weight->data == NULL || weight->layout < 0 ||
        weight->layout >= EDGE_N_LAYOUTS || row < 0 || n_rows < 0 || row > weight->n - n_rows) {
        return EDGE_BAD_ARGUMENT;
    }
    const int64_t bytes = panel_bytes(weight->layout, weight->k);
    for (int64_t i = row; i < row + n_rows; i++) {
        const uint8_t *panel = (const uint8_t *)weight->data + i / PANEL_ROWS * bytes;
        for (int64_t k = 0; k < weight->k; k++) {
            *dst++ = unpack_one(weight, panel, (int)(i % PANEL_ROWS), k);
        }
    }
    return EDGE_OK;
}
