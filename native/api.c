/* The parts of the API that belong to no other file. */
#include <stddef.h>

#include "cpu.h"
#include "kernels/kernels.h"

const char *edge_version(void) { return EDGE_VERSION; }

const char *edge_isa_name(int32_t i) {
    const edge_kernels *k = cpu_kernels(i);
    return k != NULL ? k->name : NULL;
}

int32_t edge_isa_usable(int32_t i) { return cpu_usable(i); }

/* The best table that this CPU can run; all give the same bits. */
static const edge_kernels *best(void) {
    const edge_kernels *found = cpu_kernels(0);
    for (int32_t i = 1; cpu_kernels(i) != NULL; i++) {
        found = cpu_usable(i) ? cpu_kernels(i) : found;
    }
    return found;
}

void edge_softmax(const float *x, int64_t n, float *out) { best()->softmax(x, n, out); }

void edge_log_softmax(const float *x, int64_t n, float *out) { best()->log_softmax(x, n, out); }
