/* The search for scales, grid entries and signs of delta of IQ1_S and IQ1_M, with the bits of
 * ggml's quantize_row_iq1_*_impl.
 *
 * A weight is scale * (-1, 0 or 1, + delta or - delta). Sorted, the weights of a group fall into
 * three runs, one for each value: all pairs of borders are tried with both signs, and the one with
 * the least squared error gives the codes and the scale. Where 8 codes are no entry of the grid,
 * the neighbour with the least error is taken. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "encode_iq.h"
#include "grid_points.h"
#include "search.h"

#define DELTA 0.125f

enum { LEVELS = 3, EIGHT = 8 };

/* The values of the codes without the scale, with delta positive and negative. */
static const float values[2][4] = {{-1 + DELTA, DELTA, 1 + DELTA, 0},
                                   {-1 - DELTA, -DELTA, 1 - DELTA, 0}};

typedef struct {
    const float *x;
    float weight[GROUP];
    uint8_t order[GROUP]; /* of ascending x */
    int n;
} iq1_group;

/* Codes below `first` in the order are 0, those from `second` on 2. */
typedef struct {
    int first, second;
    bool negative[2]; /* sign of delta, of the halves of a group of IQ1_M */
    float scale;      /* may be negative */
} iq1_split;

static float read_group(const encode_input *in, float square, int first, int n, iq1_group *g) {
    float max = 0;
    g->x = in->x + first;
    g->n = n;
    for (int i = 0; i < n; i++) {
        const float x = g->x[i];
        g->weight[i] =
            in->importance != NULL ? in->importance[first + i] * sqrtf(square + x * x) : x * x;
        max = fabsf(x) > max ? fabsf(x) : max;
    }
    for (int i = 0; i < n; i++) { /* equal ones stay in the order of columns */
        int j = i;
        for (; j > 0 && g->x[g->order[j - 1]] > g->x[i]; j--) {
            g->order[j] = g->order[j - 1];
        }
        g->order[j] = (uint8_t)i;
    }
    return max;
}

/* Entries for the split of a group; then its scale, which becomes positive. */
static float choose_entries(const iq1_group *g, const grid_points *points, iq1_split *split,
                            int *index) {
    int8_t code[GROUP];
    const int n_half = g->n / 2;
    for (int j = 0; j < g->n; j++) {
        code[g->order[j]] = (int8_t)(j < split->first ? 0 : j < split->second ? 1 : 2);
    }
    if (split->scale < 0) {
        for (int i = 0; i < g->n; i++) {
            code[i] = (int8_t)(2 - code[i]);
        }
        split->scale = -split->scale;
        split->negative[0] = !split->negative[0];
        split->negative[1] = !split->negative[1];
    }
    bool on_grid = true;
    for (int k = 0; k < g->n / EIGHT; k++) {
        index[k] = points->place[grid_point(code + EIGHT * k, EIGHT, LEVELS)];
        if (index[k] < 0) {
            const float *value = values[split->negative[EIGHT * k / n_half]];
            lanes term[TERMS];
            for (int i = 0; i < TERMS; i++) {
                const int j = EIGHT * k + i / 4;
                const float error = split->scale * value[i % 4] - g->x[j];
                term[i] = (lanes){0} + g->weight[j] * error * error;
            }
            index[k] = least_entry(points, EIGHT, points->lists + ~index[k], term)[0];
            on_grid = false;
        }
    }
    float xq = 0, qq = 0;
    for (int i = 0; i < g->n && !on_grid; i++) {
        const int c = entry_code(points->entries[index[i / EIGHT]], EIGHT, i % EIGHT);
        const float q = values[split->negative[i / n_half]][c];
        xq += g->weight[i] * q * g->x[i];
        qq += g->weight[i] * q * q;
    }
    return xq > 0 && qq > 0 ? xq / qq : split->scale;
}

static void put_codes(const grid_points *points, int index, int8_t code[8]) {
    for (int i = 0; i < EIGHT; i++) {
        code[i] = (int8_t)entry_code(points->entries[index], EIGHT, i);
    }
}

static void put_delta(bool negative, int n, int8_t *code) {
    for (int i = 0; i < n; i++) {
        code[i] = (int8_t)(code[i] | negative << 2);
    }
}

