/* Where several scales are tried on the same weights, each is a lane: the sums of a lane are in
 * the order of the weights, as in the reference, and the lanes are a vector for the compiler. */
#include "search.h"

#include <stdbool.h>

void search_error_weights(const float *x, const float *importance, float square, int n,
                          float *error_weight) {
    for (int i = 0; i < n; i++) {
        error_weight[i] = importance[i] * sqrtf(square + x[i] * x[i]);
    }
}

float search_magnitude(const float *x, int n) {
    int32_t most = 0; /* bits of magnitudes are in the order of these: a vector of integers */
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float magnitude;
    memcpy(&magnitude, &most, sizeof magnitude);
    return magnitude;
}

float search_largest(const float *x, int n) {
    const float magnitude = search_magnitude(x, n);
    float largest = 0;
    for (int i = n - 1; i >= 0; i--) {
        largest = x[i] != 0 && fabsf(x[i]) == magnitude ? x[i] : largest;
    }
    return largest;
}

static inline float rounded(float f) { return (float)nearest_int(f); }

static inline float within(float f, float low, float high) {
    f = f < high ? f : high;
    return f > low ? f : low;
}

/* Sums that say how well codes q fit: the best scale is wxq / wqq, and the larger wxq^2 / wqq, the
 * smaller the error. */
enum { SCALE_LANES = 20 };
typedef struct {
    float wxq[SCALE_LANES], wqq[SCALE_LANES];
} fits;

/* The lane that is best when they are tried in this order; *scale is its scale. */
static int best_lane(const fits *f, const int *order, int n_lanes, float *scale) {
    int best = order[0];
    *scale = f->wqq[best] != 0 ? f->wxq[best] / f->wqq[best] : 0.0f;
    float measure = *scale * f->wxq[best];
    for (int i = 1; i < n_lanes; i++) {
        const int t = order[i];
        if (f->wqq[t] > 0 && f->wxq[t] * f->wxq[t] > measure * f->wqq[t]) {
            best = t;
            *scale = f->wxq[t] / f->wqq[t];
            measure = *scale * f->wxq[t];
        }
    }
    return best;
}

float search_scale(const search_group *group, int limit, int8_t *code) {
    static const int order[] = {9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18};
    const float *x = group->x;
    const float largest = search_largest(x, group->n), low = (float)-limit,
                high = (float)(limit - 1);
    if (fabsf(largest) < SEARCH_ZERO) {
        memset(code, 0, (size_t)group->n);
        return 0;
    }
    float factor[SCALE_LANES];
    for (int t = 0; t < SCALE_LANES; t++) {
        factor[t] = -((float)limit + 0.1f * (float)(t - 9)) / largest;
    }
    fits f = {0};
    for (int i = 0; i < group->n; i++) {
        const float w = group->error_weight[i], wx = w * x[i];
        for (int t = 0; t < SCALE_LANES; t++) {
            const float q = within(rounded(factor[t] * x[i]), low, high);
            f.wxq[t] += wx * q;
            f.wqq[t] += w * q * q;
        }
    }
    float scale;
    const float best = factor[best_lane(&f, order, 19, &scale)];
    for (int i = 0; i < group->n; i++) {
        code[i] = (int8_t)(within(rounded(best * x[i]), low, high) - low);
    }
    return scale;
}

float search_scale_by_codes(const search_group *group, int limit, int8_t *code) {
    const float *x = group->x, largest = search_largest(x, group->n);
    if (fabsf(largest) < SEARCH_ZERO) {
        memset(code, 0, (size_t)group->n);
        return 0;
    }
    const float factor = -(float)limit / largest;
    float wxq = 0, wqq = 0;
    for (int i = 0; i < group->n; i++) {
        const float w = x[i] * x[i];
        code[i] = (int8_t)clamped(nearest_int(factor * x[i]), -limit, limit - 1);
        wxq += w * x[i] * code[i];
        wqq += w * code[i] * code[i];
    }
    bool changed = true;
    for (int pass = 0; pass < 5 && changed; pass++) {
        changed = false;
        for (int i = 0; i < group->n; i++) {
            const float w = x[i] * x[i];
            float other_wxq = wxq - w * x[i] * code[i], other_wqq = wqq - w * code[i] * code[i];
            if (!(other_wxq > 0)) {
                continue;
            }
            const int q = clamped(nearest_int(x[i] * other_wqq / other_wxq), -limit, limit - 1);
            if (q == code[i]) {
                continue;
            }
            other_wxq += w * x[i] * (float)q;
            other_wqq += w * (float)q * (float)q;
            if (other_wqq > 0 && other_wxq * other_wxq * wqq > wxq * wxq * other_wqq) {
                code[i] = (int8_t)q;
                wxq = other_wxq;
                wqq = other_wqq;
                changed = true;
            }
        }
    }
    for (int i = 0; i < group->n; i++) {
        code[i] = (int8_t)(code[i] + limit);
    }
    return wqq > 0 ? wxq / wqq : 0.0f;
}

