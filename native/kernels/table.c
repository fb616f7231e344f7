/* The table of this instruction set. */
#include "kernels/isa.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

#ifdef FLUSHES_DENORMALS
/* Those that calculate with vectors of floats; the tiles of matmuls do so themselves. */
#define GUARDED(name, parameters, ...)                                                             \
    static void guarded_##name parameters {                                                        \
        EXACT(FN(name)(__VA_ARGS__), kernels_scalar.name(__VA_ARGS__));                            \
    }
static void guarded_norm(const float *x, const norm_args *args, int64_t k, float *out) {
    if (out == x) { /* there would be no input for a second time */
        kernels_scalar.norm(x, args, k, out);
    } else {
        EXACT(FN(norm)(x, args, k, out), kernels_scalar.norm(x, args, k, out));
    }
}
GUARDED(quantize, (const float *x, int64_t k, q8_place place), x, k, place)
GUARDED(norm_quantize, (const float *x, const norm_args *args, int64_t k, q8_place place), x, args,
        k, place)
GUARDED(gated,
        (const float *gate, const float *up, edge_activation activation, int64_t n, float *out),
        gate, up, activation, n, out)
GUARDED(softcap, (const float *x, float softcap, int64_t n, float *out), x, softcap, n, out)
GUARDED(xielu, (const float *x, const xielu_args *args, int64_t n, float *out), x, args, n, out)
GUARDED(sparsify, (const float *x, float factor, int64_t k, float *out), x, factor, k, out)
GUARDED(rescale, (const float *x, const float *y, float least, int64_t k, float *out), x, y, least,
        k, out)
GUARDED(mix, (const mix_args *args, int64_t n, float *out), args, n, out)
GUARDED(store, (const store_args *args), args)
GUARDED(attention, (const attention_args *args, int64_t row0, int64_t row1), args, row0, row1)
GUARDED(softmax, (const float *x, int64_t n, float *out), x, n, out)
GUARDED(log_softmax, (const float *x, int64_t n, float *out), x, n, out)
#define TABLE(name) guarded_##name
#else
#define TABLE(name) FN(name)
#endif

const edge_kernels FN(kernels) = {
    .name = TEXT(EDGE_ISA),
    .tile = TILE,
    .tiles = FN(tiles),
    .pairs = FN(pairs),
#ifdef HAS_BF16_DOT
    .native_bf16 = FN(native_bf16),
#endif
    .norm = TABLE(norm),
    .quantize = TABLE(quantize),
    .norm_quantize = TABLE(norm_quantize),
    .gated = TABLE(gated),
    .softcap = TABLE(softcap),
    .xielu = TABLE(xielu),
    .sparsify = TABLE(sparsify),
    .rescale = TABLE(rescale),
    .add = FN(add),
    .multiply = FN(multiply),
    .scale = FN(scale),
    .mix = TABLE(mix),
    .rotate = FN(rotate),
    .store = TABLE(store),
    .attention = TABLE(attention),
    .softmax = TABLE(softmax),
    .log_softmax = TABLE(log_softmax),
    .all_finite = FN(all_finite),
    .dots = FN(dots),
};
