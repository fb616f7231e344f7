/* CPU probe and dispatch.
 *
 * CPUID, XGETBV and HWCAP are read here: compilers' own feature tests are missing or wrong on some
 * of the tool chains that build this library.
 */
#include <stdatomic.h>
#include <stddef.h>

#include "cpu.h"
#include "kernels/kernels.h"

/* What kernels may need of a CPU. KNOWN: it was looked for. */
enum {
    KNOWN = 1 << 0,
    HAS_AVX2 = 1 << 1, /* with FMA and F16C */
    HAS_AVXVNNI = 1 << 2,
    HAS_AVX512VNNI = 1 << 3,
    HAS_AVX512VBMI = 1 << 4,
    HAS_AVX512BF16 = 1 << 5,
    HAS_NEON = 1 << 6, /* 32-bit: with VFPv4, which has fma */
    HAS_DOTPROD = 1 << 7,
    HAS_I8MM = 1 << 8
};

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>

static uint32_t read_features(void) {
    uint32_t a, b, c, d, has = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return has;
    }
    const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !avx) {
        return has;
    }
    uint32_t low, high;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return has;
    }
    const bool avx2 = b >> 5 & 1, avx512f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1,
               vl = b >> 31 & 1, vbmi = c >> 1 & 1, vnni = c >> 11 & 1;
    if (ymm && avx2 && fma && f16c) {
        has |= HAS_AVX2;
        has |= zmm && avx512f && dq && bw && vl && vnni ? HAS_AVX512VNNI : 0;
        has |= (has & HAS_AVX512VNNI) != 0 && vbmi ? HAS_AVX512VBMI : 0;
    }
    if (has != 0 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        has |= a >> 4 & 1 ? HAS_AVXVNNI : 0;
        has |= a >> 5 & 1 && (has & HAS_AVX512VNNI) != 0 ? HAS_AVX512BF16 : 0;
    }
    return has;
}

uint32_t cpu_float_mode(void) {
    const uint32_t was = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return was;
}

void cpu_float_restore(uint32_t mode) { _mm_setcsr(mode); }

#elif defined(__aarch64__)
#if defined(__APPLE__)
#include <sys/sysctl.h>

static bool has_feature(const char *name) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}

static uint32_t read_features(void) {
    return HAS_NEON | (has_feature("hw.optional.arm.FEAT_DotProd") ? HAS_DOTPROD : 0) |
           (has_feature("hw.optional.arm.FEAT_I8MM") ? HAS_I8MM : 0);
}
#else
#include <sys/auxv.h>

/* Bits of the kernel's own: headers of older C libraries lack the later ones. */
enum { ASIMD = 1 << 1, ASIMDDP = 1 << 20, I8MM_2 = 1 << 13 };

static uint32_t read_features(void) {
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    return ((first & ASIMD) != 0 ? HAS_NEON : 0) | ((first & ASIMDDP) != 0 ? HAS_DOTPROD : 0) |
           ((second & I8MM_2) != 0 ? HAS_I8MM : 0);
}
#endif

uint32_t cpu_float_mode(void) {
    uint64_t was;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(was));
    __asm__ __volatile__("msr fpcr, %0" : : "r"((uint64_t)0));
    return (uint32_t)was;
}

void cpu_float_restore(uint32_t mode) {
    __asm__ __volatile__("msr fpcr, %0" : : "r"((uint64_t)mode));
}

#elif defined(__arm__)
#include <sys/auxv.h>

enum { NEON_32 = 1 << 12, VFPV4 = 1 << 16 };

static uint32_t read_features(void) {
    const unsigned long first = getauxval(AT_HWCAP);
    return (first & NEON_32) != 0 && (first & VFPV4) != 0 ? HAS_NEON : 0;
}

uint32_t cpu_float_mode(void) {
    uint32_t was;
    __asm__ __volatile__("vmrs %0, fpscr" : "=r"(was));
    __asm__ __volatile__("vmsr fpscr, %0" : : "r"(0));
    return was;
}

void cpu_float_restore(uint32_t mode) { __asm__ __volatile__("vmsr fpscr, %0" : : "r"(mode)); }

#else
static uint32_t read_features(void) { return 0; }
uint32_t cpu_float_mode(void) { return 0; }
void cpu_float_restore(uint32_t mode) { (void)mode; }
#endif

/* CPUID is slow in a virtual machine. Racing first calls find the same. */
static bool has(uint32_t needed) {
    static _Atomic uint32_t known;
    uint32_t features = atomic_load(&known);
    if (features == 0) {
        features = KNOWN | read_features();
        atomic_store(&known, features);
    }
    return (features & needed) == needed;
}

/* From the plainest up. */
static const struct {
    const edge_kernels *kernels;
    uint32_t needs;
} levels[] = {
    {&kernels_scalar, 0},
#ifdef EDGE_HAVE_AVX2
    {&kernels_avx2, HAS_AVX2},
#endif
#ifdef EDGE_HAVE_AVXVNNI
    {&kernels_avxvnni, HAS_AVXVNNI},
#endif
#ifdef EDGE_HAVE_AVX512VNNI
    {&kernels_avx512vnni, HAS_AVX512VNNI},
#endif
#ifdef EDGE_HAVE_AVX512VBMI
    {&kernels_avx512vbmi, HAS_AVX512VNNI | HAS_AVX512VBMI},
#endif
#ifdef EDGE_HAVE_NEON32
    {&kernels_neon32, HAS_NEON},
#endif
#ifdef EDGE_HAVE_NEON
    {&kernels_neon, HAS_NEON},
#endif
#ifdef EDGE_HAVE_DOTPROD
    {&kernels_dotprod, HAS_NEON | HAS_DOTPROD},
#endif
#ifdef EDGE_HAVE_I8MM
    {&kernels_i8mm, HAS_NEON | HAS_DOTPROD | HAS_I8MM},
#endif
};

const edge_kernels *cpu_kernels(int32_t i) {
    return i >= 0 && (size_t)i < sizeof levels / sizeof *levels ? levels[i].kernels : NULL;
}

bool cpu_usable(int32_t i) { return cpu_kernels(i) != NULL && has(levels[i].needs); }

bool cpu_has_bf16(int32_t i) {
    return cpu_usable(i) && cpu_kernels(i)->native_bf16 != NULL && has(HAS_AVX512BF16);
}