static int scale_code(float scale) { return clamped(nearest_int(0.5f * (scale - 1)), 0, 7); }

static bool is_better(float xq, float qq, float best) { return qq > 0 && xq * xq > best * qq; }

/* Tries all splits with this first border. Lanes are two second borders with both signs of delta;
 * xs, ws: for second border j at 2 j and 2 j + 1, sums of w x and w of the first j weights. */
static bool split_at(int first, const float *xs, const float *ws, float *score, iq1_split *best) {
    const lanes low = {values[0][0], values[1][0], values[0][0], values[1][0]};
    const lanes middle = {values[0][1], values[1][1], values[0][1], values[1][1]};
    const lanes high = {values[0][2], values[1][2], values[0][2], values[1][2]};
    const lanes x = xs[2 * first] * low, w = ws[2 * first] * low * low;
    bool found = false;
    for (int i = 2 * first; i <= 2 * GROUP; i += LANES) {
        const lanes to_x = load_lanes(xs + i), to_w = load_lanes(ws + i);
        const lanes xq = x + (to_x - xs[2 * first]) * middle + (xs[2 * GROUP] - to_x) * high;
        const lanes qq =
            w + (to_w - ws[2 * first]) * middle * middle + (ws[2 * GROUP] - to_w) * high * high;
        const lane_ints better = (qq > 0.0f) & (xq * xq > *score * qq);
        if ((better[0] | better[1] | better[2] | better[3]) == 0) {
            continue;
        }
        for (int j = 0; j < LANES && i + j < 2 * GROUP + 2; j++) {
            if (is_better(xq[j], qq[j], *score)) {
                const bool negative = j % 2 != 0;
                *best = (iq1_split){first, (i + j) / 2, {negative, negative}, xq[j] / qq[j]};
                *score = best->scale * xq[j];
                found = true;
            }
        }
    }
    return found;
}

/* False: no split has a sum of weights. */
static bool split_iq1_s(const iq1_group *g, iq1_split *best) {
    float xs[2 * GROUP + LANES] = {0}, ws[2 * GROUP + LANES] = {0};
    for (int j = 0; j < GROUP; j++) {
        const int i = g->order[j];
        xs[2 * j + 3] = xs[2 * j + 2] = xs[2 * j] + g->weight[i] * g->x[i];
        ws[2 * j + 3] = ws[2 * j + 2] = ws[2 * j] + g->weight[i];
    }
    float score = -FLT_MAX;
    bool found = false;
    for (int first = 0; first <= GROUP; first++) {
        found |= split_at(first, xs, ws, &score, best);
    }
    return found;
}

void choose_iq1_s(const encode_input *in, decoded_block *out) {
    float scale[SUPER / GROUP] = {0}, max_scale = 0;
    bool negative[SUPER / GROUP] = {false};
    const float square = 2 * sum_of_squares(in->x) / SUPER;
    for (int j = 0; j < SUPER / GROUP; j++) {
        iq1_group g;
        iq1_split split;
        int index[4];
        out->group_scale[j] = 1;
        if (read_group(in, square, GROUP * j, GROUP, &g) < 1e-12f || !split_iq1_s(&g, &split)) {
            continue;
        }
        scale[j] = choose_entries(&g, in->tables, &split, index);
        max_scale = scale[j] > max_scale ? scale[j] : max_scale;
        negative[j] = split.negative[0];
        for (int k = 0; k < 4; k++) {
            put_codes(in->tables, index[k], out->code + GROUP * j + EIGHT * k);
        }
    }
    if (max_scale == 0) {
        return;
    }
    const float unit = max_scale / 15, inverse = 1 / unit;
    out->scale = float_to_half(unit * 1.125f);
    for (int j = 0; j < SUPER / GROUP; j++) {
        out->group_scale[j] = (int8_t)(2 * scale_code(inverse * scale[j]) + 1);
        put_delta(negative[j], GROUP, out->code + GROUP * j);
    }
}

enum { IQ1_M_GROUP = 16, SIGNS = 4 };

/* Sums of w x q and w q q for each pair of signs of delta. */
typedef struct {
    float xq[SIGNS], qq[SIGNS];
} sign_sums;

