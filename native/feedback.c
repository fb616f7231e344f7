/* Rounding with error feedback: the columns of a weight from left to right, each error passed on to
 * the columns that are not rounded yet (GPTQ, Frantar et al. 2022; in the form of LDLQ, Chee et al.
 * 2023).
 *
 * With H = R R^T, the second moments of a weight's inputs, R upper triangular, an error e of a row
 * costs |e R|^2. Column j of e R is R[j,j] * (e[j] + sum of e[i] * R[i,j] / R[j,j] over i < j): so
 * the sum is added to the weight before it is rounded, and what remains costs R[j,j]^2 times its
 * square. `feedback` holds R[i,j] / R[j,j], `cost` R[j,j]^2.
 *
 * Columns of a group share a scale. Several scales are tried for a group, and the one with the
 * least cost after the feedback inside the group is kept.
 *
 * Eight rows are rounded at a time, one in each lane. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "encode.h"
#include "error.h"
#include "panels.h"
#include "tables.h"
#include "threads.h"

enum {
    LANES = 8,
    QUADS = LANES / 4,
    TILE = SUPER, /* columns of a call, at most */
    UNIT = 8      /* columns of a grid that share signs */
};

typedef float lanes[LANES];
typedef float floats4 __attribute__((vector_size(16)));
typedef int32_t ints4 __attribute__((vector_size(16)));

/* b where the mask is 0, a where it is -1. */
static inline floats4 select4(ints4 mask, floats4 a, floats4 b) {
    return (floats4)((mask & (ints4)a) | (~mask & (ints4)b));
}

/* What the columns of a group share. */
typedef struct {
    uint16_t scale, min; /* as in decoded_block */
    int16_t integer, min_integer;
    bool negative; /* delta of an IQ1 group */
} setting;

/* Facts of a format, as rounding needs them. */
typedef struct {
    const format_info *format;
    const layout_info *layout; /* of a type with a grid the compact one */
    int32_t table;
    int group;                     /* columns of a setting */
    int low, high, step, min_high; /* integers of a group: low, low + step, .. high; high 0: none */
    int n_proposals, n_refits;     /* settings that are tried for a group */
    int n_block_refits;            /* floats that are tried for a super-block, after its first */
    float value[256];              /* of a code, as uint8_t */
    /* Types without a grid: the values, rising, and their codes. From between[i] on, level i + 1 is
     * nearer than level i. */
    int n_levels;
    bool even; /* the levels are evenly spaced */
    float level[256], between[256];
    int8_t code[256];
    /* Types with a grid. */
    const uint16_t *entries;
    int n_entries, weights, n_values; /* weights of an entry: 4 or 8; values that each can have */
    bool even_signs, is_iq1;
    bool shares_delta;    /* IQ1: a group has one delta, not each entry */
    uint8_t used[2][256]; /* bytes that are the low, the high one of an entry */
    int n_used[2];
} rounding;

struct tile;

typedef struct {
    const rounding *r;
    const edge_encoder *encoder;
    const edge_feedback *f;
    uint8_t *dst;
    struct tile *tiles; /* of each thread */
    uint32_t n_tiles;
    _Atomic int64_t next; /* row that no thread has taken */
    _Atomic int64_t bad;  /* first element that cannot be encoded, row * width + column; -1: none */
} job;

/* A group rounded with one setting per lane. */
typedef struct {
    setting set[LANES];
    lanes scale, min, loss;
    lanes error[SUPER];         /* weight - value */
    uint8_t code[SUPER][LANES]; /* with a grid: of the magnitude, the sign above it */
    uint16_t index[SUPER / 4][LANES];
} trial;

/* Blocks rounded with one choice of their floats. */
typedef struct {
    decoded_block block[LANES];
    decoded_grid grid[LANES];
    lanes error[SUPER], loss;
} attempt;

/* A tile of eight rows. */
typedef struct tile {
    job *job;
    lanes weight[TILE];
    lanes x[TILE];     /* weights with all feedback from outside the block */
    lanes base[TILE];  /* and from outside the group */
    lanes error[TILE]; /* of columns that are rounded */
    trial best, next;  /* of a group */
    attempt now, kept; /* of a block */
} tile;

/* ---- facts ------------------------------------------------------------------------------- */

/* Which integers the bits of a type can hold. */
static void ranges_of(const format_info *format, rounding *r) {
    static const struct {
        int type, low, high, step, min_high;
    } table[] = {
        {10, 0, 15, 1, 15},    /* Q2_K */
        {11, -32, 31, 1, 0},   /* Q3_K */
        {12, 0, 63, 1, 63},    /* Q4_K */
        {13, 0, 63, 1, 63},    /* Q5_K */
        {14, -127, 127, 1, 0}, /* Q6_K */
        {23, -32, 31, 1, 0},   /* IQ4_XS */
        {19, 1, 15, 2, 0},     /* IQ1_S */
        {29, 1, 15, 2, 0},     /* IQ1_M */
        {40, 0, 0xee, 1, 0},   /* NVFP4: bytes */
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (table[i].type == format->type) {
            r->low = table[i].low, r->high = table[i].high, r->step = table[i].step;
            r->min_high = table[i].min_high;
        }
    }
    if (format->store_grid != NULL) {
        r->low = 1, r->high = 31, r->step = 2;
    }
}

