/* Encoding: float32 weights to the blocks of a format. */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "encode.h"
#include "error.h"
#include "formats/search.h"
#include "threads.h"

static bool holds_floats(const format_info *format) {
    return layout_table[format->layout].kind == SCALE_NONE;
}

static bool can_encode(const format_info *format) {
    return format != NULL &&
           (format->store != NULL || format->store_grid != NULL || holds_floats(format));
}

int32_t edge_can_encode(int32_t type) { return can_encode(format_find(type)); }

int32_t edge_needs_importance(int32_t type) {
    const format_info *format = format_find(type);
    return format != NULL && format->needs_importance;
}

int32_t edge_encoder_new(int32_t type, edge_encoder **encoder, edge_error *error) {
    const format_info *format = format_find(type);
    if (encoder == NULL || !can_encode(format)) {
        return fail(error, EDGE_BAD_ARGUMENT, "no encoder for tensor type %d", type);
    }
    edge_encoder *made = malloc(sizeof *made);
    if (made == NULL) {
        return fail(error, EDGE_NO_MEMORY, "no memory for an encoder");
    }
    *made = (edge_encoder){format, NULL};
    if (format->tables_new != NULL && (made->tables = format->tables_new()) == NULL) {
        free(made);
        return fail(error, EDGE_NO_MEMORY, "no memory for the tables of an encoder");
    }
    *encoder = made;
    return EDGE_OK;
}

void edge_encoder_free(edge_encoder *encoder) {
    if (encoder != NULL) {
        free(encoder->tables);
        free(encoder);
    }
}

/* False: the weights are beyond the range of the scales. */
static bool encode_block(const format_info *format, const encode_input *in, uint8_t *dst) {
    if (format->store_grid != NULL) {
        decoded_grid grid = {0};
        format->choose_grid(in, &grid);
        format->store_grid(&grid, dst);
        return half_is_finite(grid.scale);
    }
    decoded_block block = {0};
    format->choose(in, &block);
    format->store(&block, dst);
    return scales_are_finite(format->layout, &block);
}

/* The first of k floats that the format's floats cannot hold; -1: none. */
static int64_t store_floats(const format_info *format, const float *x, int64_t k, uint8_t *dst) {
    if (format->layout == EDGE_LAYOUT_F32) {
        memcpy(dst, x, (size_t)k * sizeof *x);
        return -1;
    }
    const bool half = format->layout == EDGE_LAYOUT_F16;
    for (int64_t j = 0; j < k; j++) {
        write_u16(dst + 2 * j, half ? float_to_half(x[j]) : float_to_bfloat(x[j]));
    }
    for (int64_t j = 0; j < k; j++) {
        const uint16_t h = read_u16(dst + 2 * j);
        if (half ? !half_is_finite(h) : !isfinite(bfloat_to_float(h))) {
            return j;
        }
    }
    return -1;
}

typedef struct {
    const edge_encoder *encoder;
    const float *x, *importance;
    int64_t n, k, row_bytes;
    uint8_t *dst;
    _Atomic int64_t bad; /* first element that cannot be encoded, as row * k + column; -1: none */
} encoding;

enum { ROWS_PER_CHUNK = 4 };

static uint32_t encode_chunks(void *context, uint32_t stage) {
    (void)stage;
    const encoding *e = context;
    return (uint32_t)((e->n + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}

/* The first of k whose magnitude is not below the limit, or that is NaN; -1: none. */
static int64_t beyond(const float *x, int64_t k, float limit) {
    if (search_magnitude(x, (int)k) < limit) {
        return -1;
    }
    int64_t j = 0;
    while (fabsf(x[j]) < limit) {
        j++;
    }
    return j;
}

/* Weights that a format with float16 scales may hold are below this, and a search with them and an
 * importance below its limit sums no infinities. Larger ones could come out as zeros. */
#define WEIGHT_LIMIT 0x1p29f
#define IMPORTANCE_LIMIT 0x1p48f

/* The mean of the squares, added up one after the other. */
static float mean_square(const float *x, int64_t k) {
    float sum = 0;
    for (int64_t j = 0; j < k; j++) {
        sum += x[j] * x[j];
    }
    return sum / (float)k;
}

/* The first column, or first of a block, that cannot be encoded; -1: none. */
static int64_t encode_row(const encoding *e, int64_t row) {
    const format_info *format = e->encoder->format;
    const float *x = e->x + row * e->k;
    uint8_t *dst = e->dst + row * e->row_bytes;
    const bool half_scales = layout_table[format->layout].kind != SCALE_E && !holds_floats(format);
    const int64_t bad = beyond(x, e->k, half_scales ? WEIGHT_LIMIT : INFINITY);
    if (bad >= 0) {
        return bad;
    }
    if (holds_floats(format)) {
        return store_floats(format, x, e->k, dst);
    }
    encode_input in = {x, NULL, 0, e->encoder->tables};
    in.row_square = e->importance != NULL ? mean_square(x, e->k) : 0;
    for (int64_t j = 0; j < e->k; j += format->block, dst += format->block_bytes) {
        in.x = x + j;
        in.importance = e->importance != NULL ? e->importance + j : NULL;
        if (!encode_block(format, &in, dst)) {
            return j;
        }
    }
    return -1;
}

static void encode_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    encoding *e = context;
    const int64_t first = (int64_t)chunk * ROWS_PER_CHUNK;
    for (int64_t row = first; row < first + ROWS_PER_CHUNK && row < e->n; row++) {
        const int64_t column = encode_row(e, row);
        if (column >= 0) {
            report_element(&e->bad, row * e->k + column);
        }
    }
}

int32_t edge_encode(edge_threads *threads, const edge_encoder *encoder, const float *x, int64_t n,
                    int64_t k, const float *importance, void *dst, int64_t dst_bytes,
                    edge_error *error) {
    if (threads == NULL || encoder == NULL || x == NULL || dst == NULL || n < 1 || n > INT32_MAX ||
        k < 1 || k > MAX_DIM || k % encoder->format->block != 0) {
        return fail(error, EDGE_BAD_ARGUMENT, "no (%lld, %lld) matrix of this type", (long long)n,
                    (long long)k);
    }
    const int64_t row_bytes = k / encoder->format->block * encoder->format->block_bytes;
    if (dst_bytes != n * row_bytes || (importance == NULL && encoder->format->needs_importance)) {
        return fail(error, EDGE_BAD_ARGUMENT, "%lld bytes of blocks, the matrix needs %lld%s",
                    (long long)dst_bytes, (long long)(n * row_bytes),
                    importance == NULL ? ", and maybe an importance" : "");
    }
    for (int64_t j = 0; importance != NULL && j < k; j++) {
        if (!(importance[j] >= 0 && importance[j] < IMPORTANCE_LIMIT)) {
            return fail_element(error, -1, j, "of the importance is no weight");
        }
    }
    encoding e = {encoder, x, importance, n, k, row_bytes, dst, -1};
    const threads_job job = {1, encode_chunks, encode_chunk, &e};
    threads_run(threads, &job);
    const int64_t bad = atomic_load(&e.bad);
    return bad < 0 ? EDGE_OK : fail_element(error, bad / k, bad % k, "cannot be encoded");
}
