/* A checksum at the speed of memory, for files of packed weights. */
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "threads.h"

/* Threads take chunks. In a chunk 8 lanes add their 32-bit words to a, and a to b after each word
 * (Fletcher's checksum): a changes when a word does, b when words change places. A lane has 2^15
 * words of a chunk, so a < 2^47 and b < 2^62: nothing wraps. So every change of one word, and every
 * exchange of two words that differ, changes a sum. */
#define CHUNK_BYTES (1 << 20)
#define N_LANES 8
#define BLOCK_BYTES (8 * N_LANES)

typedef struct {
    const uint8_t *data;
    int64_t n_bytes;
    uint64_t (*sums)[2]; /* per chunk */
} summing;

/* A bijection for each h: of two values, two results (the finaliser of MurmurHash3). */
static uint64_t mix(uint64_t h, uint64_t value) {
    h = (h ^ value) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdu;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53u;
    return h ^ h >> 33;
}

static void add_blocks(uint64_t a[N_LANES], uint64_t b[N_LANES], const uint8_t *p, int64_t n) {
    for (int64_t i = 0; i < n; i++, p += BLOCK_BYTES) {
        uint64_t x[N_LANES];
        memcpy(x, p, sizeof x);
        for (int j = 0; j < N_LANES; j++) {
            a[j] += x[j] & 0xffffffffu;
            b[j] += a[j];
            a[j] += x[j] >> 32;
            b[j] += a[j];
        }
    }
}

static uint32_t sum_chunks(void *context, uint32_t stage) {
    (void)stage;
    const summing *s = context;
    return (uint32_t)((s->n_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES);
}

static void sum_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    const summing *s = context;
    const int64_t start = (int64_t)chunk * CHUNK_BYTES, left = s->n_bytes - start;
    const int64_t n_bytes = left < CHUNK_BYTES ? left : CHUNK_BYTES;
    const int64_t n_blocks = n_bytes / BLOCK_BYTES, n_tail = n_bytes % BLOCK_BYTES;
    uint64_t a[N_LANES] = {0}, b[N_LANES] = {0};
    add_blocks(a, b, s->data + start, n_blocks);
    if (n_tail != 0) { /* padded with zeros; the length of the data is in the sum, too */
        uint8_t tail[BLOCK_BYTES] = {0};
        memcpy(tail, s->data + start + n_blocks * BLOCK_BYTES, (size_t)n_tail);
        add_blocks(a, b, tail, 1);
    }
    uint64_t *sum = s->sums[chunk];
    sum[0] = 1;
    sum[1] = 2;
    for (int j = 0; j < N_LANES; j++) {
        sum[0] = mix(mix(sum[0], a[j]), b[j]);
        sum[1] = mix(mix(sum[1], b[j]), a[j]);
    }
}

int32_t edge_checksum(edge_threads *threads, const void *data, int64_t n_bytes, uint64_t *sum) {
    if (threads == NULL || (data == NULL && n_bytes != 0) || sum == NULL || n_bytes < 0 ||
        n_bytes > (int64_t)INT32_MAX * CHUNK_BYTES) {
        return EDGE_BAD_ARGUMENT;
    }
    summing s = {data, n_bytes, NULL};
    const uint32_t n_chunks = sum_chunks(&s, 0);
    s.sums = malloc((n_chunks + 1) * sizeof *s.sums);
    if (s.sums == NULL) {
        return EDGE_NO_MEMORY;
    }
    if (n_chunks != 0) {
        const threads_job job = {1, sum_chunks, sum_chunk, &s};
        threads_run(threads, &job);
    }
    sum[0] = mix(3, (uint64_t)n_bytes);
    sum[1] = mix(4, (uint64_t)n_bytes);
    for (uint32_t i = 0; i < n_chunks; i++) {
        sum[0] = mix(sum[0], s.sums[i][0]);
        sum[1] = mix(sum[1], s.sums[i][1]);
    }
    free(s.sums);
    return EDGE_OK;
}