/* ---- a scale and a min ------------------------------------------------------------------- */

/* q[i] = (x[i] - min) * factor as a code. */
static void scaled_codes(const search_group *g, float factor, float min, int32_t max_code,
                         float *q) {
    for (int i = 0; i < g->n; i++) {
        q[i] = (float)clamped(nearest_int(factor * (g->x[i] - min)), 0, max_code);
    }
}

static float error_of(const search_group *g, const float *q, float scale, float min, int absolute) {
    float term[SEARCH_MAX], sum = 0;
    for (int i = 0; i < g->n; i++) {
        const float difference = scale * q[i] + min - g->x[i];
        term[i] = g->error_weight[i] * (absolute ? fabsf(difference) : difference * difference);
    }
    for (int i = 0; i < g->n; i++) {
        sum += term[i];
    }
    return sum;
}

/* The scale and the min that fit the codes q best; sums: of the error weights, and of these times
 * x. False where the codes determine none. */
static bool fit_min(const search_group *g, const float *q, const float sums[2], float *scale,
                    float *min) {
    float wq[SEARCH_MAX], wqq[SEARCH_MAX], wqx[SEARCH_MAX];
    for (int i = 0; i < g->n; i++) {
        wq[i] = g->error_weight[i] * q[i];
        wqq[i] = wq[i] * q[i];
        wqx[i] = wq[i] * g->x[i];
    }
    float sum_wq = 0, sum_wqq = 0, sum_wqx = 0;
    for (int i = 0; i < g->n; i++) {
        sum_wq += wq[i];
        sum_wqq += wqq[i];
        sum_wqx += wqx[i];
    }
    const float sum_w = sums[0], sum_wx = sums[1];
    const float determinant = sum_w * sum_wqq - sum_wq * sum_wq;
    if (!(determinant > 0)) {
        return false;
    }
    *scale = (sum_w * sum_wqx - sum_wx * sum_wq) / determinant;
    *min = (sum_wqq * sum_wx - sum_wq * sum_wqx) / determinant;
    if (*min > 0) {
        *min = 0;
        *scale = sum_wqx / sum_wqq;
    }
    return true;
}

float search_scale_min(const search_group *group, int max_code, const search_steps *steps,
                       int8_t *code, float *min) {
    const float *x = group->x;
    const float *w = group->error_weight;
    float low = x[0], high = x[0], sums[2] = {w[0], w[0] * x[0]};
    for (int i = 1; i < group->n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sums[0] += w[i];
        sums[1] += w[i] * x[i];
    }
    *min = low > 0 ? 0.0f : low;
    if (high == *min) {
        memset(code, 0, (size_t)group->n);
        return 0;
    }
    float q[2][SEARCH_MAX]; /* the best and those on trial */
    int best = 0;
    float factor = (float)max_code / (high - *min), scale = 1 / factor;
    scaled_codes(group, factor, *min, max_code, q[best]);
    float error = error_of(group, q[best], scale, *min, steps->absolute);
    for (int i = 0; i <= steps->n_steps; i++) {
        factor = (steps->first + steps->step * (float)i + (float)max_code) / (high - *min);
        float *trial = q[1 - best], new_scale, new_min;
        scaled_codes(group, factor, *min, max_code, trial);
        if (!fit_min(group, trial, sums, &new_scale, &new_min)) {
            continue;
        }
        const float new_error = error_of(group, trial, new_scale, new_min, steps->absolute);
        if (new_error < error) {
            best = 1 - best;
            error = new_error;
            scale = new_scale;
            *min = new_min;
        }
    }
    for (int i = 0; i < group->n; i++) {
        code[i] = (int8_t)q[best][i];
    }
    return scale;
}

/* ---- scales of groups -------------------------------------------------------------------- */

/* wraps: codes are bytes, else at most max_code. */
static float positive_error(const search_group *g, float factor, int max_code, bool wraps) {
    const float scale = 1 / factor;
    float sum = 0;
    for (int i = 0; i < g->n; i++) {
        const int nearest = nearest_int(factor * g->x[i]);
        const int q = wraps ? (uint8_t)nearest : nearest < max_code ? nearest : max_code;
        const float difference = g->x[i] - scale * (float)q;
        sum += g->error_weight[i] * difference * difference;
    }
    return sum;
}

