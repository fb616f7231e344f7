/* Rotary embedding, and how keys and values get into a page: see kv.h. */
#include "kv.h"

#include <math.h>
#include <string.h>

#include "kernels/isa.h"
#include "tables.h"

void FN(rotate)(const rotate_args *a, int64_t i) {
    const int half = a->n_rot / 2;
    const float *angles = a->angles + i * a->n_rot;
    for (int32_t head = 0; head < a->n_heads; head++) {
        float *x = a->x + i * a->x_stride + (int64_t)head * a->head_dim;
        const int step = a->interleaved ? 2 : 1, apart = a->interleaved ? 1 : half;
        for (int j = 0; j < half; j++) {
            const float cosine = angles[2 * j], sine = angles[2 * j + 1];
            const float x0 = x[step * j], x1 = x[step * j + apart];
            x[step * j] = x0 * cosine - x1 * sine;
            x[step * j + apart] = x0 * sine + x1 * cosine;
        }
    }
}

/* x (head_dim) times an orthonormal Hadamard matrix, in blocks of the largest power of two that
 * divides head_dim. It is its own inverse. It spreads an element that is much larger than the
 * others over the whole block, so that 4 bits are enough, and leaves the product of two turned
 * vectors as it is (QuaRot, Ashkboos et al. 2024). */
void FN(turn)(float *x, int32_t head_dim) {
    const int32_t n = kv_block(head_dim);
    for (int32_t half = 1; half < n; half *= 2) {
        for (int32_t i = 0; i < head_dim; i += 2 * half) {
            for (int32_t j = i; j < i + half; j++) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
        }
    }
    const float scale = 1.0f / sqrtf((float)n);
    for (int32_t i = 0; i < head_dim; i++) {
        x[i] *= scale;
    }
}

/* n numbers as codes times one float16 scale. */
typedef struct {
    uint16_t scale;
    int8_t code[MAX_HEAD_DIM]; /* in the order of the numbers; of a table: the index in it */
} coded;

/* The number of the largest magnitude, with its sign; NaN where one is NaN or infinite. */
static float largest(const float *x, int32_t n) {
    vi most = vi_set1(0);
    vf high = vf_load(x);
    for (int32_t i = 0; i < n; i += 16) {
        const vf v = vf_load(x + i);
        most = vi_max(most, vi_abs_bits(v));
        high = vf_max(high, v);
    }
    union {
        int32_t bits;
        float value;
    } amax = {vi_hmax(most)};
    if (amax.bits >= 0x7f800000) {
        return NAN;
    }
    return vf_hmax(high) == amax.value ? amax.value : -amax.value;
}

static uint16_t half_of(float x) {
    uint16_t halves[16];
    vf_to_half(halves, vf_set1(x));
    return halves[0];
}

static vf inverse_of(float scale) { return vf_set1(scale != 0.0f ? 1.0f / scale : 0.0f); }

/* round(x / scale), within low .. high. */
INLINE vi codes_of(vf x, vf inverse, vf low, vf high) {
    return vi_round(vf_min(vf_max(vf_mul(x, inverse), low), high));
}

/* The codes of n numbers, within low .. high. A scale of NaN is kept, so results are NaN too. */
static void encode(const float *x, int32_t n, uint16_t scale, float low, float high, coded *out) {
    const float kept = half_to_float(scale);
    const bool number = kept == kept;
    const vf inverse = inverse_of(number ? kept : 0.0f);
    out->scale = scale;
    for (int32_t i = 0; i < n; i += 16) {
        const vf v = number ? vf_load(x + i) : vf_zero();
        int8_t steps[16];
        vi_to_steps(steps, codes_of(v, inverse, vf_set1(low), vf_set1(high)));
        for (int j = 0; j < 16; j++) { /* back from the order of steps */
            out->code[i + j] = steps[j % 4 * 4 + j / 4];
        }
    }
}

/* n numbers as codes -127 .. 127. */
static void encode_bytes(const float *x, int32_t n, coded *out) {
    encode(x, n, half_of(fabsf(largest(x, n)) / 127.0f), -127.0f, 127.0f, out);
}

/* The scale that just reaches the largest number is not the best: a smaller one is off there, but
 * nearer to all other numbers. These shares of it are tried; the one with the least sum of squared
 * errors is kept. */
