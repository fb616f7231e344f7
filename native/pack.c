/* Packing disk blocks into panels, and panels back to float32. */
#include <assert.h>
#include <string.h>

#include "error.h"
#include "panels.h"
#include "threads.h"

int32_t edge_layout_version(void) { return LAYOUT_VERSION; }

const char *edge_layout_name(int32_t layout) {
    return layout >= 0 && layout < EDGE_N_LAYOUTS ? layout_table[layout].name : NULL;
}

int32_t edge_layout_takes_q8(int32_t layout) {
    return layout >= 0 && layout < EDGE_N_LAYOUTS && takes_q8(layout);
}

int32_t edge_panel_rows(void) { return PANEL_ROWS; }

int32_t edge_alignment(void) { return ALIGNMENT; }

int32_t edge_layout_group(int32_t layout) {
    return layout >= 0 && layout < EDGE_N_LAYOUTS ? layout_table[layout].group : 0;
}

static int32_t layout_of(const format_info *format, int32_t form) {
    return form == EDGE_FORM_COMPACT && format->decode_grid != NULL ? format->compact
                                                                    : format->layout;
}

int32_t edge_weight_describe(int32_t type, int32_t form, int64_t n, int64_t k, edge_weight *weight,
                             edge_error *error) {
    const format_info *format = format_find(type);
    if (weight == NULL || (form != EDGE_FORM_FAST && form != EDGE_FORM_COMPACT)) {
        return fail(error, EDGE_BAD_ARGUMENT, "no weight, or form %d", form);
    }
    if (format == NULL) {
        return fail(error, EDGE_BAD_ARGUMENT, "tensor type %d has no layout", type);
    }
    if (n < 1 || k < 1 || n > INT32_MAX || k > MAX_DIM || k % format->block != 0) {
        return fail(error, EDGE_BAD_ARGUMENT, "a (%lld, %lld) matrix cannot hold blocks of %d",
                    (long long)n, (long long)k, format->block);
    }
    weight->layout = layout_of(format, form);
    weight->table = format->table;
    weight->n = n;
    weight->k = k;
    weight->data = NULL;
    weight->n_bytes = panel_count(n) * panel_bytes(weight->layout, k);
    return EDGE_OK;
}

/* ---- packing ----------------------------------------------------------------------------- */

/* Codes of a block that was decoded as far as its grid: magnitudes, the sign above them. */
static void grid_to_codes(const format_info *format, const decoded_grid *in, decoded_block *out) {
    const grid_info *grid = grid_of(format->compact);
    const int bits = 16 / grid->weights, sign_bit = bits == 4 ? 3 : 2;
    for (int g = 0; g < SUPER / layout_table[format->layout].group; g++) {
        out->group_scale[g] = (int8_t)(2 * in->group_scale[g] + 1);
    }
    for (int k = 0; k < SUPER; k++) {
        const int index = in->index[k / grid->weights];
        const int entry = grid->entries[index];
        const int magnitude = entry >> (bits * (k % grid->weights)) & ((1 << bits) - 1);
        out->code[k] = (int8_t)(magnitude | (in->sign[k / 8] >> k % 8 & 1) << sign_bit);
    }
    out->scale = in->scale;
}

/* One block of row r; false: it holds NaN or infinity. */
static bool pack_block(const format_info *format, const edge_weight *w, uint8_t *panel, int64_t j,
                       int r, const uint8_t *src) {
    decoded_block block = {0};
    if (format->decode_grid != NULL) {
        decoded_grid grid;
        format->decode_grid(src, &grid);
        if (w->layout == format->compact) {
            panel_put_grid(w->layout, panel, w->k, j, r, &grid);
            return half_is_finite(grid.scale);
        }
        grid_to_codes(format, &grid, &block);
    } else {
        format->decode(src, &block);
    }
    panel_put(w->layout, panel, w->k, j, r, &block);
    return scales_are_finite(w->layout, &block);
}

#define NOT_FINITE "is NaN or infinite"

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

