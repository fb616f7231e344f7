/* Norms, quantisation of activations, activations, sums: one vector at a time. */
#include <math.h>
#include <string.h>

#include "kernels/exp.h"
#include "numbers.h"

enum { LANE_COUNT = 16 };

INLINE int lanes_left(int64_t k, int64_t i) {
    return k - i < LANE_COUNT ? (int)(k - i) : LANE_COUNT;
}

/* 1 / sqrt(mean(x^2) + eps), the squares summed in 16 strided lanes and one tree. */
static float norm_factor(const float *x, float eps, int64_t k) {
    vf squares = vf_zero();
    for (int64_t i = 0; i < k; i += LANE_COUNT) {
        const vf v = vf_load_n(x + i, lanes_left(k, i));
        squares = vf_fma(v, v, squares);
    }
    return 1.0f / sqrtf(vf_sum(squares) / (float)k + eps);
}

void FN(norm)(const float *x, const float *weight, float eps, int64_t k, float *out) {
    const vf factor = vf_set1(norm_factor(x, eps, k));
    for (int64_t i = 0; i < k; i += LANE_COUNT) {
        const int n = lanes_left(k, i);
        const vf scaled = vf_mul(vf_load_n(x + i, n), factor);
        vf_store_n(out + i, vf_mul(scaled, vf_load_n(weight + i, n)), n);
    }
}

/* A group of 32 numbers: 0..15 and 16..31. */
typedef struct {
    vf a, b;
} half_groups;

/* Quantises one group into column c of a tile of `columns`, and returns what rounding took from x.
 * group: the 48 * columns bytes of the group, drawn in layouts.h. A group that holds NaN or
 * infinity gets scale NaN, so that the result is NaN too. */
INLINE half_groups quantize_column(half_groups x, uint8_t *group, int32_t c, int32_t columns) {
    union {
        int32_t bits;
        float value;
    } amax = {vi_hmax(vi_max(vi_abs_bits(x.a), vi_abs_bits(x.b)))};
    float scale = 0.0f, inverse = 0.0f;
    if (amax.bits >= 0x7f800000) {
        scale = NAN;
        x.a = x.b = vf_zero();
    } else if (amax.value >= 0x1p-100f) {
        scale = amax.value / 127.0f;
        inverse = 127.0f / amax.value;
    }
    const vi qa = vi_round(vf_mul(x.a, vf_set1(inverse)));
    const vi qb = vi_round(vf_mul(x.b, vf_set1(inverse)));
    int8_t codes[GROUP];
    vi_to_steps(codes, qa);
    vi_to_steps(codes + LANE_COUNT, qb);
    for (int s = 0; s < GROUP / 4; s++) {
        memcpy(group + 4 * (s * columns + c), codes + 4 * s, 4);
    }
    const int32_t sum_a = vi_hsum(qa), sum_b = vi_hsum(qb);
    float *scales = (float *)(group + GROUP * columns);
    int32_t *minus_sums = (int32_t *)(group + (GROUP + 4) * columns);
    int16_t *minus_halves = (int16_t *)(group + (GROUP + 8) * columns);
    float *totals = (float *)(group + (GROUP + 12) * columns);
    scales[c] = scale;
    minus_sums[c] = -(sum_a + sum_b);
    minus_halves[2 * c] = (int16_t)-sum_a;
    minus_halves[2 * c + 1] = (int16_t)-sum_b;
    totals[c] = scale * (float)(sum_a + sum_b);
    const vf minus_scale = vf_set1(-scale);
    return (half_groups){vf_fma(vf_from_int(qa), minus_scale, x.a),
                         vf_fma(vf_from_int(qb), minus_scale, x.b)};
}

/* Group g of a row into its place; with twice also what is left of it, into the next column. */
INLINE void quantize_group(half_groups x, q8_place place, int64_t g) {
    uint8_t *group = (uint8_t *)place.tile + g * Q8_COLUMN_BYTES * place.columns;
    const half_groups left = quantize_column(x, group, place.column, place.columns);
    if (place.twice) {
        quantize_column(left, group, place.column + 1, place.columns);
    }
}

void FN(quantize)(const float *x, int64_t k, q8_place place) {
    for (int64_t g = 0; g < k / GROUP; g++) {
        const float *p = x + g * GROUP;
        quantize_group((half_groups){vf_load(p), vf_load(p + LANE_COUNT)}, place, g);
    }
}

void FN(norm_quantize)(const float *x, const float *weight, float eps, int64_t k, q8_place place) {
    const vf factor = vf_set1(norm_factor(x, eps, k));
    for (int64_t g = 0; g < k / GROUP; g++) {
        const float *p = x + g * GROUP, *w = weight + g * GROUP;
        const half_groups normed = {
            vf_mul(vf_mul(vf_load(p), factor), vf_load(w)),
            vf_mul(vf_mul(vf_load(p + LANE_COUNT), factor), vf_load(w + LANE_COUNT))};
        quantize_group(normed, place, g);
    }
}

/* The plan check lets no other number through. */
INLINE vf activate(vf x, edge_activation activation) {
    switch (activation) {
    case EDGE_ACTIVATION_SILU: /* x / (1 + exp(-x)) */
        return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x))));
    case EDGE_N_ACTIVATIONS: break;
    }
    __builtin_unreachable();
}

void FN(gated)(const float *gate, const float *up, edge_activation activation, int64_t n,
               float *out) {
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        const vf activated = activate(vf_load_n(gate + i, lanes), activation);
        vf_store_n(out + i, vf_mul(activated, vf_load_n(up + i, lanes)), lanes);
    }
}

void FN(add)(const float *x, const float *y, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] + y[i];
    }
}

int32_t FN(all_finite)(const float *x, int64_t n) {
    vi most = vi_set1(0);
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        most = vi_max(most, vi_abs_bits(vf_load_n(x + i, lanes_left(n, i))));
    }
    return vi_hmax(most) < 0x7f800000;
}

/* Of n > 0 numbers; with a NaN among them the result is any. */
static float maximum(const float *x, int64_t n) {
    vf most = vf_set1(x[0]);
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        most = vf_max(most, vf_keep(vf_load_n(x + i, lanes), 0, lanes, x[0]));
    }
    return vf_hmax(most);
}

/* Sum of exp(x - most), 16 strided lanes and one tree; the terms go to out when it is not NULL. */
static float exponentials(const float *x, float most, int64_t n, float *out) {
    vf sum = vf_zero();
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        const vf e = vf_exp(vf_sub(vf_load_n(x + i, lanes), vf_set1(most)));
        sum = vf_add(sum, vf_keep(e, 0, lanes, 0.0f));
        if (out != NULL) {
            vf_store_n(out + i, e, lanes);
        }
    }
    return vf_sum(sum);
}

void FN(softmax)(const float *x, int64_t n, float *out) {
    const vf sum = vf_set1(exponentials(x, maximum(x, n), n, out));
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        vf_store_n(out + i, vf_div(vf_load_n(out + i, lanes), sum), lanes);
    }
}

void FN(log_softmax)(const float *x, int64_t n, float *out) {
    const float most = maximum(x, n);
    const float log_sum = (float)number_log(exponentials(x, most, n, NULL));
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] - most - log_sum;
    }
}