static inline void add_sums(sign_sums *sums, const sign_sums *term) {
    for (int k = 0; k < SIGNS; k++) {
        sums->xq[k] += term->xq[k];
        sums->qq[k] += term->qq[k];
    }
}

static bool split_iq1_m(const iq1_group *g, iq1_split *best) {
    sign_sums term[LEVELS][IQ1_M_GROUP];
    for (int j = 0; j < IQ1_M_GROUP; j++) {
        const int i = g->order[j];
        for (int k = 0; k < SIGNS; k++) {
            const float *v = values[i < EIGHT ? k / 2 : k % 2];
            for (int c = 0; c < LEVELS; c++) {
                term[c][j].xq[k] = g->weight[i] * v[c] * g->x[i];
                term[c][j].qq[k] = g->weight[i] * v[c] * v[c];
            }
        }
    }
    float score = -FLT_MAX;
    bool found = false;
    sign_sums below = {{0}, {0}};
    for (int i = 0; i <= IQ1_M_GROUP; i++) {
        sign_sums to_second = below;
        for (int j = i; j <= IQ1_M_GROUP; j++) {
            sign_sums sums = to_second;
            for (int rest = j; rest < IQ1_M_GROUP; rest++) {
                add_sums(&sums, &term[2][rest]);
            }
            for (int k = 0; k < SIGNS; k++) {
                if (is_better(sums.xq[k], sums.qq[k], score)) {
                    *best = (iq1_split){i, j, {k / 2, k % 2}, sums.xq[k] / sums.qq[k]};
                    score = best->scale * sums.xq[k];
                    found = true;
                }
            }
            if (j < IQ1_M_GROUP) {
                add_sums(&to_second, &term[1][j]);
            }
        }
        if (i < IQ1_M_GROUP) {
            add_sums(&below, &term[0][i]);
        }
    }
    return found;
}

/* The scale that fits all codes of a block best, given those of its groups. */
static float fit_block(const encode_input *in, float square, const decoded_block *out, float unit) {
    float xq = 0, qq = 0;
    for (int i = 0; i < SUPER; i++) {
        const float x = in->x[i], q = values[out->code[i] >> 2][out->code[i] & 3] *
                                      (float)out->group_scale[i / IQ1_M_GROUP];
        const float w = in->importance != NULL ? in->importance[i] * sqrtf(square + x * x) : x * x;
        xq += w * q * x;
        qq += w * q * q;
    }
    return qq > 0 ? xq / qq : unit;
}

void choose_iq1_m(const encode_input *in, decoded_block *out) {
    float scale[SUPER / IQ1_M_GROUP] = {0}, max_scale = 0;
    bool negative[SUPER / EIGHT] = {false};
    const float square = 2 * sum_of_squares(in->x) / SUPER;
    for (int j = 0; j < SUPER / IQ1_M_GROUP; j++) {
        iq1_group g;
        iq1_split split;
        int index[2];
        out->group_scale[j] = 1;
        if (read_group(in, square, IQ1_M_GROUP * j, IQ1_M_GROUP, &g) < 1e-7f ||
            !split_iq1_m(&g, &split)) {
            continue;
        }
        scale[j] = choose_entries(&g, in->tables, &split, index);
        max_scale = scale[j] > max_scale ? scale[j] : max_scale;
        for (int k = 0; k < 2; k++) {
            negative[2 * j + k] = split.negative[k];
            put_codes(in->tables, index[k], out->code + IQ1_M_GROUP * j + EIGHT * k);
        }
    }
    if (max_scale == 0) {
        return;
    }
    const float unit = max_scale / 15, inverse = 1 / unit;
    for (int j = 0; j < SUPER / IQ1_M_GROUP; j++) {
        out->group_scale[j] = (int8_t)(2 * scale_code(inverse * scale[j]) + 1);
        for (int k = 2 * j; k < 2 * j + 2; k++) {
            put_delta(negative[k], EIGHT, out->code + EIGHT * k);
        }
    }
    out->scale = float_to_half(fit_block(in, square, out, unit) * 1.1125f);
}

void *tables_iq1(void) { return grid_points_new(iq1_grid, 2048, EIGHT, LEVELS, 3); }