static void levels_of(rounding *r) {
    int8_t values[256];
    int n = panel_values(r->format->layout, r->table, values);
    if (r->format->type == 34 || r->format->type == 35) {
        n = 3; /* TQ1_0, TQ2_0 */
    }
    for (int code = 0; code < n; code++) {
        r->value[code] = values[code];
        int at = 0;
        while (at < r->n_levels && r->level[at] < values[code]) {
            at++;
        }
        if (at < r->n_levels && r->level[at] == values[code]) {
            continue;
        }
        memmove(r->level + at + 1, r->level + at, (size_t)(r->n_levels - at) * sizeof *r->level);
        memmove(r->code + at + 1, r->code + at, (size_t)(r->n_levels - at));
        r->level[at] = values[code];
        r->code[at] = (int8_t)code;
        r->n_levels++;
    }
    r->even = true;
    for (int i = 0; i + 1 < r->n_levels; i++) {
        r->between[i] = (r->level[i] + r->level[i + 1]) / 2;
        r->even = r->even && r->level[i + 1] - r->level[i] == r->level[1] - r->level[0];
    }
}

static void grid_facts(rounding *r, const uint16_t *entries, int n, int weights) {
    r->entries = entries, r->n_entries = n, r->weights = weights;
    r->n_values = weights == 4 ? 8 : 3;
    for (int half = 0; half < 2; half++) {
        bool seen[256] = {false};
        for (int e = 0; e < n; e++) {
            seen[entries[e] >> (8 * half) & 255] = true;
        }
        for (int b = 0; b < 256; b++) {
            if (seen[b]) {
                r->used[half][r->n_used[half]++] = (uint8_t)b;
            }
        }
    }
    for (int code = 0; code < 16; code++) {
        r->value[code] = (float)(code_tables[r->table].shifted[code] - code_tables[r->table].zero);
    }
}

static void facts_of(const format_info *format, rounding *r) {
    memset(r, 0, sizeof *r);
    r->format = format;
    r->table = format->table;
    r->layout = &layout_table[format->store_grid != NULL ? format->compact : format->layout];
    r->group = r->layout->group;
    ranges_of(format, r);
    const bool is_super = format->block == SUPER && r->high != 0;
    if (format->block == SUPER && !is_super) {
        r->group = SUPER; /* one scale for all */
    }
    if (format->store_grid != NULL) {
        const grid_info *grid = grid_of(format->compact);
        grid_facts(r, grid->entries, 1 << grid->index_bits, grid->weights);
        r->even_signs = format->type != 22 && format->type != 21; /* IQ2_S, IQ3_S */
    } else if (r->table == EDGE_TABLE_IQ1) {
        grid_facts(r, iq1_grid, 2048, 8);
        r->is_iq1 = true;
        r->shares_delta = format->type == 19;
    } else {
        levels_of(r);
    }
    r->n_proposals = r->is_iq1 ? 3 : r->entries != NULL ? 5 : 9;
    r->n_refits = r->group == SUPER ? 3 : 1;
    r->n_block_refits = is_super;
}

/* ---- settings ---------------------------------------------------------------------------- */

static float scale_of(const rounding *r, const setting *set) {
    return code_scale(r->layout, r->table, set->scale, r->high == 0 ? 1 : set->integer);
}

/* 0 for scales that are zero or denormal. */
static float inverse_of(float scale) { return fabsf(scale) > 0x1p-126f ? 1 / scale : 0; }

static float min_of(const rounding *r, const setting *set) {
    return code_min(r->layout, set->min, set->min_integer);
}

static int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

/* The settings whose scale and minimum are nearest to these. Scales of 8 bits stay. */
static void set_nearest(const rounding *r, float scale, float min, setting *set) {
    const scale_kind kind = r->layout->kind;
    if (kind == SCALE_H || (kind == SCALE_B && r->high == 0)) {
        const uint16_t half = float_to_half(scale), half_min = float_to_half(min);
        set->scale = half_is_finite(half) ? half : set->scale;
        set->min = r->layout->has_min && half_is_finite(half_min) ? half_min : set->min;
    } else if (kind == SCALE_B || kind == SCALE_GRID) {
        const float one = code_scale(r->layout, r->table, set->scale, 1);
        const float ratio = one != 0 ? scale / one : INFINITY;
        if (fabsf(ratio) < 1000) {
            const int steps = (int)lrintf((ratio - (float)r->low) / (float)r->step);
            set->integer = (int16_t)clamp(r->low + r->step * steps, r->low, r->high);
        }
        const float one_min = code_min(r->layout, set->min, 1);
        const float min_ratio = r->layout->has_min && one_min != 0 ? min / one_min : INFINITY;
        if (fabsf(min_ratio) < 1000) {
            set->min_integer = (int16_t)clamp((int)lrintf(min_ratio), 0, r->min_high);
        }
    }
}

