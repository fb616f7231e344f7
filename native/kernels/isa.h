/* What every kernel file starts with. It is compiled once per instruction set, with
 * EDGE_ISA=<name> and EDGE_ISA_HEADER="isa/<name>.h". */
#ifndef EDGE_KERNELS_ISA_H
#define EDGE_KERNELS_ISA_H

/* UNROLL: loops over columns, whose bounds the compiler knows; their arrays must end up in
 * registers. INLINE: what must be inlined for that. Not under the sanitizers, where each access
 * brings its check and compiling would take minutes. */
#ifdef __SANITIZE_ADDRESS__
#define UNROLL
#define INLINE static inline
#else
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))
#endif

#include <float.h>

#include "layouts.h"
#include EDGE_ISA_HEADER
#ifndef SPECIALIZED /* a function that is inlined into one for each number of columns */
#define SPECIALIZED INLINE
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
void FN(norm)(const float *, const float *, float, int64_t, float *);
void FN(quantize)(const float *, int64_t, q8_place);
void FN(norm_quantize)(const float *, const float *, float, int64_t, q8_place);
void FN(gated)(const float *, const float *, int32_t, int64_t, float *);
void FN(add)(const float *, const float *, int64_t, float *);
void FN(rotate)(const rotate_args *, int64_t);
void FN(store)(const store_args *);
void FN(turn)(float *, int32_t);
void FN(get_base)(kv_base, int, int32_t, float *);
void FN(attention)(const attention_args *, int64_t, int64_t);
void FN(softmax)(const float *, int64_t, float *);
void FN(log_softmax)(const float *, int64_t, float *);
int32_t FN(all_finite)(const float *, int64_t);
int64_t FN(dots)(int64_t, int32_t *);

/* c columns of 16 rows to where they belong, beside the residual. */
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