enum { N_SHARES = 8 };
static const float SHARES[N_SHARES] = {1.0f, 0.76f, 0.8f, 0.84f, 0.88f, 0.92f, 0.96f, 1.04f};

/* The sum of squared errors of n numbers with a scale. */
typedef float (*missed_with)(const float *x, int32_t n, float scale);

INLINE uint16_t best_scale(const float *x, int32_t n, float scale, missed_with missed) {
    uint16_t best = half_of(scale * SHARES[0]);
    float least = missed(x, n, half_to_float(best));
    for (int i = 1; i < N_SHARES; i++) {
        const uint16_t kept = half_of(scale * SHARES[i]);
        const float error = missed(x, n, half_to_float(kept));
        if (error < least) { /* of NaN never */
            least = error;
            best = kept;
        }
    }
    return best;
}

/* missed_with for codes -8 .. 7. */
INLINE float missed_by_nibbles(const float *x, int32_t n, float scale) {
    const vf inverse = inverse_of(scale), low = vf_set1(-8.0f), high = vf_set1(7.0f);
    vf squares = vf_zero();
    for (int32_t i = 0; i < n; i += 16) {
        const vf v = vf_load(x + i);
        const vf code = vf_from_int(codes_of(v, inverse, low, high));
        const vf missed = vf_fma(code, vf_set1(-scale), v);
        squares = vf_fma(missed, missed, squares);
    }
    return vf_sum(squares);
}

/* n numbers as codes -8 .. 7. */
static void encode_nibbles(const float *x, int32_t n, coded *out) {
    const uint16_t scale = best_scale(x, n, largest(x, n) / -8.0f, missed_by_nibbles);
    encode(x, n, scale, -8.0f, 7.0f, out);
}

/* missed_with for a group of 32, each number by the nearest of the 16 values of IQ4_NL. */
INLINE float missed_by_table(const float *x, int32_t n, float scale) {
    (void)n;
    const code_table *table = &code_tables[EDGE_TABLE_IQ4_NL];
    const vf a = vf_load(x), b = vf_load(x + 16);
    vf least_a = vf_set1(FLT_MAX), least_b = least_a;
    for (int j = 0; j < 16; j++) {
        const vf value = vf_set1((float)(table->shifted[j] - table->zero) * scale);
        const vf from_a = vf_sub(a, value), from_b = vf_sub(b, value);
        least_a = vf_min(least_a, vf_mul(from_a, from_a));
        least_b = vf_min(least_b, vf_mul(from_b, from_b));
    }
    return vf_sum(vf_add(least_a, least_b));
}

/* A group of 32 as IQ4_NL: 16 values, which lie closer around zero, as turned numbers do. */
static void encode_in_table(const float *x, coded *out) {
    const code_table *table = &code_tables[EDGE_TABLE_IQ4_NL];
    const uint16_t scale = best_scale(x, GROUP, largest(x, GROUP) / -127.0f, missed_by_table);
    coded fine;
    encode(x, GROUP, scale, -127.0f, 127.0f, &fine);
    int8_t code[GROUP] = {0};
    for (int j = 1; j < 16; j++) { /* past the middle between two values it is the next one */
        const int sum = table->shifted[j - 1] + table->shifted[j] - 2 * table->zero;
        const int8_t middle = (int8_t)((sum - (sum < 0)) / 2);
        for (int i = 0; i < GROUP; i++) {
            code[i] = (int8_t)(code[i] + (fine.code[i] > middle));
        }
    }
    out->scale = scale;
    memcpy(out->code, code, GROUP);
}

/* Group g of the key at position r of a panel. */
static void put_key(uint8_t *panel, const kv_type_info *type, int32_t g, int r, const coded *c) {
    const layout_info *l = &layout_table[type->layout];
    uint8_t *at = panel + g / 2 * block_bytes(l);
    uint8_t *codes = at + l->header_bytes + g % 2 * l->codes_bytes;
    ((uint16_t *)at)[PANEL_ROWS * (g % 2) + r] = c->scale;
    for (int s = 0; s < STEPS; s++) {
        for (int t = 0; t < 4; t++) {
            const int code = c->code[16 * (s / 4) + 4 * t + s % 4];
            if (type->bits == 8) {
                codes[64 * s + 4 * r + t] = (uint8_t)code;
            } else { /* two steps to a byte */
                uint8_t *byte = &codes[64 * (s / 2) + 4 * r + t];
                *byte = (uint8_t)(s % 2 == 0 ? code : *byte | code << 4);
            }
        }
    }
}