/* The next float of 8 bits, up or down: see u16 in layouts.h. From 16 on mantissas are 8 to 15. */
static int next_byte(int byte, int up) {
    if (up) {
        return byte < 0xee ? (byte + 1) % 16 == 0 ? byte + 9 : byte + 1 : byte;
    }
    return byte > 0 ? byte > 16 && byte % 16 == 8 ? byte - 9 : byte - 1 : byte;
}

/* The i-th variation of what the plain search chose; the 0th is that itself. */
static void propose(const rounding *r, int i, const setting *base, setting *set) {
    static const float factors[] = {1, 0.92f, 1.04f, 0.96f, 1.08f, 0.88f, 0.84f, 1.12f, 0.8f};
    const int up = i % 2 == 0, steps = (i + 1) / 2;
    *set = *base;
    if (i == 0) {
        return;
    }
    if (r->layout->kind == SCALE_U) {
        for (int n = 0; n < steps; n++) {
            set->integer = (int16_t)next_byte(set->integer, up);
        }
        return;
    }
    if (r->layout->kind == SCALE_E) { /* a power of two: the next one */
        if (steps == 1 && base->scale >= 0x100 && base->scale < 0x7f00) {
            set->scale = (uint16_t)(base->scale + (up ? 0x80 : -0x80));
        }
        return;
    }
    /* The middle of the range of codes stays where it is. */
    const float scale = scale_of(r, base), min = min_of(r, base);
    const float middle = r->layout->has_min ? (float)(r->n_levels - 1) / 2 : 0;
    set_nearest(r, scale * factors[i], min + scale * (1 - factors[i]) * middle, set);
    if (r->high != 0 && set->integer == base->integer) {
        const int by = r->step * (up ? steps : -steps);
        set->integer = (int16_t)clamp(base->integer + by, r->low, r->high);
    }
}

/* ---- rounding ---------------------------------------------------------------------------- */

/* sum += the errors of columns first .. end - 1, as far as column j is to make up for them. */
static inline void add_feedback(const tile *t, int j, const lanes *error, int first, int end,
                                lanes sum) {
    const float *feedback = t->job->f->shares + (int64_t)j * t->job->f->width + first;
    lanes own;
    memcpy(own, sum, sizeof own);
    for (int i = 0; i < end - first; i++) {
        const float share = feedback[i];
        for (int l = 0; l < LANES; l++) {
            own[l] += share * error[i][l];
        }
    }
    memcpy(sum, own, sizeof own);
}

/* The error and the cost of column i of the group at `first`. */
static inline void account(const tile *t, trial *out, int first, int i, const lanes target,
                           const lanes value) {
    const float cost = t->job->f->costs[first + i];
    for (int l = 0; l < LANES; l++) {
        const float off = target[l] - value[l];
        out->loss[l] += cost * off * off;
        out->error[i][l] = t->weight[first + i][l] - value[l];
    }
}

/* The levels that are nearest to x, in multiples of the scale: their numbers and values. */
static void nearest_levels(const rounding *r, const lanes x, int32_t at[LANES], lanes value) {
    const float start = r->level[0], step = r->level[1] - start, last = (float)(r->n_levels - 1);
    const floats4 zero = {0};
    for (int q = 0; q < QUADS; q++) {
        floats4 level, of_level = zero + start;
        ints4 number = {0};
        memcpy(&level, x + 4 * q, sizeof level);
        if (r->even) {
            level = (level - start) * (1 / step);
            level = select4(level > 0, level, zero); /* 0 for NaN, too */
            level = select4(level < last, level, zero + last);
            number = __builtin_convertvector(level + 0.5f, ints4);
            of_level += __builtin_convertvector(number, floats4) * step;
        } else {
            for (int n = 0; n + 1 < r->n_levels; n++) {
                const ints4 above = level > r->between[n];
                number -= above;
                of_level = select4(above, zero + r->level[n + 1], of_level);
            }
        }
        memcpy(at + 4 * q, &number, sizeof number);
        memcpy(value + 4 * q, &of_level, sizeof of_level);
    }
}

