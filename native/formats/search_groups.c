/* A lane is a group. It computes what search_scale_min does, in the same order and with the same
 * roundings, but branches choose between two values: so compilers need no leave to use the vector
 * instructions of any CPU. */
#include <stdbool.h>

#include "search.h"

#ifdef __arm__
enum { LANES = 1 }; /* vectors of 32-bit ARM take denormals for 0 */
#else
enum { LANES = 4 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t lane_mask __attribute__((vector_size(4 * LANES)));

static const lanes zero = {0};

static inline lanes pick(lane_mask where, lanes a, lanes b) {
    return (lanes)(((lane_mask)a & where) | ((lane_mask)b & ~where));
}

/* clamped(nearest_int(f), 0, max_code) */
static inline lanes nearest_code(lanes f, float max_code) {
    const lane_mask bits = (lane_mask)(f + 0x1.8p23f);
    const lanes i = __builtin_convertvector((bits & 0x7fffff) - 0x400000, lanes);
    return pick(i < max_code, pick(i > 0, i, zero), zero + max_code);
}

typedef struct {
    int n;
    float max_code;
    bool absolute;
    lanes x[SEARCH_MAX], w[SEARCH_MAX];
    lanes sum_w, sum_wx;
    lanes low, high; /* low: at most 0 */
} lane_groups;

/* Scales and minima, and with which factor and offset their codes are made of the weights. */
typedef struct {
    lanes scale, min, error;
    lanes factor, offset;
} lane_fits;

static void load_groups(const search_group *first, lane_groups *g) {
    for (int i = 0; i < g->n; i++) {
        for (int j = 0; j < LANES; j++) {
            g->x[i][j] = first->x[j * g->n + i];
            g->w[i][j] = first->error_weight[j * g->n + i];
        }
    }
    g->low = g->high = g->x[0];
    g->sum_w = g->w[0];
    g->sum_wx = g->w[0] * g->x[0];
    for (int i = 1; i < g->n; i++) {
        g->low = pick(g->x[i] < g->low, g->x[i], g->low);
        g->high = pick(g->x[i] > g->high, g->x[i], g->high);
        g->sum_w += g->w[i];
        g->sum_wx += g->w[i] * g->x[i];
    }
    g->low = pick(g->low > 0, zero, g->low);
}

static inline lanes add_error(const lane_groups *g, int i, lanes q, lanes scale, lanes min,
                              lanes sum) {
    const lanes difference = scale * q + min - g->x[i];
    const lanes magnitude = (lanes)((lane_mask)difference & INT32_MAX);
    return sum + g->w[i] * (g->absolute ? magnitude : difference * difference);
}

/* The fit of the codes that cover the range of a group at full length. */
static void fit_range(const lane_groups *g, lane_fits *fit) {
    fit->factor = g->max_code / (g->high - g->low);
    fit->offset = fit->min = g->low;
    fit->scale = 1 / fit->factor;
    fit->error = zero;
    for (int i = 0; i < g->n; i++) {
        const lanes q = nearest_code(fit->factor * (g->x[i] - fit->offset), g->max_code);
        fit->error = add_error(g, i, q, fit->scale, fit->min, fit->error);
    }
}

/* Tries the codes of another factor, with the scale and the min that fit them best. */
static void try_factor(const lane_groups *g, lanes factor, lane_fits *best) {
    const lanes offset = best->min;
    lanes q[SEARCH_MAX], wq = zero, wqq = zero, wqx = zero, error = zero;
    for (int i = 0; i < g->n; i++) {
        q[i] = nearest_code(factor * (g->x[i] - offset), g->max_code);
        const lanes product = g->w[i] * q[i];
        wq += product;
        wqq += product * q[i];
        wqx += product * g->x[i];
    }
    const lanes determinant = g->sum_w * wqq - wq * wq;
    lanes scale = (g->sum_w * wqx - g->sum_wx * wq) / determinant;
    lanes min = (wqq * g->sum_wx - wq * wqx) / determinant;
    scale = pick(min > 0, wqx / wqq, scale);
    min = pick(min > 0, zero, min);
    for (int i = 0; i < g->n; i++) {
        error = add_error(g, i, q[i], scale, min, error);
    }
    const lane_mask better = (determinant > 0) & (error < best->error);
    best->scale = pick(better, scale, best->scale);
    best->min = pick(better, min, best->min);
    best->error = pick(better, error, best->error);
    best->factor = pick(better, factor, best->factor);
    best->offset = pick(better, offset, best->offset);
}

void search_scale_min_groups(const search_group *first, int n_groups, int max_code,
                             const search_steps *steps, int8_t *code, float *scale, float *min) {
    lane_groups g = {.n = first->n, .max_code = (float)max_code, .absolute = steps->absolute};
    for (int group = 0; group < n_groups; group += LANES) {
        const int at = group * g.n;
        load_groups(&(search_group){first->x + at, first->error_weight + at, g.n}, &g);
        lane_fits best;
        fit_range(&g, &best);
        for (int t = 0; t <= steps->n_steps; t++) {
            const float range = steps->first + steps->step * (float)t + g.max_code;
            try_factor(&g, range / (g.high - best.min), &best);
        }
        const lane_mask flat = g.low == g.high; /* nothing to fit */
        for (int i = 0; i < g.n; i++) {
            const lanes q = nearest_code(best.factor * (g.x[i] - best.offset), g.max_code);
            for (int j = 0; j < LANES; j++) {
                code[at + j * g.n + i] = flat[j] ? 0 : (int8_t)q[j];
            }
        }
        for (int j = 0; j < LANES; j++) {
            scale[group + j] = flat[j] ? 0 : best.scale[j];
            min[group + j] = flat[j] ? g.low[j] : best.min[j];
        }
    }
}
