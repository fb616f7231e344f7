/* What this machine can do: how fast its threads read memory, and how fast they multiply int8. */
#include <stdatomic.h>
#include <stddef.h>

#include "clock.h"
#include "cpu.h"
#include "kernels/kernels.h"
#include "layouts.h"
#include "threads.h"

static int64_t timed(edge_threads *threads, const threads_job *job) {
    const int64_t start = now_ns();
    threads_run(threads, job);
    return now_ns() - start;
}

/* ---- memory ------------------------------------------------------------------------------ */

/* Memory is read as matmuls read their panels: a few cache lines a step, and a prefetch AHEAD bytes
 * later, because hardware prefetchers stop at the page. */
enum { READ_CHUNK = 1 << 18, STEP = 256, AHEAD = 4096 };

typedef uint64_t words __attribute__((vector_size(16), aligned(8)));

typedef struct {
    const uint8_t *data;
    int64_t n_bytes;
    _Atomic uint64_t sum; /* used, so that the compiler leaves no load out */
} reading;

static uint32_t read_chunks(void *context, uint32_t stage) {
    (void)stage;
    const reading *r = context;
    return (uint32_t)((r->n_bytes + READ_CHUNK - 1) / READ_CHUNK);
}

static void read_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    reading *r = context;
    const uint8_t *p = r->data + (int64_t)chunk * READ_CHUNK;
    const int64_t left = r->n_bytes - (int64_t)chunk * READ_CHUNK;
    const int64_t n = left < READ_CHUNK ? left : READ_CHUNK;
    words a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        for (int j = 0; j < STEP; j += 64) {
            __builtin_prefetch(p + i + AHEAD + j);
        }
        const words *w = (const words *)(p + i);
        for (size_t j = 0; j < STEP / sizeof *w; j += 4) {
            a ^= w[j];
            b ^= w[j + 1];
            c ^= w[j + 2];
            d ^= w[j + 3];
        }
    }
    for (; i < n; i++) {
        a[0] ^= p[i];
    }
    a ^= b ^ c ^ d;
    atomic_fetch_xor_explicit(&r->sum, a[0] ^ a[1], memory_order_relaxed);
}

int32_t edge_measure_read(edge_threads *threads, const void *data, int64_t n_bytes, int64_t *ns) {
    if (threads == NULL || data == NULL || ns == NULL || n_bytes < 1 ||
        n_bytes / READ_CHUNK >= UINT32_MAX) {
        return EDGE_BAD_ARGUMENT;
    }
    reading r = {data, n_bytes, 0};
    const threads_job job = {1, read_chunks, read_chunk, &r};
    *ns = timed(threads, &job);
    return EDGE_OK;
}

/* ---- int8 dot products ------------------------------------------------------------------- */

/* DOT_CHUNKS chunks per thread: a thread that wakes late costs little. n_rounds grows until a run
 * takes DOT_NS. */
enum { DOT_CHUNKS = 16, DOT_NS = 20000000, DOT_START = 64, DOT_GROWTH = 4 };

typedef struct {
    const edge_kernels *kernels;
    uint32_t n_chunks;
    int64_t n_rounds;     /* in each chunk */
    _Atomic int64_t macs; /* done */
} dotting;

static uint32_t dot_chunks(void *context, uint32_t stage) {
    (void)stage;
    return ((const dotting *)context)->n_chunks;
}

static void dot_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    (void)chunk;
    dotting *d = context;
    int32_t out[PANEL_ROWS];
    atomic_fetch_add_explicit(&d->macs, d->kernels->dots(d->n_rounds, out), memory_order_relaxed);
}

int32_t edge_measure_dot(edge_threads *threads, int32_t isa, int64_t *macs, int64_t *ns) {
    const edge_kernels *kernels = cpu_kernels(isa);
    if (threads == NULL || macs == NULL || ns == NULL || kernels == NULL || !cpu_usable(isa)) {
        return EDGE_BAD_ARGUMENT;
    }
    dotting d = {kernels, (uint32_t)threads_count(threads) * DOT_CHUNKS, DOT_START, 0};
    const threads_job job = {1, dot_chunks, dot_chunk, &d};
    for (;;) {
        atomic_store(&d.macs, 0);
        *ns = timed(threads, &job);
        if (*ns >= DOT_NS) {
            break;
        }
        d.n_rounds *= DOT_GROWTH;
    }
    *macs = atomic_load(&d.macs);
    return EDGE_OK;
}