/* Rounds a group of a type without a grid. */
static void round_levels(const tile *t, int first, trial *out) {
    const rounding *r = t->job->r;
    lanes inverse;
    for (int l = 0; l < LANES; l++) {
        inverse[l] = inverse_of(out->scale[l]);
    }
    for (int i = 0; i < r->group; i++) {
        lanes target, scaled, value;
        int32_t at[LANES];
        memcpy(target, t->base[first + i], sizeof target);
        add_feedback(t, first + i, (const lanes *)out->error, first, first + i, target);
        for (int l = 0; l < LANES; l++) {
            scaled[l] = (target[l] - out->min[l]) * inverse[l];
        }
        nearest_levels(r, scaled, at, value);
        for (int l = 0; l < LANES; l++) {
            out->code[i][l] = (uint8_t)r->code[at[l]];
            const float product = value[l] * out->scale[l];
            value[l] = product + out->min[l];
        }
        account(t, out, first, i, target, value);
    }
}

/* ---- grids ------------------------------------------------------------------------------- */

/* The entry that is nearest to x[0 .. weights - 1], in multiples of the scale, when an error of
 * column i costs cost[i] times its square: into index, where it beats `least`. value: of the codes;
 * index of the grid's first entry: `offset`. */
static void nearest_entry(const rounding *r, const lanes *x, const float *cost, const lanes *value,
                          int offset, floats4 least[QUADS], ints4 index[QUADS]) {
    floats4 byte[2][256][QUADS]; /* costs of the weights in the low and the high byte of an entry */
    const int bits = 16 / r->weights, mask = (1 << bits) - 1, n = r->weights / 2;
    for (int half = 0; half < 2; half++) {
        lanes single[4][UNIT];
        for (int i = 0; i < n; i++) {
            const float c = cost[half * n + i];
            for (int code = 0; code < r->n_values; code++) {
                for (int l = 0; l < LANES; l++) {
                    const float v = value[code][l];
                    single[i][code][l] = c * v * (v - 2 * x[half * n + i][l]);
                }
            }
        }
        for (int u = 0; u < r->n_used[half]; u++) {
            const int b = r->used[half][u];
            lanes sum = {0};
            for (int i = 0; i < n; i++) {
                for (int l = 0; l < LANES; l++) {
                    sum[l] += single[i][b >> (bits * i) & mask][l];
                }
            }
            memcpy(byte[half][b], sum, sizeof sum);
        }
    }
    floats4 best[QUADS];
    ints4 where[QUADS];
    memcpy(best, least, sizeof best);
    memcpy(where, index, sizeof where);
    for (int e = 0; e < r->n_entries; e++) {
        const floats4 *low = byte[0][r->entries[e] & 255], *high = byte[1][r->entries[e] >> 8];
        for (int q = 0; q < QUADS; q++) {
            const floats4 sum = low[q] + high[q];
            const ints4 less = sum < best[q];
            where[q] = (less & (e + offset)) | (~less & where[q]);
            best[q] = select4(less, sum, best[q]);
        }
    }
    memcpy(least, best, sizeof best);
    memcpy(index, where, sizeof where);
}

/* The values of the codes of a weight; of IQ1 with the delta of each lane. */
static void values_of(const rounding *r, const uint8_t sign[LANES], lanes value[UNIT]) {
    for (int code = 0; code < r->n_values; code++) {
        for (int l = 0; l < LANES; l++) {
            value[code][l] = r->value[code + (r->is_iq1 && sign[l] != 0 ? 4 : 0)];
        }
    }
}

/* Entries for the columns from column i of the group on; of IQ1_M their deltas, as signs. */
static void choose_entry(const tile *t, int first, int i, const lanes *x, uint8_t sign[LANES],
                         trial *out) {
    const rounding *r = t->job->r;
    const float *cost = t->job->f->costs + first + i;
    lanes scaled[UNIT], value[UNIT];
    floats4 least[QUADS];
    ints4 index[QUADS] = {{0}};
    for (int q = 0; q < QUADS; q++) {
        least[q] = (floats4){INFINITY, INFINITY, INFINITY, INFINITY};
    }
    for (int l = 0; l < LANES; l++) {
        const float inverse = inverse_of(out->scale[l]);
        for (int j = 0; j < r->weights; j++) {
            scaled[j][l] = x[j][l] * (!r->is_iq1 && sign[l] >> j & 1 ? -inverse : inverse);
        }
    }
    values_of(r, sign, value);
    nearest_entry(r, (const lanes *)scaled, cost, (const lanes *)value, 0, least, index);
    const bool both = r->is_iq1 && !r->shares_delta;
    if (both) {
        memset(sign, 255, LANES);
        values_of(r, sign, value);
        nearest_entry(r, (const lanes *)scaled, cost, (const lanes *)value, r->n_entries, least,
                      index);
    }
    int32_t found[LANES];
    memcpy(found, index, sizeof found);
    for (int l = 0; l < LANES; l++) {
        if (both) {
            sign[l] = found[l] >= r->n_entries ? 255 : 0;
        }
        out->index[i / r->weights][l] = (uint16_t)(found[l] % r->n_entries);
    }
}