/* n elements of the value at a slot, which share a scale. */
static void put_value(uint8_t *group, int bits, int32_t n, int32_t slot, const coded *c) {
    ((uint16_t *)group)[slot] = c->scale;
    for (int32_t i = 0; i < n; i += GROUP) {
        uint8_t *codes =
            group + 2 * PAGE_POSITIONS + ((int64_t)i * PAGE_POSITIONS + slot * GROUP) * bits / 8;
        for (int j = 0; j < GROUP * bits / 8; j++) {
            codes[j] = bits == 8 ? (uint8_t)c->code[i + j]
                                 : (uint8_t)((c->code[i + j] + 8) | (c->code[i + 16 + j] + 8) << 4);
        }
    }
}

/* ---- the base ---------------------------------------------------------------------------- */

/* which: 0 the mean key, 1 the direction of queries. */
static void put_base(kv_base base, int which, const float *x, int32_t head_dim) {
    for (int32_t g = 0; g < head_dim / GROUP; g++) {
        coded c;
        encode_bytes(x + g * GROUP, GROUP, &c);
        base.scale[which * head_dim / GROUP + g] = c.scale;
        memcpy(base.code + which * head_dim + g * GROUP, c.code, GROUP);
    }
}

/* out (head_dim): the mean key (which 0), or the direction of queries (1). */
void FN(get_base)(kv_base base, int which, int32_t head_dim, float *out) {
    for (int32_t i = 0; i < head_dim; i += 16) {
        const float scale = half_to_float(base.scale[which * head_dim / GROUP + i / GROUP]);
        const uint8_t *code = (const uint8_t *)base.code + which * head_dim + i;
        vf_store(out + i, vf_mul(vf_from_int(vi_from_i8(code)), vf_set1(scale)));
    }
}

/* mean (head_dim): of the 64 keys of a whole page, as their codes give them. */
static void mean_key(const uint8_t *place, int32_t type, int32_t head_dim, float *mean) {
    const edge_weight keys = {.layout = kv_type_table[type].layout,
                              .table = kv_type_table[type].table,
                              .n = PAGE_POSITIONS,
                              .k = head_dim,
                              .data = place};
    const kv_base base = kv_base_of(place, type, head_dim);
    float center[MAX_HEAD_DIM], direction[MAX_HEAD_DIM], row[MAX_HEAD_DIM], missed = 0.0f;
    FN(get_base)(base, 0, head_dim, center);
    FN(get_base)(base, 1, head_dim, direction);
    memset(mean, 0, (size_t)head_dim * 4);
    for (int slot = 0; slot < PAGE_POSITIONS; slot++) {
        edge_weight_unpack(&keys, slot, 1, row);
        missed += half_to_float(base.missed[slot]);
        for (int32_t i = 0; i < head_dim; i++) {
            mean[i] += row[i];
        }
    }
    for (int32_t i = 0; i < head_dim; i++) {
        mean[i] = center[i] + (mean[i] + missed * direction[i]) / PAGE_POSITIONS;
    }
}

static float product(const float *x, const float *y, int32_t n) {
    vf sum = vf_zero();
    for (int32_t i = 0; i < n; i += 16) {
        sum = vf_fma(vf_load(x + i), vf_load(y + i), sum);
    }
    return vf_sum(sum);
}

/* Makes the base of a new page: the mean of the page before, and the direction of the queries of
 * its first position. */
static void begin_base(const store_args *a, kv_base base) {
    const int32_t head_dim = a->shape->head_dim;
    float x[MAX_HEAD_DIM] = {0};
    if (a->before != NULL) {
        mean_key(a->before, a->shape->type, head_dim, x);
    }
    put_base(base, 0, x, head_dim);
    memset(x, 0, sizeof x);
    for (int32_t head = 0; head < a->group; head++) {
        for (int32_t i = 0; i < head_dim; i++) {
            x[i] += a->q[head * head_dim + i];
        }
    }
    FN(turn)(x, head_dim);
    const float length = sqrtf(product(x, x, head_dim));
    for (int32_t i = 0; i < head_dim; i++) {
        x[i] = length > 0.0f ? x[i] / length : 0.0f;
    }
    put_base(base, 1, x, head_dim);
}

