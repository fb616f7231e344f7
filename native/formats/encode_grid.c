/* The search for scales, signs and grid entries of the IQ2 and IQ3 types, with the bits of ggml's
 * quantize_row_iq2_*_impl and quantize_row_iq3_*_impl.
 *
 * A weight is scale * (2 code + 1), with a sign. Groups are searched one by one: for each of some
 * scales around that which maps the largest magnitude to the largest code, magnitudes are rounded,
 * entry by entry; where that is no entry of the grid, the neighbour with the least error is taken.
 * The best scale for the codes found is the least-squares one, and the entries are chosen once more
 * for it. At last the scales are rounded to 4 bits.
 *
 * One thing is not as in ggml, whose IQ3_S puts the groups after a group of zeros one place too
 * early, where another group is read: here they are where they are read. */
#include <math.h>
#include <string.h>

#include "encode_iq.h"
#include "grid_points.h"
#include "search.h"

enum { MAX_ENTRIES = 8, MAX_TRIES = 36 }; /* of a group */

/* Which entries are chosen once more for the scale found. */
enum { AGAIN_OFF_GRID, AGAIN_ALL_IF_OFF_GRID, AGAIN_ALL };

/* How the search of one type differs from that of the others. */
typedef struct {
    int group, weights, levels;
    int reach; /* tries: 2 levels - 1 + step * -reach .. reach is the largest value */
    float step;
    bool positive_start; /* the largest value is that of a search over evenly spaced codes */
    bool even_signs;
    int again;
    float spread;  /* weight of an error: importance * sqrt(spread * mean square + x^2) */
    float flat;    /* without importance: flat * mean square + x^2 */
    float nothing; /* below this the magnitudes of a group are zeros */
    float factor;  /* of the block's scale */
} grid_search;

typedef struct {
    const grid_points *points;
    float x[GROUP]; /* magnitudes; negative where the sign was flipped to make signs even */
    float weight[GROUP], root[GROUP], weighted[GROUP];
    uint8_t sign[GROUP / 8];
    float max;
} grid_group;

/* What is chosen for a group with some scales. */
typedef struct {
    float inverse[MAX_TRIES], scale[MAX_TRIES];
    int32_t index[MAX_ENTRIES][MAX_TRIES];
    bool on_grid[MAX_ENTRIES][MAX_TRIES]; /* magnitudes were rounded to the entry */
    float xq[MAX_TRIES], qq[MAX_TRIES];   /* sums: xq / qq is the best scale */
} grid_tries;

#define INLINE static inline __attribute__((always_inline))

/* Flips the sign that costs least of 8. */
static void make_even(grid_group *g, int first) {
    int least = first;
    float cost = INFINITY;
    for (int i = first; i < first + 8; i++) {
        const float flipped = g->weight[i] * g->x[i] * g->x[i];
        if (i == first || flipped < cost) {
            cost = flipped;
            least = i;
        }
    }
    g->x[least] = -g->x[least];
    g->sign[first / 8] ^= (uint8_t)(1 << (least - first));
}

INLINE void read_group(const grid_search *s, const encode_input *in, float square, int first,
                       grid_group *g) {
    g->points = in->tables;
    for (int i = 0; i < s->group; i++) {
        const float x = in->x[first + i];
        g->weight[i] = in->importance != NULL ? in->importance[first + i] * sqrtf(square + x * x)
                                              : s->flat * square + x * x;
        g->root[i] = sqrtf(g->weight[i]);
        g->x[i] = x >= 0 ? x : -x;
    }
    for (int i = 0; i < s->group; i += 8) {
        int n_negative = 0;
        g->sign[i / 8] = 0;
        for (int j = 0; j < 8; j++) {
            const int negative = in->x[first + i + j] < 0;
            g->sign[i / 8] |= (uint8_t)(negative << j);
            n_negative += negative;
        }
        if (s->even_signs && n_negative % 2 != 0) {
            make_even(g, i);
        }
    }
    g->max = g->x[0];
    for (int i = 0; i < s->group; i++) {
        g->max = g->x[i] > g->max ? g->x[i] : g->max;
        g->weighted[i] = g->weight[i] * g->x[i];
    }
}

/* The entries with the least errors for scales t .. t + LANES - 1. */
INLINE lane_ints nearest_entries(const grid_search *s, const grid_group *g, int k,
                                 const uint16_t *list, const float *scale) {
    lanes term[TERMS];
    for (int i = 0; i < s->weights; i++) {
        const float x = g->x[s->weights * k + i], root = g->root[s->weights * k + i];
        for (int c = 0; c < s->levels; c++) {
            const lanes error = load_lanes(scale) * (float)(2 * c + 1) - x;
            term[TERMS / s->weights * i + c] = root * error * error;
        }
    }
    return least_entry(g->points, s->weights, list, term);
}