/* Rounds the columns of one entry. */
static void round_entry(const tile *t, int first, int i, lanes *x, uint8_t sign[LANES],
                        trial *out) {
    const rounding *r = t->job->r;
    const int bits = 16 / r->weights, mask = (1 << bits) - 1, sign_bit = r->weights == 4 ? 3 : 2;
    choose_entry(t, first, i, (const lanes *)x, sign, out);
    for (int j = 0; j < r->weights; j++) {
        lanes value;
        add_feedback(t, first + i + j, (const lanes *)out->error + i, first + i, first + i + j,
                     x[j]);
        for (int l = 0; l < LANES; l++) {
            const int size = r->entries[out->index[i / r->weights][l]] >> (bits * j) & mask;
            out->code[i + j][l] = (uint8_t)(size | (sign[l] >> j & 1) << sign_bit);
            value[l] = out->scale[l] * r->value[out->code[i + j][l]];
        }
        account(t, out, first, i + j, x[j], value);
    }
}

/* Signs of x; where `even`, the number of negatives is made so, by turning the one from `from` on
 * whose turn costs least. */
static void signs_of(const lanes *x, const float *cost, bool even, int from, uint8_t sign[LANES]) {
    for (int l = 0; l < LANES; l++) {
        unsigned negative = sign[l] & ((1u << from) - 1), count = 0;
        int cheapest = from;
        for (int j = from; j < UNIT; j++) {
            negative |= (unsigned)(x[j][l] < 0) << j;
            const float least = cost[cheapest] * x[cheapest][l] * x[cheapest][l];
            cheapest = cost[j] * x[j][l] * x[j][l] < least ? j : cheapest;
        }
        for (int j = 0; j < UNIT; j++) {
            count += negative >> j & 1;
        }
        sign[l] = (uint8_t)(even && count % 2 == 1 ? negative ^ 1u << cheapest : negative);
    }
}

/* Columns that share signs: one or two entries. */
static void round_unit(const tile *t, int first, int i, trial *out) {
    const rounding *r = t->job->r;
    lanes x[UNIT];
    uint8_t sign[LANES] = {0}, of_entry[LANES];
    for (int j = 0; j < UNIT; j += r->weights) {
        for (int k = j; k < UNIT; k++) {
            memcpy(x[k], t->base[first + i + k], sizeof *x);
            add_feedback(t, first + i + k, (const lanes *)out->error, first, first + i + j, x[k]);
        }
        if (!r->is_iq1) {
            signs_of((const lanes *)x, t->job->f->costs + first + i, r->even_signs, j, sign);
        } else if (r->shares_delta) {
            for (int l = 0; l < LANES; l++) {
                sign[l] = out->set[l].negative ? 255 : 0;
            }
        }
        for (int l = 0; l < LANES; l++) {
            of_entry[l] = (uint8_t)(sign[l] >> j);
        }
        round_entry(t, first, i + j, x + j, of_entry, out);
    }
}

/* ---- groups ------------------------------------------------------------------------------ */

/* Rounds a group with out->set. */
static void round_group(const tile *t, int first, trial *out) {
    const rounding *r = t->job->r;
    for (int l = 0; l < LANES; l++) {
        out->scale[l] = scale_of(r, &out->set[l]);
        out->min[l] = min_of(r, &out->set[l]);
        out->loss[l] = 0;
    }
    if (r->entries == NULL) {
        round_levels(t, first, out);
        return;
    }
    for (int i = 0; i < r->group; i += UNIT) {
        round_unit(t, first, i, out);
    }
}

/* Takes the lanes of `from` that are better. */
static void keep_better(const rounding *r, const trial *from, trial *to) {
    for (int l = 0; l < LANES; l++) {
        if (from->loss[l] < to->loss[l]) {
            to->set[l] = from->set[l];
            to->scale[l] = from->scale[l];
            to->min[l] = from->min[l];
            to->loss[l] = from->loss[l];
            for (int i = 0; i < r->group; i++) {
                to->error[i][l] = from->error[i][l];
                to->code[i][l] = from->code[i][l];
            }
            for (int i = 0; r->entries != NULL && i < r->group / r->weights; i++) {
                to->index[i][l] = from->index[i][l];
            }
        }
    }
}

/* The scale and the minimum of the least cost for given codes, by least squares. value: of the
 * codes; one: what the minimum is multiplied by. Lanes without an answer keep theirs. */
