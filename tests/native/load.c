/* Loads a libedge by its path, as an app does, and runs a small plan with four threads on every
 * instruction set that is usable: `load LIBRARY` prints a name and a checksum of the logits each.
 * The same checksum everywhere, whatever the library was built for. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edge.h"

enum { N = 288, K = 96, TOKENS = 40, RUNS = 50, THREADS = 4, F32 = 0, Q4_0 = 2 };

static void *library;

static void *function(const char *name) {
    void *found = dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "load: %s\n", dlerror());
        exit(1);
    }
    return found;
}
#define CALL(name, ...) ((__typeof__(&name))function(#name))(__VA_ARGS__)

static edge_error error;

static void check(int32_t status) {
    if (status != EDGE_OK) {
        fprintf(stderr, "load: status %d, %s\n", (int)status, error.text);
        exit(1);
    }
}

static void *memory(int64_t n_bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (size_t)n_bytes) != 0) {
        fprintf(stderr, "load: no memory\n");
        exit(1);
    }
    memset(p, 0, (size_t)n_bytes);
    return p;
}

static uint32_t random_bits(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

/* A random (N, K) matrix of a type, packed. */
static edge_weight packed(edge_threads *threads, int32_t type) {
    const int64_t n_blocks = N * K / (type == F32 ? 1 : 32), block = type == F32 ? 4 : 18;
    uint8_t *blocks = memory(n_blocks * block);
    for (int64_t i = 0; i < n_blocks; i++) {
        uint8_t *p = blocks + i * block;
        for (int64_t j = 0; j < block; j++) {
            p[j] = (uint8_t)random_bits();
        }
        p[type == F32 ? 3 : 1] = type == F32 ? 0x3f : 0x2c; /* exponents of usual size */
    }
    edge_weight weight;
    check(CALL(edge_weight_describe, type, EDGE_FORM_FAST, N, K, &weight, &error));
    weight.data = memory(weight.n_bytes);
    check(CALL(edge_weight_pack, threads, type, &weight, blocks, n_blocks * block, &error));
    free(blocks);
    return weight;
}

/* embed, gather, quantize, matmul. */
static edge_plan *plan_of(int32_t isa, const edge_weight *weights, const edge_kv_shape *kv) {
    static const edge_op ops[] = {
        {.kind = EDGE_OP_EMBED, .in = -1, .in2 = -1, .out = 0, .w = {0, -1, -1}},
        {.kind = EDGE_OP_GATHER, .in = 0, .in2 = -1, .out = 1, .w = {-1, -1, -1}},
        {.kind = EDGE_OP_QUANTIZE, .in = 1, .in2 = -1, .out = 2, .w = {-1, -1, -1}},
        {.kind = EDGE_OP_MATMUL, .in = 2, .in2 = -1, .out = 3, .w = {1, -1, -1}},
    };
    const int64_t floats = CALL(edge_buffer_bytes, EDGE_BUFFER_F32, K, TOKENS);
    const int64_t codes = CALL(edge_buffer_bytes, EDGE_BUFFER_Q8, K, TOKENS);
    const int64_t step = (floats + 63) / 64 * 64, bytes = 2 * step + codes;
    const edge_buffer buffers[] = {{EDGE_BUFFER_F32, K, 0, 0},
                                   {EDGE_BUFFER_F32, K, 1, step},
                                   {EDGE_BUFFER_Q8, K, 1, 2 * step},
                                   {EDGE_BUFFER_LOGITS, N, 1, 0}};
    const edge_plan_spec spec = {.isa = isa,
                                 .max_tokens = TOKENS,
                                 .n_kv_groups = 1,
                                 .kv = kv,
                                 .n_ops = 4,
                                 .n_buffers = 4,
                                 .n_weights = 2,
                                 .ops = ops,
                                 .buffers = buffers,
                                 .weights = weights,
                                 .arena = memory(bytes),
                                 .arena_bytes = bytes};
    edge_plan *plan;
    check(CALL(edge_plan_new, &spec, &plan, &error));
    return plan;
}

int main(int n_args, char **args) {
    library = n_args == 2 ? dlopen(args[1], RTLD_NOW) : NULL;
    if (library == NULL) {
        fprintf(stderr, "load: %s\n", n_args == 2 ? dlerror() : "which library?");
        return 1;
    }
    edge_threads *threads;
    check(CALL(edge_threads_new, THREADS, NULL, 0, &threads, &error));
    const edge_weight weights[] = {packed(threads, F32), packed(threads, Q4_0)};
    const edge_kv_shape shape = {EDGE_KV_F16, 1, 1, 16};
    void *pages[] = {memory(CALL(edge_page_bytes, &shape))};
    const edge_kv_group group = {shape, 1, 0, 0, pages};
    const edge_kv kv = {1, &group};
    int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        tokens[i] = (int32_t)(random_bits() % N);
    }
    float *logits = memory(TOKENS * N * 4);
    const edge_step step = {
        .tokens = tokens, .n_tokens = TOKENS, .n_logits = TOKENS, .n_ops = -1, .logits = logits};
    const char *name;
    for (int32_t isa = 0; (name = CALL(edge_isa_name, isa)) != NULL; isa++) {
        if (!CALL(edge_isa_usable, isa)) {
            continue;
        }
        edge_plan *plan = plan_of(isa, weights, &shape);
        uint64_t sum[2];
        for (int i = 0; i < RUNS; i++) {
            check(CALL(edge_run, plan, threads, &kv, &step, &error));
        }
        check(CALL(edge_checksum, threads, logits, TOKENS * N * 4, sum));
        printf("%s %016llx%016llx\n", name, (unsigned long long)sum[0], (unsigned long long)sum[1]);
        CALL(edge_plan_free, plan);
    }
    CALL(edge_threads_free, threads);
    return 0;
}
