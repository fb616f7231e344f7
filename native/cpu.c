/* CPU probe and dispatch.
 *
 * CPUID and XGETBV are read here: compilers' own feature tests are missing or wrong on some of
 * the tool chains that build this library.
 */
#include <stdatomic.h>
#include <stddef.h>

#include "cpu.h"
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>

typedef struct {
    bool avx2, avxvnni, avx512vnni, bf16;
} features;

static features read_features(void) {
    features f = {false, false, false, false};
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return f;
    }
    const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx) {
        return f;
    }
    uint32_t low, high;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return f;
    }
    const bool avx2 = b >> 5 & 1, avx512f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1,
               vl = b >> 31 & 1, vbmi = c >> 1 & 1, vnni = c >> 11 & 1;
    f.avx2 = ymm && avx2 && fma && f16c;
    f.avx512vnni = f.avx2 && zmm && avx512f && dq && bw && vl && vbmi && vnni;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        f.avxvnni = f.avx2 && a >> 4 & 1;
        f.bf16 = f.avx512vnni && a >> 5 & 1;
    }
    return f;
}

/* CPUID is slow in a virtual machine. Racing first calls find the same. */
static features probe(void) {
    static _Atomic int known; /* 0: not read yet; else 1 + a bit per feature */
    int bits = atomic_load(&known);
    if (bits == 0) {
        const features f = read_features();
        bits = 1 + 2 * f.avx2 + 4 * f.avxvnni + 8 * f.avx512vnni + 16 * f.bf16;
        atomic_store(&known, bits);
    }
    return (features){(bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0};
}

uint32_t cpu_float_mode(void) {
    const uint32_t was = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return was;
}

void cpu_float_restore(uint32_t mode) { _mm_setcsr(mode); }
#else
uint32_t cpu_float_mode(void) { return 0; }
void cpu_float_restore(uint32_t mode) { (void)mode; }
#endif

const edge_kernels *cpu_kernels(int32_t i) {
    static const edge_kernels *const tables[] = {
        &kernels_scalar,
#ifdef EDGE_HAVE_AVX2
        &kernels_avx2,
#endif
#ifdef EDGE_HAVE_AVXVNNI
        &kernels_avxvnni,
#endif
#ifdef EDGE_HAVE_AVX512VNNI
        &kernels_avx512vnni,
#endif
    };
    return i >= 0 && (size_t)i < sizeof tables / sizeof *tables ? tables[i] : NULL;
}

bool cpu_usable(int32_t i) {
    const edge_kernels *k = cpu_kernels(i);
    if (k == NULL) {
        return false;
    }
#ifdef EDGE_HAVE_AVX2
    if (k == &kernels_avx2) {
        return probe().avx2;
    }
#endif
#ifdef EDGE_HAVE_AVXVNNI
    if (k == &kernels_avxvnni) {
        return probe().avxvnni;
    }
#endif
#ifdef EDGE_HAVE_AVX512VNNI
    if (k == &kernels_avx512vnni) {
        return probe().avx512vnni;
    }
#endif
    return true;
}

bool cpu_has_bf16(int32_t i) {
#if defined(__x86_64__)
    return cpu_usable(i) && cpu_kernels(i)->native_bf16 != NULL && probe().bf16;
#else
    return cpu_usable(i) && cpu_kernels(i)->native_bf16 != NULL;
#endif
}