static void least_squares(const tile *t, const lanes *x, int first, int n, const lanes *value,
                          const lanes *one, lanes scale, lanes min) {
    lanes aa = {0}, ab = {0}, ac = {0}, bb = {0}, bc = {0};
    const bool has_min = t->job->r->layout->has_min;
    for (int i = 0; i < n; i++) {
        const float cost = t->job->f->costs[first + i];
        lanes a, b, c;
        memcpy(a, value[i], sizeof a);
        memcpy(b, one[i], sizeof b);
        memcpy(c, x[first + i], sizeof c);
        add_feedback(t, first + i, value, first, first + i, a);
        if (has_min) {
            add_feedback(t, first + i, one, first, first + i, b);
        }
        add_feedback(t, first + i, (const lanes *)t->weight + first, first, first + i, c);
        for (int l = 0; l < LANES; l++) {
            aa[l] += cost * a[l] * a[l];
            ab[l] += cost * a[l] * b[l];
            ac[l] += cost * a[l] * c[l];
            bb[l] += cost * b[l] * b[l];
            bc[l] += cost * b[l] * c[l];
        }
    }
    for (int l = 0; l < LANES; l++) {
        const float det = aa[l] * bb[l] - ab[l] * ab[l];
        if (has_min && det > 1e-6f * aa[l] * bb[l]) {
            scale[l] = (ac[l] * bb[l] - bc[l] * ab[l]) / det;
            min[l] = (bc[l] * aa[l] - ac[l] * ab[l]) / det;
        } else if (!has_min && aa[l] > 0) {
            scale[l] = ac[l] / aa[l];
        }
    }
}

/* Settings of the least cost for the codes of `from`. */
static void refit(const tile *t, int first, const trial *from, trial *out) {
    const rounding *r = t->job->r;
    lanes value[SUPER], one[SUPER], scale, min;
    for (int i = 0; i < r->group; i++) {
        for (int l = 0; l < LANES; l++) {
            value[i][l] = r->value[from->code[i][l]];
            one[i][l] = 1;
        }
    }
    memcpy(scale, from->scale, sizeof scale);
    memcpy(min, from->min, sizeof min);
    least_squares(t, (const lanes *)t->base, first, r->group, (const lanes *)value,
                  (const lanes *)one, scale, min);
    for (int l = 0; l < LANES; l++) {
        out->set[l] = from->set[l];
        set_nearest(r, scale[l], min[l], &out->set[l]);
    }
}

/* The setting of a group as the blocks now say. */
static setting chosen(const tile *t, int l, int i_group) {
    const decoded_block *block = &t->now.block[l];
    if (t->job->r->format->store_grid != NULL) {
        const int s = t->now.grid[l].group_scale[i_group];
        return (setting){t->now.grid[l].scale, 0, (int16_t)(2 * s + 1), 0, false};
    }
    const bool negative = t->job->r->shares_delta && block->code[i_group * GROUP] & 4;
    const int8_t integer = block->group_scale[i_group];
    const bool is_byte = t->job->r->layout->kind == SCALE_U;
    return (setting){block->scale, block->min, is_byte ? (uint8_t)integer : integer,
                     block->group_min[i_group], negative};
}

/* Puts the best of a group into the blocks. */
static void commit(tile *t, int column, int i_group) {
    const rounding *r = t->job->r;
    const trial *best = &t->best;
    const int at = i_group * r->group; /* in the block */
    memcpy(t->error + column, best->error, (size_t)r->group * sizeof *best->error);
    memcpy(t->now.error + at, best->error, (size_t)r->group * sizeof *best->error);
    for (int l = 0; l < LANES; l++) {
        const setting *set = &best->set[l];
        t->now.loss[l] += best->loss[l];
        if (r->format->store_grid != NULL) {
            decoded_grid *grid = &t->now.grid[l];
            grid->group_scale[i_group] = (uint8_t)(set->integer / 2);
            for (int i = 0; i < r->group / r->weights; i++) {
                grid->index[at / r->weights + i] = best->index[i][l];
            }
            const int sign_bit = r->weights == 4 ? 3 : 2;
            for (int i = 0; i < r->group; i++) {
                uint8_t *byte = &grid->sign[(at + i) / 8];
                const int bit = (at + i) % 8;
                *byte =
                    (uint8_t)((*byte & ~(1 << bit)) | (best->code[i][l] >> sign_bit & 1) << bit);
            }
            continue;
        }
        decoded_block *block = &t->now.block[l];
        block->scale = set->scale;
        block->min = set->min;
        if (r->high != 0) {
            block->group_scale[i_group] = (int8_t)set->integer;
            block->group_min[i_group] = (uint8_t)set->min_integer;
        }
        for (int i = 0; i < r->group; i++) {
            block->code[at + i] = (int8_t)best->code[i][l];
        }
    }
}

