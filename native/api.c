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

int32_t edge_isa_has_bf16(int32_t i) { return cpu_has_bf16(i); }

void edge_softmax(int32_t isa, const float *x, int64_t n, float *out) {
    const uint32_t mode = cpu_float_mode();
    cpu_kernels(isa)->softmax(x, n, out);
    cpu_float_restore(mode);
}

void edge_log_softmax(int32_t isa, const float *x, int64_t n, float *out) {
    const uint32_t mode = cpu_float_mode();
    cpu_kernels(isa)->log_softmax(x, n, out);
    cpu_float_restore(mode);
}
