/* Searches for the scale of a group of weights, with the bits of ggml's quantisers: the order of
 * every sum is theirs. Formats share them. Any finite weights may come; what a search gives then
 * may be infinite or NaN, but no conversion is undefined. */
#ifndef EDGE_SEARCH_H
#define EDGE_SEARCH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Weights that share a scale. */
typedef struct {
    const float *x;
    const float *error_weight; /* what the square of an error of each counts */
    int n;                     /* at most SEARCH_MAX */
} search_group;

enum { SEARCH_MAX = 32 };

/* The largest magnitude that counts as zero. */
#define SEARCH_ZERO 1e-15f

/* f to the nearest integer, ties to even, where |f| < 2^22. Other f, also NaN, give some integer
 * from -2^22 to 2^22 - 1, the same as ggml's on every machine. */
static inline int32_t nearest_int(float f) {
    const float shifted = f + 0x1.8p23f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (bits & 0x7fffff) - 0x400000;
}

/* f without its fraction, to zero; 0 where |f| >= 2^23, and for NaN. */
static inline int32_t whole_part(float f) {
    const float usable = fabsf(f) < 0x1p23f ? f : 0.0f;
    return (int32_t)usable;
}

/* f to the nearest integer, ties away from zero; 0 where |f| >= 2^23, and for NaN. */
static inline int32_t nearest_away(float f) {
    return whole_part(f + copysignf(0x1.fffffep-2f, f)); /* with 0.5, the float below 0.5 fails */
}

static inline int32_t clamped(int32_t i, int32_t low, int32_t high) {
    return i < low ? low : i > high ? high : i;
}

/* error_weight[i] = importance[i] * sqrt(square + x[i]^2). */
void search_error_weights(const float *x, const float *importance, float square, int n,
                          float *error_weight);

/* The largest magnitude; infinity or NaN when one is. */
float search_magnitude(const float *x, int n);

/* The element whose magnitude is largest, the first of several; 0 for zeros of any sign. */
float search_largest(const float *x, int n);

/* value = scale * (code - limit), code 0 .. 2 * limit - 1: the best of 19 scales around limit over
 * the largest element (make_qx_quants of ggml, its type of error 1). Returns the scale; all codes
 * are 0 with a scale of 0. */
float search_scale(const search_group *group, int limit, int8_t *code);

/* The same, but codes are moved one by one as long as that is better, up to 5 times; an error
 * counts x^2 (make_q3_quants). group->error_weight is not read. */
float search_scale_by_codes(const search_group *group, int limit, int8_t *code);

/* Which scales search_scale_min tries: the range of the weights over
 * max_code + first + i * step, i 0 .. n_steps. */
typedef struct {
    float first, step;
    int n_steps;
    int absolute; /* 1: the magnitude of an error counts, 0: its square */
} search_steps;

/* value = scale * code + min, code 0 .. max_code, min at most 0: the best of several scales, each
 * with the min that fits best (make_qkx2_quants and make_qkx3_quants, which are the same). Returns
 * the scale. */
float search_scale_min(const search_group *group, int max_code, const search_steps *steps,
                       int8_t *code, float *min);

/* The same for n_groups groups of which *first is the first; the others follow it in its arrays,
 * and in code. n_groups: a multiple of 4. Groups are lanes: faster than one by one. */
void search_scale_min_groups(const search_group *first, int n_groups, int max_code,
                             const search_steps *steps, int8_t *code, float *scale, float *min);

/* value = scale * code, code 0 .. max_code, values at least 0: scales of groups (make_qp_quants of
 * ggml). Returns the scale. Where a value is below 0 all the same, its
 * code is too, as a byte that wraps. */
float search_positive_scale(const search_group *group, int max_code, uint8_t *code);

/* value = scale * table[code] with the table of IQ4_NL, for a group of 32 (the search of
 * quantize_row_iq4_nl_impl). Returns the scale, 0 for a group of zeros. */
float search_scale_iq4(const search_group *group);

/* code[i]: the entry of that table nearest to factor * x[i]; NaN: the last. */
void nearest_iq4(const float *x, float factor, int n, int8_t *code);

#endif
