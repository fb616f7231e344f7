/* Encoding: float32 weights to the blocks of a format. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "error.h"
#include "formats/formats.h"
#include "threads.h"

struct edge_encoder {
    const format_info *format;
    void *tables;
};

int32_t edge_encoder_new(int32_t type, edge_encoder **encoder, edge_error *error) {
    const format_info *format = format_find(type);
    if (encoder == NULL || format == NULL ||
        (format->store == NULL && format->store_grid == NULL)) {
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

int32_t edge_encoder_needs_importance(const edge_encoder *encoder) {
    return encoder != NULL && encoder->format->needs_importance;
}

void edge_encoder_free(edge_encoder *encoder) {
    if (encoder != NULL) {
        free(encoder->tables);
        free(encoder);
    }
}

static void encode_block(const format_info *format, const encode_input *in, uint8_t *dst) {
    if (format->store_grid != NULL) {
        decoded_grid grid = {0};
        format->choose_grid(in, &grid);
        format->store_grid(&grid, dst);
    } else {
        decoded_block block = {0};
        format->choose(in, &block);
        format->store(&block, dst);
    }
}

typedef struct {
    const edge_encoder *encoder;
    const float *x, *importance;
    int64_t n, k, row_bytes;
    uint8_t *dst;
    _Atomic int64_t bad; /* first element that is not finite, as row * k + column; -1: none */
} encoding;

enum { ROWS_PER_CHUNK = 4 };

static uint32_t encode_chunks(void *context, uint32_t stage) {
    (void)stage;
    const encoding *e = context;
    return (uint32_t)((e->n + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}

static void report_bad(encoding *e, int64_t element) {
    int64_t seen = atomic_load(&e->bad);
    while ((seen < 0 || element < seen) && !atomic_compare_exchange_weak(&e->bad, &seen, element)) {
    }
}

static void encode_row(encoding *e, int64_t row) {
    const format_info *format = e->encoder->format;
    const float *x = e->x + row * e->k;
    uint8_t *dst = e->dst + row * e->row_bytes;
    float sum = 0;
    for (int64_t j = 0; j < e->k; j++) {
        if (!isfinite(x[j])) {
            report_bad(e, row * e->k + j);
            return;
        }
        sum += x[j] * x[j];
    }
    encode_input in = {x, e->importance, 0, e->encoder->tables};
    in.row_square = e->importance != NULL ? sum / (float)e->k : 0;
    for (int64_t j = 0; j < e->k; j += format->block, dst += format->block_bytes) {
        in.x = x + j;
        in.importance = e->importance != NULL ? e->importance + j : NULL;
        encode_block(format, &in, dst);
    }
}

static void encode_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    encoding *e = context;
    const int64_t first = (int64_t)chunk * ROWS_PER_CHUNK;
    for (int64_t row = first; row < first + ROWS_PER_CHUNK && row < e->n; row++) {
        encode_row(e, row);
    }
}

static int32_t bad_data(edge_error *error, int64_t row, int64_t column) {
    fail(error, EDGE_BAD_DATA, "row %lld, column %lld cannot be encoded", (long long)row,
         (long long)column);
    if (error != NULL) {
        error->row = row;
        error->column = column;
    }
    return EDGE_BAD_DATA;
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
        if (!isfinite(importance[j]) || importance[j] < 0) {
            return bad_data(error, -1, j);
        }
    }
    encoding e = {encoder, x, importance, n, k, row_bytes, dst, -1};
    const threads_job job = {1, encode_chunks, encode_chunk, &e};
    threads_run(threads, &job);
    const int64_t bad = atomic_load(&e.bad);
    return bad < 0 ? EDGE_OK : bad_data(error, bad / k, bad % k);
}