float search_positive_scale(const search_group *group, int max_code, uint8_t *code) {
    const float *x = group->x;
    float max = 0;
    for (int i = 0; i < group->n; i++) {
        max = x[i] > max ? x[i] : max;
    }
    if (max < SEARCH_ZERO) {
        memset(code, 0, (size_t)group->n);
        return 0;
    }
    float best = (float)max_code / max;
    float error = positive_error(group, best, max_code, true);
    for (int t = -4; t <= 4; t++) {
        if (t == 0) {
            continue; /* was the first */
        }
        const float factor = (0.1f * (float)t + (float)max_code) / max;
        const float new_error = positive_error(group, factor, max_code, false);
        if (new_error < error) {
            error = new_error;
            best = factor;
        }
    }
    float wxq = 0, wqq = 0;
    for (int i = 0; i < group->n; i++) {
        const int nearest = nearest_int(best * x[i]), q = nearest < max_code ? nearest : max_code;
        const float w = group->error_weight[i];
        code[i] = (uint8_t)q;
        wxq += w * x[i] * (float)q;
        wqq += w * (float)q * (float)q;
    }
    bool changed = true;
    for (int pass = 0; pass < 5 && changed; pass++) {
        changed = false;
        for (int i = 0; i < group->n; i++) {
            const float w = group->error_weight[i];
            float other_wxq = wxq - w * x[i] * code[i], other_wqq = wqq - w * code[i] * code[i];
            if (!(other_wxq > 0 && other_wqq > 0)) {
                continue;
            }
            const int nearest = nearest_int(x[i] * other_wqq / other_wxq);
            const int q = nearest < max_code ? nearest : max_code;
            if (q == code[i]) {
                continue;
            }
            other_wxq += w * x[i] * (float)q;
            other_wqq += w * (float)q * (float)q;
            if (other_wxq * other_wxq * wqq > wxq * wxq * other_wqq) {
                code[i] = (uint8_t)q;
                wxq = other_wxq;
                wqq = other_wqq;
                changed = true;
            }
        }
    }
    return wqq > 0 ? wxq / wqq : 0.0f;
}

/* ---- the table of IQ4_NL ----------------------------------------------------------------- */

enum { IQ4_FIRST = -127, IQ4_LANES = 16 };
/* Between which two entries a number lies: the middle belongs to the larger. As differences of
 * floats are exact near the middle, this is the entry nearest to it. */
static const float iq4_middle[15] = {-115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                     7,       19,     31.5f, 45.5f, 61,  79,     101};
static const float iq4_rise[15] = {23, 21, 18, 16, 14, 13, 12, 11, 12, 12, 13, 15, 16, 20, 24};

float search_scale_iq4(const search_group *group) {
    /* the last lane comes first: the largest element at 127, the others have it near -127 */
    static const int order[] = {15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
    const float largest = search_largest(group->x, group->n);
    if (fabsf(largest) < SEARCH_ZERO) {
        return 0;
    }
    float factor[IQ4_LANES];
    for (int t = 0; t < 15; t++) {
        factor[t] = (float)(t - 7 + IQ4_FIRST) / largest;
    }
    factor[15] = 1 / (-largest / IQ4_FIRST);
    fits f = {0};
    for (int i = 0; i < group->n; i++) {
        const float x = group->x[i], w = group->error_weight[i];
        float scaled[IQ4_LANES], q[IQ4_LANES];
        for (int t = 0; t < IQ4_LANES; t++) {
            scaled[t] = factor[t] * x;
            q[t] = IQ4_FIRST;
        }
        for (int j = 0; j < 15; j++) {
            for (int t = 0; t < IQ4_LANES; t++) {
                q[t] += scaled[t] < iq4_middle[j] ? 0.0f : iq4_rise[j];
            }
        }
        for (int t = 0; t < IQ4_LANES; t++) {
            f.wxq[t] += w * q[t] * x;
            f.wqq[t] += w * q[t] * q[t];
        }
    }
    float scale;
    best_lane(&f, order, IQ4_LANES, &scale);
    return scale;
}

void nearest_iq4(const float *x, float factor, int n, int8_t *code) {
    for (int i = 0; i < n; i++) {
        int count = 0;
        for (int j = 0; j < 15; j++) {
            count += !(factor * x[i] < iq4_middle[j]);
        }
        code[i] = (int8_t)count;
    }
}