/* Rounds a group with settings near the chosen one, and with those that fit the codes best. */
static void search_group(tile *t, int column, int i_group) {
    const rounding *r = t->job->r;
    setting base[LANES];
    for (int l = 0; l < LANES; l++) {
        base[l] = t->best.set[l] = chosen(t, l, i_group);
    }
    round_group(t, column, &t->best);
    const int deltas = r->shares_delta ? 2 : 1;
    for (int i = 1; i < r->n_proposals * deltas; i++) {
        for (int l = 0; l < LANES; l++) {
            propose(r, i / deltas, &base[l], &t->next.set[l]);
            t->next.set[l].negative ^= i % deltas;
        }
        round_group(t, column, &t->next);
        keep_better(r, &t->next, &t->best);
    }
    for (int i = 0; i < r->n_refits; i++) {
        refit(t, column, &t->best, &t->next);
        round_group(t, column, &t->next);
        keep_better(r, &t->next, &t->best);
    }
    commit(t, column, i_group);
}

/* The first element, in order of rows, that cannot be encoded. */
static void report_bad(job *j, int64_t row, int column) {
    const int64_t element = row * j->f->width + column;
    int64_t seen = atomic_load(&j->bad);
    while ((seen < 0 || element < seen) && !atomic_compare_exchange_weak(&j->bad, &seen, element)) {
    }
}

/* The plain search on the weights as they are now. */
static void choose_block(tile *t, int64_t row, int column) {
    const edge_encoder *encoder = t->job->encoder;
    const int n = encoder->format->block;
    for (int l = 0; l < LANES; l++) {
        float x[SUPER];
        for (int i = 0; i < n; i++) {
            x[i] = t->x[column + i][l];
        }
        const int64_t i_row = row + l < t->job->f->n ? row + l : t->job->f->n - 1;
        const encode_input in = {x, t->job->f->importance + column, t->job->f->row_squares[i_row],
                                 encoder->tables};
        memset(&t->now.block[l], 0, sizeof t->now.block[l]);
        memset(&t->now.grid[l], 0, sizeof t->now.grid[l]);
        bool is_finite;
        if (encoder->format->store_grid != NULL) {
            encoder->format->choose_grid(&in, &t->now.grid[l]);
            is_finite = half_is_finite(t->now.grid[l].scale);
        } else {
            encoder->format->choose(&in, &t->now.block[l]);
            is_finite = scales_are_finite(encoder->format->layout, &t->now.block[l]);
        }
        if (!is_finite) {
            report_bad(t->job, i_row, column);
        }
    }
}

/* Rounds the groups of a block, whose floats and first integers are chosen. */
static void round_groups(tile *t, int column) {
    const rounding *r = t->job->r;
    memset(t->now.loss, 0, sizeof t->now.loss);
    for (int g = 0; g < r->format->block / r->group; g++) {
        const int first = column + g * r->group;
        for (int i = first; i < first + r->group; i++) {
            memcpy(t->base[i], t->x[i], sizeof *t->base);
            add_feedback(t, i, (const lanes *)t->error + column, column, first, t->base[i]);
        }
        search_group(t, first, g);
    }
}

/* Keeps the lanes of `now` that are better. */
static void keep_better_blocks(tile *t) {
    for (int l = 0; l < LANES; l++) {
        if (t->now.loss[l] < t->kept.loss[l]) {
            t->kept.loss[l] = t->now.loss[l];
            t->kept.block[l] = t->now.block[l];
            t->kept.grid[l] = t->now.grid[l];
            for (int i = 0; i < t->job->r->format->block; i++) {
                t->kept.error[i][l] = t->now.error[i][l];
            }
        }
    }
}

/* The floats of the blocks, refitted to all else in them. */
static void refit_block(tile *t, int column) {
    const rounding *r = t->job->r;
    lanes value[SUPER], one[SUPER], scale, min;
    for (int l = 0; l < LANES; l++) {
        setting set = chosen(t, l, 0);
        scale[l] = half_to_float(set.scale);
        min[l] = half_to_float(set.min);
        for (int i = 0; i < SUPER; i++) {
            set = chosen(t, l, i / r->group);
            uint8_t code = (uint8_t)t->now.block[l].code[i];
            if (r->format->store_grid != NULL) {
                const int bits = 16 / r->weights;
                code = (uint8_t)(r->entries[t->now.grid[l].index[i / r->weights]] >>
                                     (bits * (i % r->weights)) &
                                 ((1 << bits) - 1));
                code |= (t->now.grid[l].sign[i / 8] >> i % 8 & 1) << (bits == 4 ? 3 : 2);
            }
            value[i][l] = code_scale(r->layout, r->table, 0x3c00, set.integer) * r->value[code];
            one[i][l] = code_min(r->layout, 0x3c00, set.min_integer);
        }
    }
    least_squares(t, (const lanes *)t->x, column, SUPER, (const lanes *)value, (const lanes *)one,
                  scale, min);
    for (int l = 0; l < LANES; l++) {
        const uint16_t scale_bits = float_to_half(scale[l]), min_bits = float_to_half(min[l]);
        if (half_is_finite(scale_bits) && half_is_finite(min_bits)) {
            t->now.grid[l].scale = t->now.block[l].scale = scale_bits;
            t->now.block[l].min = min_bits;
        }
    }
}

