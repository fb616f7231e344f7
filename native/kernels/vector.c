/* Norms, quantisation of activations, activations, sums: one vector at a time. */
#include <math.h>
#include <string.h>

#include "kernels/exp.h"
#include "numbers.h"

enum { LANE_COUNT = 16 };

INLINE int lanes_left(int64_t k, int64_t i) {
    return k - i < LANE_COUNT ? (int)(k - i) : LANE_COUNT;
}

/* A vector is normed to (x - mean) * factor. */
typedef struct {
    vf mean, factor;
} moments;

/* Lanes of x less the mean, if it is subtracted; 0 in those that are not of the vector. */
INLINE vf less_mean(vf x, const norm_args *a, vf mean, int lanes) {
    return a->centred ? vf_keep(vf_sub(x, mean), 0, lanes, 0.0f) : x;
}

/* The mean, and 1 / sqrt(mean((x - mean)^2) + eps): sums in 16 strided lanes and one tree. */
static moments moments_of(const float *x, const norm_args *a, int64_t k) {
    vf sum = vf_zero(), squares = vf_zero();
    for (int64_t i = 0; a->centred && i < k; i += LANE_COUNT) {
        sum = vf_add(sum, vf_load_n(x + i, lanes_left(k, i)));
    }
    const vf mean = vf_set1(a->centred ? vf_sum(sum) / (float)k : 0.0f);
    for (int64_t i = 0; i < k; i += LANE_COUNT) {
        const int n = lanes_left(k, i);
        const vf v = less_mean(vf_load_n(x + i, n), a, mean, n);
        squares = vf_fma(v, v, squares);
    }
    return (moments){mean, vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)k + a->eps))};
}

/* Lanes x of a vector, from element i on, normed. */
INLINE vf normed(vf x, const norm_args *a, moments m, int64_t i, int n) {
    const vf v = vf_mul(a->centred ? vf_sub(x, m.mean) : x, m.factor);
    if (a->weight == NULL) {
        return v;
    }
    const vf weight = vf_load_n(a->weight + i, n);
    return a->bias == NULL ? vf_mul(v, weight) : vf_fma(v, weight, vf_load_n(a->bias + i, n));
}

void FN(norm)(const float *x, const norm_args *a, int64_t k, float *out) {
    const moments m = moments_of(x, a, k);
    for (int64_t i = 0; i < k; i += LANE_COUNT) {
        const int n = lanes_left(k, i);
        vf_store_n(out + i, normed(vf_load_n(x + i, n), a, m, i, n), n);
    }
}

void FN(sparsify)(const float *x, float factor, int64_t k, float *out) {
    const norm_args centred = {NULL, NULL, 0.0f, true};
    const moments m = moments_of(x, &centred, k);
    const vf std = vf_div(vf_set1(1.0f), m.factor);
    const vf least = vf_fma(std, vf_set1(factor), m.mean);
    for (int64_t i = 0; i < k; i += LANE_COUNT) {
        const int n = lanes_left(k, i);
        const vf above = vf_sub(vf_load_n(x + i, n), least);
        vf_store_n(out + i, vf_max(vf_zero(), above), n);
    }
}

/* The mean of the squares: 16 strided lanes and one tree. */
static float mean_square(const float *x, int64_t k) {
    vf squares = vf_zero();
    for (int64_t i = 0; i < k; i += LANE_COUNT) {
        const vf v = vf_load_n(x + i, lanes_left(k, i));
        squares = vf_fma(v, v, squares);
    }
    return vf_sum(squares) / (float)k;
}

void FN(rescale)(const float *x, const float *y, float least, int64_t k, float *out) {
    const float of_x = mean_square(x, k);
    const float factor = sqrtf(mean_square(y, k)) / sqrtf(of_x < least ? least : of_x);
    for (int64_t i = 0; i < k; i += LANE_COUNT) {
        const int n = lanes_left(k, i);
        vf_store_n(out + i, vf_mul(vf_load_n(x + i, n), vf_set1(factor)), n);
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

void FN(norm_quantize)(const float *x, const norm_args *a, int64_t k, q8_place place) {
    const moments m = moments_of(x, a, k);
    for (int64_t g = 0; g < k / GROUP; g++) {
        const int64_t i = g * GROUP, j = i + LANE_COUNT;
        const half_groups both = {normed(vf_load(x + i), a, m, i, LANE_COUNT),
                                  normed(vf_load(x + j), a, m, j, LANE_COUNT)};
        quantize_group(both, place, g);
    }
}

/* x / (1 + exp(-y)). */
INLINE vf times_sigmoid(vf x, vf y) {
    return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), y))));
}

/* x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3). Below -10 the
 * result is next to nothing. */
