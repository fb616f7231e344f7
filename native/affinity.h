/* Which CPUs the calling thread may run on. Linux and Android only: elsewhere it is ENOSYS. */
#ifndef EDGE_AFFINITY_H
#define EDGE_AFFINITY_H

#include <errno.h>
#include <limits.h>
#include <stdint.h>
#if defined(__linux__)
#include <sched.h>
#endif

enum { MAX_CPUS = 1024, CPUS_PER_WORD = sizeof(unsigned long) * CHAR_BIT };

/* As the kernel has it: a bit for each CPU. */
typedef struct {
    unsigned long words[MAX_CPUS / CPUS_PER_WORD];
} cpu_mask;

static inline void mask_add(cpu_mask *mask, int32_t cpu) {
    mask->words[(uint32_t)cpu / CPUS_PER_WORD] |= 1ul << ((uint32_t)cpu % CPUS_PER_WORD);
}

/* Both return 0 or an errno. They concern the calling thread alone. */
static inline int32_t affinity_get(cpu_mask *mask) {
#if defined(__linux__)
    *mask = (cpu_mask){{0}};
    return sched_getaffinity(0, sizeof *mask, (cpu_set_t *)mask) == 0 ? 0 : errno;
#else
    (void)mask;
    return ENOSYS;
#endif
}

static inline int32_t affinity_set(const cpu_mask *mask) {
#if defined(__linux__)
    return sched_setaffinity(0, sizeof *mask, (const cpu_set_t *)mask) == 0 ? 0 : errno;
#else
    (void)mask;
    return ENOSYS;
#endif
}

#endif