static void round_block(tile *t, int64_t row, int column) {
    const format_info *format = t->job->encoder->format;
    const rounding *r = t->job->r;
    for (int i = column; i < column + format->block; i++) {
        add_feedback(t, i, (const lanes *)t->error, 0, column, t->x[i]);
    }
    choose_block(t, row, column);
    round_groups(t, column);
    t->kept = t->now;
    for (int i = 0; i < r->n_block_refits; i++) {
        refit_block(t, column);
        round_groups(t, column);
        keep_better_blocks(t);
    }
    memcpy(t->error + column, t->kept.error, (size_t)format->block * sizeof(lanes));
    for (int l = 0; l < LANES && row + l < t->job->f->n; l++) {
        const int n_blocks = t->job->f->width / format->block, i_block = column / format->block;
        uint8_t *dst = t->job->dst + ((row + l) * n_blocks + i_block) * format->block_bytes;
        if (format->store_grid != NULL) {
            format->store_grid(&t->kept.grid[l], dst);
        } else {
            format->store(&t->kept.block[l], dst);
        }
    }
}

/* Eight rows from `row` on; those past the last are the last again, and are not written. */
static void round_rows(tile *t, int64_t row) {
    job *j = t->job;
    const edge_feedback *f = j->f;
    for (int l = 0; l < LANES; l++) {
        const int64_t i_row = row + l < f->n ? row + l : f->n - 1;
        for (int i = 0; i < f->width; i++) {
            t->weight[i][l] = f->weights[i_row * f->width + i];
            t->x[i][l] = f->x[i_row * f->width + i];
            if (!isfinite(t->weight[i][l]) || !isfinite(t->x[i][l])) {
                report_bad(j, i_row, i);
                return;
            }
        }
    }
    for (int i = 0; i < f->width; i += j->encoder->format->block) {
        round_block(t, row, i);
    }
    for (int l = 0; l < LANES && row + l < f->n; l++) {
        for (int i = 0; i < f->width; i++) {
            f->x[(row + l) * f->width + i] = t->error[i][l];
        }
    }
}

static uint32_t chunks(void *context, uint32_t stage) {
    (void)stage;
    const job *j = context;
    return j->n_tiles;
}

static void round_chunk(void *context, uint32_t stage, uint32_t chunk) {
    (void)stage;
    job *j = context;
    int64_t row;
    while ((row = atomic_fetch_add(&j->next, LANES)) < j->f->n) {
        round_rows(&j->tiles[chunk], row);
    }
}

int32_t edge_encode_feedback(edge_threads *threads, const edge_encoder *encoder,
                             const edge_feedback *f, void *dst, int64_t dst_bytes,
                             edge_error *error) {
    if (threads == NULL || encoder == NULL || f == NULL || dst == NULL || f->weights == NULL ||
        f->x == NULL || f->shares == NULL || f->costs == NULL || f->importance == NULL ||
        f->row_squares == NULL || f->n < 1 || f->n > INT32_MAX) {
        return fail(error, EDGE_BAD_ARGUMENT, "no columns to round");
    }
    const format_info *format = encoder->format;
    if ((format->store == NULL && format->store_grid == NULL) || f->width < 1 || f->width > TILE ||
        f->width % format->block != 0 ||
        dst_bytes != f->n * (f->width / format->block) * format->block_bytes) {
        return fail(error, EDGE_BAD_ARGUMENT, "%d columns in %lld bytes of blocks, of type %d",
                    f->width, (long long)dst_bytes, format->type);
    }
    rounding r;
    facts_of(format, &r);
    const uint32_t n_tiles = (uint32_t)threads_count(threads);
    job j = {&r, encoder, f, dst, malloc(n_tiles * sizeof(tile)), n_tiles, 0, -1};
    if (j.tiles == NULL) {
        return fail(error, EDGE_NO_MEMORY, "no memory for %u tiles of weights", n_tiles);
    }
    for (uint32_t i = 0; i < n_tiles; i++) {
        j.tiles[i].job = &j;
    }
    const threads_job work = {1, chunks, round_chunk, &j};
    threads_run(threads, &work);
    free(j.tiles);
    const int64_t bad = atomic_load(&j.bad);
    if (bad < 0) {
        return EDGE_OK;
    }
    fail(error, EDGE_BAD_DATA, "row %lld, column %lld cannot be encoded",
         (long long)(bad / f->width), (long long)(bad % f->width));
    if (error != NULL) {
        error->row = bad / f->width;
        error->column = bad % f->width;
    }
    return EDGE_BAD_DATA;
}
