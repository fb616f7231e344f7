/* Prints the instruction sets that this CPU has, by the library's own probe: for the build, which
 * need not compile the kernels of others. */
#include <stdio.h>

#if defined(__x86_64__)
#define EDGE_HAVE_AVX2 1
#define EDGE_HAVE_AVXVNNI 1
#define EDGE_HAVE_AVX512VNNI 1
#define EDGE_HAVE_AVX512VBMI 1
#elif defined(__aarch64__)
#define EDGE_HAVE_NEON 1
#define EDGE_HAVE_DOTPROD 1
#define EDGE_HAVE_I8MM 1
#elif defined(__arm__)
#define EDGE_HAVE_NEON32 1
#endif
#include "cpu.c"

const edge_kernels kernels_scalar = {.name = "scalar"}, kernels_avx2 = {.name = "avx2"},
                   kernels_avxvnni = {.name = "avxvnni"},
                   kernels_avx512vnni = {.name = "avx512vnni"},
                   kernels_avx512vbmi = {.name = "avx512vbmi"}, kernels_neon = {.name = "neon"},
                   kernels_dotprod = {.name = "dotprod"}, kernels_i8mm = {.name = "i8mm"},
                   kernels_neon32 = {.name = "neon32"};

int main(void) {
    for (int32_t i = 0; cpu_kernels(i) != NULL; i++) {
        if (cpu_usable(i)) {
            puts(cpu_kernels(i)->name);
        }
    }
    return 0;
}