/* The points of the lattice that the magnitudes of entry k are rounded to. */
INLINE void round_entry(const grid_search *s, const grid_group *g, int k, int n,
                        const float *inverse, int32_t *point) {
    memset(point, 0, (size_t)n * sizeof *point);
    for (int i = 0; i < s->weights; i++) {
        const float x = g->x[s->weights * k + i];
        for (int t = 0; t < n; t++) {
            const int32_t nearest = nearest_int(0.5f * (inverse[t] * x - 1));
            point[t] = point[t] * s->levels + clamped(nearest, 0, s->levels - 1);
        }
    }
}

INLINE void sum_up(const grid_search *s, const grid_group *g, int n, grid_tries *tries) {
    for (int t = 0; t < n; t += LANES) {
        lanes xq = {0}, qq = {0};
        for (int i = 0; i < s->group; i++) {
            lane_ints code;
            for (int j = 0; j < LANES; j++) {
                const int32_t entry = tries->index[i / s->weights][t + j];
                code[j] = g->points->term[s->weights * entry + i % s->weights];
            }
            code &= TERMS / s->weights - 1;
            const lanes q = __builtin_convertvector(2 * code + 1, lanes);
            xq += g->weighted[i] * q;
            qq += g->weight[i] * q * q;
        }
        memcpy(tries->xq + t, &xq, sizeof xq);
        memcpy(tries->qq + t, &qq, sizeof qq);
    }
}

/* Entry k of a group for n scales. */
INLINE void choose_entry(const grid_search *s, const grid_group *g, int k, int n, int padded,
                         grid_tries *tries) {
    int32_t point[MAX_TRIES], *index = tries->index[k];
    round_entry(s, g, k, padded, tries->inverse, point);
    for (int t = 0, end; t < n; t = end) { /* scales with the same point */
        const int32_t place = g->points->place[point[t]];
        for (end = t; end < n && point[end] == point[t]; end++) {
            tries->on_grid[k][end] = place >= 0;
            index[end] = place;
        }
        for (int i = t; i < end && place < 0; i += LANES) {
            const lane_ints found =
                nearest_entries(s, g, k, g->points->lists + ~place, tries->scale + i);
            memcpy(index + i, &found, sizeof found);
        }
    }
}

/* Chooses the entries of a group for n scales; those that are on the grid stay if they may. */
INLINE void choose_entries(const grid_search *s, const grid_group *g, int n, bool may_stay,
                           grid_tries *tries) {
    const int padded = (n + 2 * (LANES - 1)) / LANES * LANES; /* lanes start at any scale */
    for (int t = n; t < padded; t++) {
        tries->inverse[t] = tries->inverse[n - 1];
        tries->scale[t] = tries->scale[n - 1];
    }
    for (int k = 0; k < s->group / s->weights; k++) {
        if (!may_stay || !tries->on_grid[k][0]) {
            choose_entry(s, g, k, n, padded, tries);
        }
        for (int t = n; t < padded; t++) {
            tries->index[k][t] = tries->index[k][n - 1];
        }
    }
    sum_up(s, g, n, tries);
}

INLINE bool chosen_again(const grid_search *s, const grid_tries *tries) {
    bool again = s->again == AGAIN_ALL;
    for (int k = 0; k < s->group / s->weights; k++) {
        again |= !tries->on_grid[k][0];
    }
    return again;
}

/* Finds the scale of a group and, as the first of the tries, its entries. False: it is nothing. */
INLINE bool search(const grid_search *s, const grid_group *g, float *group_scale,
                   grid_tries *chosen) {
    const int top = 2 * s->levels - 1;
    float max = g->max, scale = max / (float)top, best = 0;
    *group_scale = 0;
    if (max < s->nothing) {
        return false;
    }
    if (s->positive_start) {
        uint8_t unused[GROUP];
        const search_group values = {g->x, g->weight, s->group};
        scale = search_positive_scale(&values, s->levels + 1, unused);
        max = scale * (float)s->levels;
        if (scale <= 0) {
            return false;
        }
    }
    const int n = 2 * s->reach + 1;
    grid_tries tries;
    for (int t = 0; t < n; t++) {
        tries.inverse[t] = ((float)top + (float)(t - s->reach) * s->step) / max;
        tries.scale[t] = 1 / tries.inverse[t];
    }
    choose_entries(s, g, n, false, &tries);
    int found = -1;
    for (int t = 0; t < n; t++) {
        if (tries.qq[t] > 0 && tries.xq[t] * tries.xq[t] > best * tries.qq[t]) {
            scale = tries.xq[t] / tries.qq[t];
            best = scale * tries.xq[t];
            found = t;
        }
    }
    for (int k = 0; k < s->group / s->weights; k++) {
        chosen->index[k][0] = found < 0 ? 0 : tries.index[k][found];
        chosen->on_grid[k][0] = found < 0 ? s->again == AGAIN_OFF_GRID : tries.on_grid[k][found];
    }
    if (scale > 0 && chosen_again(s, chosen)) {
        chosen->inverse[0] = 1 / scale;
        chosen->scale[0] = scale;
        choose_entries(s, g, 1, s->again == AGAIN_OFF_GRID, chosen);
        scale = chosen->qq[0] > 0 ? chosen->xq[0] / chosen->qq[0] : scale;
    }
    *group_scale = scale;
    return true;
}