/* Whether 16 rows of blocks write every byte of a panel. */
static bool is_filled(const edge_weight *w) {
    const layout_info *l = &layout_table[w->layout];
    return w->k % l->block == 0 && l->kind != SCALE_GRID &&
           w->k / l->block * l->front_bytes % 64 == 0;
}

static void pack_panel(packing *p, int64_t i_panel) {
    const format_info *format = p->format;
    const edge_weight *w = p->weight;
    uint8_t *panel = (uint8_t *)w->data + i_panel * panel_bytes(w->layout, w->k);
    const int64_t rows = w->n - i_panel * PANEL_ROWS;
    if (rows < PANEL_ROWS || !is_filled(w)) {
        memset(panel, 0, (size_t)panel_bytes(w->layout, w->k));
    }
    for (int r = 0; r < PANEL_ROWS && r < rows; r++) {
        const int64_t row = i_panel * PANEL_ROWS + r;
        const uint8_t *src = p->src + row * p->row_bytes;
        for (int64_t j = 0; j < w->k / format->block; j++, src += format->block_bytes) {
            bool finite;
            if (layout_table[w->layout].kind == SCALE_NONE) {
                memcpy(panel + (j * PANEL_ROWS + r) * format->block_bytes, src,
                       (size_t)format->block_bytes);
                finite = element_is_finite(format->block_bytes, w->layout, src);
            } else {
                finite = pack_block(format, w, panel, j, r, src);
            }
            if (!finite) {
                report_element(&p->bad, row * w->k + j * format->block);
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

int32_t edge_weight_pack(edge_threads *threads, int32_t type, edge_weight *weight, const void *src,
                         int64_t src_bytes, edge_error *error) {
    const format_info *format = format_find(type);
    if (threads == NULL || weight == NULL || weight->data == NULL || src == NULL ||
        format == NULL ||
        (format->layout != weight->layout &&
         layout_of(format, EDGE_FORM_COMPACT) != weight->layout) ||
        weight->k % format->block != 0) {
        return fail(error, EDGE_BAD_ARGUMENT, "the weight was not described for type %d", type);
    }
    const int64_t row_bytes = weight->k / format->block * format->block_bytes;
    if (src_bytes != weight->n * row_bytes ||
        weight->n_bytes != panel_count(weight->n) * panel_bytes(weight->layout, weight->k)) {
        return fail(error, EDGE_BAD_ARGUMENT, "%lld bytes of blocks, the matrix needs %lld",
                    (long long)src_bytes, (long long)(weight->n * row_bytes));
    }
    packing p = {format, weight, src, row_bytes, -1};
    const threads_job job = {1, pack_chunks, pack_chunk, &p};
    threads_run(threads, &job);
    const int64_t bad = atomic_load(&p.bad);
    return bad < 0 ? EDGE_OK : fail_element(error, bad / weight->k, bad % weight->k, NOT_FINITE);
}

/* ---- unpacking --------------------------------------------------------------------------- */

static float float_at(int32_t layout, const uint8_t *p) {
    float f;
    switch (layout) {
    case EDGE_LAYOUT_F16: return half_to_float(read_u16(p));
    case EDGE_LAYOUT_BF16: return bfloat_to_float(read_u16(p));
    default: memcpy(&f, p, 4); return f;
    }
}

static float element(const edge_weight *w, const uint8_t *panel, int r, int64_t k) {
    return float_at(w->layout, panel + (k * PANEL_ROWS + r) * (layout_table[w->layout].bits / 8));
}

static bool has_rows(const edge_weight *w, int64_t row, int64_t n_rows) {
    return w != NULL && w->data != NULL && w->layout >= 0 && w->layout < EDGE_N_LAYOUTS &&
           row >= 0 && n_rows >= 0 && row <= w->n - n_rows;
}

int32_t edge_weight_unpack(const edge_weight *weight, int64_t row, int64_t n_rows, float *dst) {
    if (dst == NULL || !has_rows(weight, row, n_rows)) {
        return EDGE_BAD_ARGUMENT;
    }
    const int64_t bytes = panel_bytes(weight->layout, weight->k);
    for (int64_t i = row; i < row + n_rows; i++) {
        const uint8_t *panel = (const uint8_t *)weight->data + i / PANEL_ROWS * bytes;
        const int r = (int)(i % PANEL_ROWS);
        if (takes_q8(weight->layout)) {
            for (int64_t g = 0; g < weight->k / GROUP; g++, dst += GROUP) {
                panel_get(weight, panel, r, g, dst);
            }
        } else {
            for (int64_t k = 0; k < weight->k; k++) {
                *dst++ = element(weight, panel, r, k);
            }
        }
    }
    return EDGE_OK;
}

int32_t edge_weight_codes(const edge_weight *weight, int64_t row, int64_t n_rows, int8_t *codes,
                          float *scales, float *mins) {
    if (codes == NULL || scales == NULL || mins == NULL || !has_rows(weight, row, n_rows) ||
        !takes_q8(weight->layout)) {
        return EDGE_BAD_ARGUMENT;
    }
    const int64_t bytes = panel_bytes(weight->layout, weight->k);
    const int span = layout_table[weight->layout].group; /* of a scale: half a group, or some */
    for (int64_t i = row; i < row + n_rows; i++) {
        const uint8_t *panel = (const uint8_t *)weight->data + i / PANEL_ROWS * bytes;
        for (int64_t g = 0; g < weight->k / GROUP; g++, codes += GROUP) {
            group_codes group;
            panel_codes(weight, panel, (int)(i % PANEL_ROWS), g, &group);
            memcpy(codes, group.code, GROUP);
            for (int h = 0; h < 2; h++) {
                if ((g * GROUP + h * GROUP / 2) % span == 0) {
                    *scales++ = group.scale[h];
                    *mins++ = group.min[h];
                }
            }
        }
    }
    return EDGE_OK;
}

int32_t edge_weight_values(const edge_weight *weight, int8_t *values, int32_t *has_min) {
    if (weight == NULL || values == NULL || has_min == NULL || weight->layout < 0 ||
        weight->layout >= EDGE_N_LAYOUTS || weight->table < 0 || weight->table >= EDGE_N_TABLES ||
        !takes_q8(weight->layout)) {
        return 0;
    }
    *has_min = layout_table[weight->layout].has_min;
    return panel_values(weight->layout, weight->table, values);
}

/* ---- disk blocks to float32 --------------------------------------------------------------- */

typedef struct {
    const format_info *format;
    const uint8_t *src;
    int64_t n, k, row_bytes;
    float *dst;
    _Atomic int64_t bad; /* as in packing */
} decoding;

enum { BLOCK_PANEL_BYTES = 8192 }; /* at least those of a panel with one block a row */

/* Block j of up to 16 rows, through a panel of one block a row: so the values are those of
 * edge_weight_unpack. */
static void decode_blocks(decoding *d, int64_t first, int rows, int64_t j) {
    _Alignas(64) uint8_t panel[BLOCK_PANEL_BYTES];
    const format_info *format = d->format;
    const int64_t bytes = panel_bytes(format->layout, format->block);
    const edge_weight w = {format->layout, format->table, PANEL_ROWS, format->block, panel, bytes};
    assert(bytes <= BLOCK_PANEL_BYTES);
    memset(panel, 0, (size_t)bytes);
    for (int r = 0; r < rows; r++) {
        const uint8_t *src = d->src + (first + r) * d->row_bytes + j * format->block_bytes;
        const int64_t start = (first + r) * d->k + j * format->block;
        if (!pack_block(format, &w, panel, 0, r, src)) {
            report_element(&d->bad, start);
        }
        for (int g = 0; g < format->block / GROUP; g++) {
            panel_get(&w, panel, r, g, d->dst + start + g * GROUP);
        }
    }
}

/* The loops have no branches, so that compilers make vectors of them. */
static void widen(int32_t layout, const uint8_t *src, int64_t k, float *dst) {
    if (layout == EDGE_LAYOUT_F32) {
        memcpy(dst, src, (size_t)k * sizeof *dst);
        return;
    }
    union {
        uint32_t u;
        float f;
    } x;
    if (layout == EDGE_LAYOUT_BF16) {
        for (int64_t j = 0; j < k; j++) {
            x.u = (uint32_t)read_u16(src + 2 * j) << 16;
            dst[j] = x.f;
        }
        return;
    }
    for (int64_t j = 0; j < k; j++) { /* exact, also for denormals; not for infinity */
        const uint32_t h = read_u16(src + 2 * j);
        x.u = (h & 0x7fff) << 13;
        x.f *= 0x1p112f;
        x.u |= (h & 0x8000) << 16;
        dst[j] = x.f;
    }
}

/* Whether all of k floats are finite. */
static bool all_finite(int32_t layout, const uint8_t *src, int64_t k) {
    uint32_t bad = 0;
    if (layout == EDGE_LAYOUT_F32) {
        for (int64_t j = 0; j < k; j++) {
            bad |= (uint32_t)((read_u16(src + 4 * j + 2) & 0x7f80) == 0x7f80);
        }
        return bad == 0;
    }
    const uint16_t mask = layout == EDGE_LAYOUT_F16 ? 0x7c00 : 0x7f80;
    for (int64_t j = 0; j < k; j++) {
        bad |= (uint32_t)((read_u16(src + 2 * j) & mask) == mask);
    }
    return bad == 0;
}

static void decode_floats(decoding *d, int64_t row) {
    const int32_t bytes = d->format->block_bytes, layout = d->format->layout;
    const uint8_t *src = d->src + row * d->row_bytes;
    widen(layout, src, d->k, d->dst + row * d->k);
    if (all_finite(layout, src, d->k)) {
        return;
    }
    for (int64_t j = 0; j < d->k; j++) {
        if (!element_is_finite(bytes, layout, src + j * bytes)) {
            report_element(&d->bad, row * d->k + j);
            return;
        }
    }
}

static uint32_t decode_chunks(void *context, uint32_t stage) {
    (void)stage;
    const decoding *d = context;
    return (uint32_t)panel_count(d->n);
}

static void decode_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    decoding *d = context;
    const int64_t first = (int64_t)chunk * PANEL_ROWS, left = d->n - first;
    const int rows = left < PANEL_ROWS ? (int)left : PANEL_ROWS;
    if (takes_q8(d->format->layout)) {
        for (int64_t j = 0; j < d->k / d->format->block; j++) {
            decode_blocks(d, first, rows, j);
        }
    } else {
        for (int r = 0; r < rows; r++) {
            decode_floats(d, first + r);
        }
    }
}

int32_t edge_decode(edge_threads *threads, int32_t type, const void *src, int64_t src_bytes,
                    int64_t n, int64_t k, float *dst, edge_error *error) {
    edge_weight weight;
    const int32_t status = edge_weight_describe(type, EDGE_FORM_FAST, n, k, &weight, error);
    if (status != EDGE_OK) {
        return status;
    }
    const format_info *format = format_find(type);
    const int64_t row_bytes = k / format->block * format->block_bytes;
    if (threads == NULL || src == NULL || dst == NULL || src_bytes != n * row_bytes) {
        return fail(error, EDGE_BAD_ARGUMENT, "%lld bytes of blocks, the matrix needs %lld",
                    (long long)src_bytes, (long long)(n * row_bytes));
    }
    decoding d = {format, src, n, k, row_bytes, dst, -1};
    const threads_job job = {1, decode_chunks, decode_chunk, &d};
    threads_run(threads, &job);
    const int64_t bad = atomic_load(&d.bad);
    return bad < 0 ? EDGE_OK : fail_element(error, bad / k, bad % k, NOT_FINITE);
}
