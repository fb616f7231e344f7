/* The table of this instruction set. */
#include "kernels/isa.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

const edge_kernels FN(kernels) = {
    .name = TEXT(EDGE_ISA),
    .tile = TILE,
    .tiles = FN(tiles),
    .pairs = FN(pairs),
#ifdef HAS_BF16_DOT
    .native_bf16 = FN(native_bf16),
#endif
    .norm = FN(norm),
    .quantize = FN(quantize),
    .norm_quantize = FN(norm_quantize),
    .gated = FN(gated),
    .add = FN(add),
    .rotate = FN(rotate),
    .store = FN(store),
    .attention = FN(attention),
    .softmax = FN(softmax),
    .log_softmax = FN(log_softmax),
    .all_finite = FN(all_finite),
    .dots = FN(dots),
};
