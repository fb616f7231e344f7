/* What this CPU can run, and its floating-point mode. */
#ifndef EDGE_CPU_H
#define EDGE_CPU_H

#include <stdbool.h>
#include <stdint.h>

typedef struct edge_kernels edge_kernels;

/* The kernel tables compiled in, from the plainest up; NULL past the end. */
const edge_kernels *cpu_kernels(int32_t i);
bool cpu_usable(int32_t i);
/* Whether table i is usable and native_bf16 in it. */
bool cpu_has_bf16(int32_t i);

/* Sets round-to-nearest with denormals kept, which the numerics contract relies on (a library
 * built with -ffast-math may have changed it); returns the mode that was. */
uint32_t cpu_float_mode(void);
void cpu_float_restore(uint32_t mode);

/* Waits some tens of cycles. On 64-bit ARM isb does, yield does nothing on most cores. */
static inline void cpu_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb");
#elif defined(__arm__)
    __asm__ __volatile__("yield");
#endif
}

#endif