/* A turned key: the codes of key - mean, and then `missed`, how far they are off along the
 * direction. key (head_dim) is overwritten. */
static void store_based_key(const store_args *a, float *key) {
    const int32_t head_dim = a->shape->head_dim, type = a->shape->type;
    const kv_type_info *info = &kv_type_table[type];
    const kv_base base = kv_base_of(a->place, type, head_dim);
    if (a->slot == 0) {
        begin_base(a, base);
    }
    float center[MAX_HEAD_DIM], direction[MAX_HEAD_DIM], row[MAX_HEAD_DIM];
    FN(get_base)(base, 0, head_dim, center);
    FN(get_base)(base, 1, head_dim, direction);
    for (int32_t i = 0; i < head_dim; i++) {
        key[i] -= center[i];
    }
    uint8_t *panel = a->place + a->slot / 16 * panel_bytes(info->layout, head_dim);
    for (int32_t g = 0; g < head_dim / GROUP; g++) {
        coded c;
        encode_in_table(key + g * GROUP, &c);
        put_key(panel, info, g, a->slot % 16, &c);
        const code_table *table = &code_tables[info->table];
        for (int i = 0; i < GROUP; i++) {
            const int value = table->shifted[c.code[i]] - table->zero;
            row[g * GROUP + i] = half_to_float(c.scale) * (float)value;
        }
    }
    for (int32_t i = 0; i < head_dim; i++) {
        row[i] = key[i] - row[i];
    }
    const float square = product(direction, direction, head_dim);
    base.missed[a->slot] =
        half_of(square > 0.0f ? product(row, direction, head_dim) / square : 0.0f);
}

static void store_key(const store_args *a, const float *key) {
    const kv_type_info *info = &kv_type_table[a->shape->type];
    uint8_t *panel = a->place + a->slot / 16 * panel_bytes(info->layout, a->shape->head_dim);
    for (int32_t g = 0; g < a->shape->head_dim / GROUP; g++) {
        coded c;
        encode_bytes(key + g * GROUP, GROUP, &c);
        put_key(panel, info, g, a->slot % 16, &c);
    }
}

static void store_value(const store_args *a, const float *value) {
    const int32_t head_dim = a->shape->head_dim, type = a->shape->type;
    const int32_t n = kv_value_group(type, head_dim);
    uint8_t *group = a->place + kv_values_at(type, head_dim);
    for (int32_t i = 0; i < head_dim; i += n, group += kv_group_bytes(type, head_dim)) {
        coded c;
        (kv_type_table[type].bits == 4 ? encode_nibbles : encode_bytes)(value + i, n, &c);
        put_value(group, kv_type_table[type].bits, n, a->slot, &c);
    }
}

static void store_halves(const store_args *a) {
    const int32_t head_dim = a->shape->head_dim;
    uint16_t *keys = (uint16_t *)a->place + (int64_t)(a->slot / 16) * head_dim * 16 + a->slot % 16;
    uint16_t *values = (uint16_t *)(a->place + kv_values_at(EDGE_KV_F16, head_dim));
    for (int32_t d = 0; d < head_dim; d += 16) {
        uint16_t halves[16];
        vf_to_half(halves, vf_load(a->k + d));
        for (int i = 0; i < 16; i++) {
            keys[(d + i) * 16] = halves[i];
        }
        vf_to_half(values + (int64_t)a->slot * head_dim + d, vf_load(a->v + d));
    }
}

void FN(store)(const store_args *a) {
    const int32_t head_dim = a->shape->head_dim;
    if (a->shape->type == EDGE_KV_F16) {
        store_halves(a);
    } else if (kv_type_table[a->shape->type].based) {
        float x[MAX_HEAD_DIM];
        memcpy(x, a->k, (size_t)head_dim * 4);
        FN(turn)(x, head_dim);
        store_based_key(a, x);
        memcpy(x, a->v, (size_t)head_dim * 4);
        FN(turn)(x, head_dim);
        store_value(a, x);
    } else {
        store_key(a, a->k);
        store_value(a, a->v);
    }
}
