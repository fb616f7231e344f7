/* What every kernel file starts with. It is compiled once per instruction set, with
 * EDGE_ISA=<name> and EDGE_ISA_HEADER="isa/<name>.h". */
#ifndef EDGE_KERNELS_ISA_H
#define EDGE_KERNELS_ISA_H

/* UNROLL: before loops over columns. The compiler knows their bounds, and their arrays must end up
 * in registers. INLINE: functions that must be inlined for that. Not under the sanitizers: each
 * access brings a check of its own, and compiling would take minutes. */
#ifdef __SANITIZE_ADDRESS__
#define UNROLL
#define INLINE static inline
#else
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))
#endif
/* ONCE: functions that are not inlined, because a call costs little beside what they do. */
#define ONCE static __attribute__((noinline))

#include <float.h>

#include "layouts.h"
#include EDGE_ISA_HEADER
#ifndef SPECIALIZED /* a function that is inlined into one for each number of columns */
#define SPECIALIZED INLINE
#endif
#ifndef CODE_ROWS /* rows of a vc: fewer where a panel of them does not fit the registers */
#define CODE_ROWS PANEL_ROWS
#endif
#include "kernels/kernels.h"
#include "kv.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define FN(name) PASTE(name, EDGE_ISA) /* one symbol per instruction set */

/* What the kernel files give to the table. */
extern const tile_function FN(tiles)[EDGE_N_LAYOUTS][MAX_TILE];
extern const tile_function FN(pairs)[EDGE_N_LAYOUTS];
extern const tile_function FN(native_bf16)[MAX_TILE]; /* with HAS_BF16_DOT */
void FN(norm)(const float *, const norm_args *, int64_t, float *);
void FN(quantize)(const float *, int64_t, q8_place);
void FN(norm_quantize)(const float *, const norm_args *, int64_t, q8_place);
void FN(gated)(const float *, const float *, edge_activation, int64_t, float *);
void FN(softcap)(const float *, float, int64_t, float *);
void FN(xielu)(const float *, const xielu_args *, int64_t, float *);
void FN(sparsify)(const float *, float, int64_t, float *);
void FN(rescale)(const float *, const float *, float, int64_t, float *);
void FN(add)(const float *, const float *, int64_t, float *);
void FN(multiply)(const float *, const float *, int64_t, float *);
void FN(scale)(const float *, float, int64_t, float *);
void FN(mix)(const mix_args *, int64_t, float *);
void FN(rotate)(const rotate_args *, int64_t);
void FN(store)(const store_args *);
void FN(turn)(float *, int32_t);
void FN(get_base)(kv_base, int, int32_t, float *);
void FN(attention)(const attention_args *, int64_t, int64_t);
void FN(softmax)(const float *, int64_t, float *);
void FN(log_softmax)(const float *, int64_t, float *);
int32_t FN(all_finite)(const float *, int64_t);
int64_t FN(dots)(int64_t, int32_t *);

/* Vector instructions that flush denormals to zero set two flags, which stay set until they are
 * cleared. EXACT(call, again): runs call. If that flushed anything it runs `again`, the same by the
 * scalar kernels, which keep denormals. So `call` must leave its inputs as they are. Calls may
 * nest: flags that were set before are set again. */
#ifdef FLUSHES_DENORMALS
enum { FLUSHED = 1 << 7 | 1 << 3 }; /* of FPSCR: an operand (IDC), a result (UFC) */

INLINE uint32_t float_flags(void) {
    uint32_t flags;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(flags) : : "memory");
    return flags;
}

INLINE void set_float_flags(uint32_t flags) {
    __asm__ volatile("vmsr fpscr, %0" : : "r"(flags) : "memory");
}

#define EXACT(call, again)                                                                         \
    do {                                                                                           \
        const uint32_t before = float_flags();                                                     \
        if ((before & FLUSHED) != 0) {                                                             \
            set_float_flags(before & ~(uint32_t)FLUSHED);                                          \
        }                                                                                          \
        call;                                                                                      \
        const bool flushed = (float_flags() & FLUSHED) != 0;                                       \
        if (flushed) {                                                                             \
            again;                                                                                 \
        }                                                                                          \
        if (flushed || (before & FLUSHED) != 0) {                                                  \
            set_float_flags(before);                                                               \
        }                                                                                          \
    } while (0)
#endif

/* sum (c), 16 rows each, plus the residual if there is one, to column j of out + at. */
INLINE void store_tile(const tile_args *a, int64_t at, const vf *sum, int c) {
    UNROLL for (int j = 0; j < c; j++) {
        const int64_t i = at + j * a->stride;
        vf_store(a->out + i,
                 a->residual != NULL ? vf_add(sum[j], vf_load(a->residual + i)) : sum[j]);
    }
}

_Static_assert(TILE <= MAX_TILE && TILE % 2 == 0, "Q8X2 columns come in pairs");
#if FLT_EVAL_METHOD != 0
#error "excess precision would change the bits of results: compile for SSE2, not for x87"
#endif

#endif