INLINE vf gelu_tanh(vf x) {
    x = vf_max(vf_set1(-10.0f), x);
    const vf slope = vf_fma(vf_mul(x, x), vf_set1(0.0713548163f), vf_set1(1.59576912f));
    return times_sigmoid(x, vf_mul(x, slope));
}

/* x times the normal distribution's cumulative function: max(x, 0) - |x| * (that at -|x|). Beyond
 * 13.2 the product stays the same, 5e-39. */
INLINE vf gelu_erf(vf x) {
    const vf a = vf_min(vf_set1(13.2f), vf_max(vf_sub(vf_zero(), x), x));
    return vf_fma(vf_sub(vf_zero(), a), vf_normal_tail(a), vf_max(x, vf_zero()));
}

/* The plan check lets no other number through. */
INLINE vf activate(vf x, edge_activation activation) {
    switch (activation) {
    case EDGE_ACTIVATION_SILU: return times_sigmoid(x, x);
    case EDGE_ACTIVATION_GELU_TANH: return gelu_tanh(x);
    case EDGE_ACTIVATION_GELU_ERF: return gelu_erf(x);
    case EDGE_ACTIVATION_RELU2: {
        const vf positive = vf_max(vf_zero(), x);
        return vf_mul(positive, positive);
    }
    case EDGE_ACTIVATION_SIGMOID: return times_sigmoid(vf_set1(1.0f), x);
    case EDGE_ACTIVATION_TANH: return vf_tanh(x);
    case EDGE_ACTIVATION_SWIGLU_OAI: { /* of the gate; below -50 it is next to nothing */
        const vf gate = vf_min(vf_set1(7.0f), vf_max(vf_set1(-50.0f), x));
        return times_sigmoid(gate, vf_mul(gate, vf_set1(1.702f)));
    }
    case EDGE_N_ACTIVATIONS: break;
    }
    __builtin_unreachable();
}

void FN(gated)(const float *gate, const float *up, edge_activation activation, int64_t n,
               float *out) {
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        vf y = activate(vf_load_n(gate + i, lanes), activation);
        if (up != NULL) {
            vf factor = vf_load_n(up + i, lanes);
            if (activation == EDGE_ACTIVATION_SWIGLU_OAI) {
                factor = vf_min(vf_set1(7.0f), vf_max(vf_set1(-7.0f), factor));
                factor = vf_add(factor, vf_set1(1.0f));
            }
            y = vf_mul(y, factor);
        }
        vf_store_n(out + i, y, lanes);
    }
}

void FN(softcap)(const float *x, float cap, int64_t n, float *out) {
    const vf c = vf_set1(cap);
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        vf_store_n(out + i, vf_mul(c, vf_tanh(vf_div(vf_load_n(x + i, lanes), c))), lanes);
    }
}

/* 1 in lanes above 0, else 0: the least denormal number is 2^-149. */
INLINE vf is_positive(vf x) {
    const vf large = vf_set1(0x1p100f);
    return vf_min(vf_mul(vf_mul(vf_max(x, vf_zero()), large), large), vf_set1(1.0f));
}

void FN(xielu)(const float *x, const xielu_args *a, int64_t n, float *out) {
    const vf alpha_p = vf_set1(a->alpha_p), alpha_n = vf_set1(a->alpha_n);
    const vf beta = vf_set1(a->beta), eps = vf_set1(a->eps);
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        const vf v = vf_load_n(x + i, lanes), linear = vf_mul(beta, v);
        const vf above = vf_max(vf_zero(), v), below = vf_min(vf_zero(), v);
        const vf bent = vf_sub(vf_expm1(vf_min(eps, below)), below);
        const vf kept = vf_mul(bent, vf_sub(vf_set1(1.0f), is_positive(v)));
        const vf y = vf_fma(vf_mul(alpha_p, above), above, vf_fma(alpha_n, kept, linear));
        vf_store_n(out + i, y, lanes);
    }
}

void FN(add)(const float *x, const float *y, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] + y[i];
    }
}

void FN(multiply)(const float *x, const float *y, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] * y[i];
    }
}

void FN(scale)(const float *x, float factor, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = x[i] * factor;
    }
}

void FN(mix)(const mix_args *a, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += LANE_COUNT) {
        const int lanes = lanes_left(n, i);
        vf sum = vf_zero();
        for (int32_t j = 0; j < a->n_used; j++) {
            const int64_t column = a->columns[j];
            vf x = vf_load_n(a->x + column * n + i, lanes);
            if (a->bias != NULL) {
                x = vf_add(x, vf_load_n(a->bias + a->experts[column] * n + i, lanes));
            }
            sum = vf_fma(vf_set1(a->weights[j]), x, sum);
        }
        vf_store_n(out + i, sum, lanes);
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