INLINE void choose(const grid_search *s, const encode_input *in, decoded_grid *out) {
    const int n_entries = s->group / s->weights;
    const float square = s->spread * sum_of_squares(in->x) / SUPER;
    float scale[SUPER / 16], max_scale = 0;
    for (int j = 0; j < SUPER / s->group; j++) {
        grid_group g;
        grid_tries chosen;
        read_group(s, in, square, s->group * j, &g);
        if (!search(s, &g, &scale[j], &chosen)) {
            continue;
        }
        const uint8_t flip = scale[j] < 0 ? 255 : 0;
        scale[j] = fabsf(scale[j]);
        max_scale = scale[j] > max_scale ? scale[j] : max_scale;
        for (int k = 0; k < n_entries; k++) {
            out->index[n_entries * j + k] = (uint16_t)chosen.index[k][0];
        }
        for (int k = 0; k < s->group / 8; k++) {
            out->sign[s->group / 8 * j + k] = g.sign[k] ^ flip;
        }
    }
    if (max_scale == 0) {
        return;
    }
    const float unit = max_scale / 31, inverse = 1 / unit;
    out->scale = float_to_half(unit * s->factor);
    for (int j = 0; j < SUPER / s->group; j++) {
        out->group_scale[j] = (uint8_t)clamped(nearest_int(0.5f * (inverse * scale[j] - 1)), 0, 15);
    }
}

static const grid_search iq2_xxs = {.group = 32,
                                    .weights = 8,
                                    .levels = 3,
                                    .reach = 6,
                                    .step = 0.1f,
                                    .positive_start = true,
                                    .even_signs = true,
                                    .again = AGAIN_ALL,
                                    .spread = 1,
                                    .nothing = 1e-15f,
                                    .factor = 1};
static const grid_search iq2_xs = {.group = 16,
                                   .weights = 8,
                                   .levels = 3,
                                   .reach = 9,
                                   .step = 0.1f,
                                   .even_signs = true,
                                   .again = AGAIN_OFF_GRID,
                                   .spread = 1,
                                   .nothing = 1e-15f,
                                   .factor = 1};
static const grid_search iq2_s = {.group = 16,
                                  .weights = 8,
                                  .levels = 3,
                                  .reach = 9,
                                  .step = 0.1f,
                                  .again = AGAIN_OFF_GRID,
                                  .spread = 2,
                                  .flat = 0.25f,
                                  .nothing = 1e-8f,
                                  .factor = 0.9875f};
static const grid_search iq3_xxs = {.group = 32,
                                    .weights = 4,
                                    .levels = 8,
                                    .reach = 15,
                                    .step = 0.2f,
                                    .even_signs = true,
                                    .again = AGAIN_OFF_GRID,
                                    .spread = 2,
                                    .nothing = 1e-8f,
                                    .factor = 1.0125f};
static const grid_search iq3_s = {.group = 32,
                                  .weights = 4,
                                  .levels = 8,
                                  .reach = 9,
                                  .step = 0.2f,
                                  .again = AGAIN_ALL_IF_OFF_GRID,
                                  .spread = 2,
                                  .nothing = 0x1p-149f, /* the least float: only zeros */
                                  .factor = 1.033f};

void choose_iq2_xxs(const encode_input *in, decoded_grid *out) { choose(&iq2_xxs, in, out); }
void choose_iq2_xs(const encode_input *in, decoded_grid *out) { choose(&iq2_xs, in, out); }
void choose_iq2_s(const encode_input *in, decoded_grid *out) { choose(&iq2_s, in, out); }
void choose_iq3_xxs(const encode_input *in, decoded_grid *out) { choose(&iq3_xxs, in, out); }
void choose_iq3_s(const encode_input *in, decoded_grid *out) { choose(&iq3_s, in, out); }

static void *tables_new(int32_t layout, int levels, int shells) {
    const grid_info *grid = grid_of(layout);
    return grid_points_new(grid->entries, 1 << grid->index_bits, grid->weights, levels, shells);
}

void *tables_iq2_xxs(void) { return tables_new(EDGE_LAYOUT_G8X8B32, 3, 2); }
void *tables_iq2_xs(void) { return tables_new(EDGE_LAYOUT_G9X8B16, 3, 2); }
void *tables_iq2_s(void) { return tables_new(EDGE_LAYOUT_G10X8B16, 3, 1); }
void *tables_iq3_xxs(void) { return tables_new(EDGE_LAYOUT_G8X4B32, 8, 2); }
void *tables_iq3_s(void) { return tables_new(EDGE_LAYOUT_G9X4B32, 8, 3); }
