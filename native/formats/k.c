/* Super-blocks of 256 with a fp16 scale, and integer scales per group of 16 or 32: the K types.
 *
 *   Q2_K  u8 s[16], u8 q[64], fp16 d, fp16 dmin                 16: d * scale * code - dmin * min
 *         s: scale low, min high nibble
 *   Q3_K  u8 high[32], u8 q[64], u8 s[12], fp16 d               16: d * scale * (code - 4)
 *         s: 6 bits a scale, stored as scale + 32: low nibbles of scale 0..7 in the low halves of
 *         s[0..7], of 8..15 in the high halves; upper pairs of scale 4 i + j in pair i of s[8 + j]
 *   Q4_K  fp16 d, fp16 dmin, u8 s[12], u8 q[128]                32: d * scale * code - dmin * min
 *   Q5_K  fp16 d, fp16 dmin, u8 s[12], u8 high[32], u8 q[128]   the same
 *         s: 6 bits a scale and a min: of groups 0..3 the low 6 bits of s[0..3] and s[4..7]; of
 *         groups 4..7 the low (high) nibbles of s[8..11] below the top pairs of s[0..3] (s[4..7])
 *   Q6_K  u8 q[128], u8 high[64], i8 scale[16], fp16 d          16: d * scale * (code - 32)
 *
 * Codes are cut into fields of 1, 2 or 4 bits. n bytes hold the fields of 8 n / bits codes in a
 * row: first the lowest field of each byte, then the next. Runs of bytes, n:
 *   2 bits  32 (Q2_K, Q3_K, high of Q6_K)
 *   4 bits  32 (Q4_K, Q5_K), 64 (Q6_K)
 *   1 bit   32 (high of Q3_K and Q5_K)
 */
#include <math.h>
#include <string.h>

#include "formats.h"
#include "search.h"

/* ORs 256 fields of `bits`, in runs of n bytes, into the codes, `shift` up. */
static inline void add_fields(const uint8_t *src, int bits, int n, int shift, int8_t code[SUPER]) {
    const int mask = (1 << bits) - 1;
    for (int k = 0; k < SUPER; src += n) {
        for (int at = 0; at < 8; at += bits, k += n) {
            for (int i = 0; i < n; i++) {
                code[k + i] |= (int8_t)((src[i] >> at & mask) << shift);
            }
        }
    }
}

/* Scales and minima of Q2_K. */
static void get_nibbles(const uint8_t *s, decoded_block *out) {
    for (int g = 0; g < 16; g++) {
        out->group_scale[g] = s[g] & 15;
        out->group_min[g] = s[g] >> 4;
    }
}

static void decode_q2_k(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block + 80);
    out->min = read_u16(block + 82);
    get_nibbles(block, out);
    add_fields(block + 16, 2, 32, 0, out->code);
}

static void decode_q3_k(const uint8_t *block, decoded_block *out) {
    const uint8_t *s = block + 96;
    out->scale = read_u16(block + 108);
    for (int g = 0; g < 16; g++) {
        const int low = s[g % 8] >> (g / 8 * 4) & 15, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
        out->group_scale[g] = (int8_t)((low | high << 4) - 32);
    }
    add_fields(block + 32, 2, 32, 0, out->code);
    add_fields(block, 1, 32, 2, out->code);
}

/* Scales and minima of Q4_K and Q5_K. */
static void get_six_bits(const uint8_t *s, decoded_block *out) {
    for (int g = 0; g < 4; g++) {
        out->group_scale[g] = s[g] & 63;
        out->group_min[g] = s[g + 4] & 63;
        out->group_scale[g + 4] = (int8_t)((s[g + 8] & 15) | s[g] >> 6 << 4);
        out->group_min[g + 4] = (uint8_t)(s[g + 8] >> 4 | s[g + 4] >> 6 << 4);
    }
}

static void decode_q4_k(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    out->min = read_u16(block + 2);
    get_six_bits(block + 4, out);
    add_fields(block + 16, 4, 32, 0, out->code);
}

static void decode_q5_k(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    out->min = read_u16(block + 2);
    get_six_bits(block + 4, out);
    add_fields(block + 48, 4, 32, 0, out->code);
    add_fields(block + 16, 1, 32, 4, out->code);
}

static void decode_q6_k(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block + 208);
    memcpy(out->group_scale, block + 192, 16);
    add_fields(block, 4, 64, 0, out->code);
    add_fields(block + 128, 2, 32, 4, out->code);
}

/* The inverse of add_fields: fields of `bits`, from bit `shift` of the codes, in runs of n bytes.
 */
static inline void put_fields(const int8_t code[SUPER], int bits, int n, int shift, uint8_t *dst) {
    const int mask = (1 << bits) - 1;
    for (int k = 0; k < SUPER; dst += n) {
        memset(dst, 0, (size_t)n);
        for (int at = 0; at < 8; at += bits, k += n) {
            for (int i = 0; i < n; i++) {
                dst[i] |= (uint8_t)((code[k + i] >> shift & mask) << at);
            }
        }
    }
}

static void put_nibbles(const decoded_block *in, uint8_t *s) {
    for (int g = 0; g < 16; g++) {
        s[g] = (uint8_t)(in->group_scale[g] | in->group_min[g] << 4);
    }
}

static void store_q2_k(const decoded_block *in, uint8_t *block) {
    put_nibbles(in, block);
    put_fields(in->code, 2, 32, 0, block + 16);
    write_u16(block + 80, in->scale);
    write_u16(block + 82, in->min);
}

static void store_q3_k(const decoded_block *in, uint8_t *block) {
    uint8_t *s = block + 96;
    put_fields(in->code, 1, 32, 2, block);
    put_fields(in->code, 2, 32, 0, block + 32);
    memset(s, 0, 12);
    for (int g = 0; g < 16; g++) {
        const int scale = in->group_scale[g] + 32;
        s[g % 8] |= (uint8_t)((scale & 15) << (g / 8 * 4));
        s[8 + g % 4] |= (uint8_t)(scale >> 4 << (g / 4 * 2));
    }
    write_u16(block + 108, in->scale);
}

static void put_six_bits(const decoded_block *in, uint8_t *s) {
    for (int g = 0; g < 4; g++) {
        const int scale = (uint8_t)in->group_scale[g + 4], min = in->group_min[g + 4];
        s[g] = (uint8_t)(in->group_scale[g] | scale >> 4 << 6);
        s[g + 4] = (uint8_t)(in->group_min[g] | min >> 4 << 6);
        s[g + 8] = (uint8_t)((scale & 15) | (min & 15) << 4);
    }
}

static void store_q4_k(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    write_u16(block + 2, in->min);
    put_six_bits(in, block + 4);
    put_fields(in->code, 4, 32, 0, block + 16);
}

static void store_q5_k(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    write_u16(block + 2, in->min);
    put_six_bits(in, block + 4);
    put_fields(in->code, 1, 32, 4, block + 16);
    put_fields(in->code, 4, 32, 0, block + 48);
}

static void store_q6_k(const decoded_block *in, uint8_t *block) {
    put_fields(in->code, 4, 64, 0, block);
    put_fields(in->code, 2, 32, 4, block + 128);
    memcpy(block + 192, in->group_scale, 16);
    write_u16(block + 208, in->scale);
}

/* What errors count where the importance of the columns is known; factor: of the block's mean
 * square. */
static void important_weights(const encode_input *in, float factor, float weight[SUPER]) {
    float sum = 0;
    for (int i = 0; i < SUPER; i++) {
        sum += in->x[i] * in->x[i];
    }
    search_error_weights(in->x, in->importance, factor * sum / SUPER, SUPER, weight);
}

static void sum_groups(const float weight[SUPER], int group, float sums[SUPER / 16]) {
    for (int g = 0; g < SUPER / group; g++) {
        sums[g] = 0;
        for (int i = 0; i < group; i++) {
            sums[g] += weight[g * group + i];
        }
    }
}

/* The codes of a group: x ~ scale * (code + low) - min, code + low at most high. With a scale of 0
 * they stay. */
static void round_group(const float *x, int n, float scale, float min, int low, int high,
                        int8_t *code) {
    if (scale == 0) {
        return;
    }
    for (int i = 0; i < n; i++) {
        code[i] = (int8_t)(clamped(nearest_int((x[i] + min) / scale), low, high) - low);
    }
}

/* ---- types with minima ------------------------------------------------------------------- */

typedef struct {
    int group;                        /* weights in a group */
    int max_code, max_scale;          /* of weights; of scales and minima */
    search_steps plain;               /* without an importance */
    int plain_limit, important_limit; /* of the byte of a scale, without and with an importance */
    void (*put)(const decoded_block *in, uint8_t *s); /* scales and minima into the file */
    void (*get)(const uint8_t *s, decoded_block *out);
} min_type;

static const min_type q2_k = {16, 3, 15, {-0.5f, 0.1f, 15, 1}, 255, 255, put_nibbles, get_nibbles};
static const min_type q4_k = {32, 15, 63, {-1, 0.1f, 20, 0}, 63, 255, put_six_bits, get_six_bits};
static const min_type q5_k = {32, 31, 63, {-0.5f, 0.1f, 15, 0}, 63, 63, put_six_bits, get_six_bits};

static const search_steps important_steps = {-0.9f, 0.05f, 36, 0};

/* Codes that the largest scale gives. Returns their unit. */
static float round_scales(const float *scale, int n, int max_code, uint8_t *code) {
    float max = 0;
    for (int g = 0; g < n; g++) {
        max = scale[g] > max ? scale[g] : max;
    }
    const float factor = max > 0 ? (float)max_code / max : 0;
    for (int g = 0; g < n; g++) {
        code[g] = (uint8_t)nearest_int(factor * scale[g]);
    }
    return max / (float)max_code;
}

static void choose_with_min(const min_type *type, const encode_input *in, const float weight[SUPER],
                            decoded_block *out) {
    const int n = SUPER / type->group;
    const bool important = in->importance != NULL;
    const search_group first = {in->x, weight, type->group};
    float scale[SUPER / 16], min[SUPER / 16], d, m;
    uint8_t scale_code[SUPER / 16], stored[SUPER / 16];
    search_scale_min_groups(&first, n, type->max_code, important ? &important_steps : &type->plain,
                            out->code, scale, min);
    for (int g = 0; g < n; g++) {
        min[g] = -min[g];
    }
    if (important) {
        float sums[SUPER / 16];
        sum_groups(weight, type->group, sums);
        d = search_positive_scale(&(search_group){scale, sums, n}, type->max_scale, scale_code);
        m = search_positive_scale(&(search_group){min, sums, n}, type->max_scale, out->group_min);
    } else {
        d = round_scales(scale, n, type->max_scale, scale_code);
        m = round_scales(min, n, type->max_scale, out->group_min);
    }
    /* Where few weights count, the best scale of a group may be below 0. Its code wraps then, and
     * some of the bits stay in the file: so it is in ggml. The codes of weights follow the file. */
    const int limit = important ? type->important_limit : type->plain_limit;
    for (int g = 0; g < n; g++) {
        out->group_scale[g] = (int8_t)(scale_code[g] < limit ? scale_code[g] : limit);
    }
    type->put(out, stored);
    type->get(stored, out);
    out->scale = float_to_half(d);
    out->min = float_to_half(m);
    d = half_to_float(out->scale);
    m = half_to_float(out->min);
    for (int g = 0; g < n; g++) {
        const int at = g * type->group;
        round_group(in->x + at, type->group, d * (float)out->group_scale[g],
                    m * (float)out->group_min[g], 0, type->max_code, out->code + at);
    }
}

static void choose_q2_k(const encode_input *in, decoded_block *out) {
    float weight[SUPER];
    if (in->importance != NULL) {
        important_weights(in, 1, weight);
    } else {
        for (int i = 0; i < SUPER; i++) {
            weight[i] = fabsf(in->x[i]);
        }
    }
    choose_with_min(&q2_k, in, weight, out);
}

/* Q4_K and Q5_K. */
static void choose_six_bits(const min_type *type, const encode_input *in, decoded_block *out) {
    float weight[SUPER];
    if (in->importance != NULL) {
        important_weights(in, 2, weight);
    } else {
        for (int g = 0; g < SUPER; g += 32) {
            float sum = 0;
            for (int i = g; i < g + 32; i++) {
                sum += in->x[i] * in->x[i];
            }
            const float rms = sqrtf(sum / 32);
            for (int i = g; i < g + 32; i++) {
                weight[i] = rms + fabsf(in->x[i]);
            }
        }
    }
    choose_with_min(type, in, weight, out);
}

static void choose_q4_k(const encode_input *in, decoded_block *out) {
    choose_six_bits(&q4_k, in, out);
}

static void choose_q5_k(const encode_input *in, decoded_block *out) {
    choose_six_bits(&q5_k, in, out);
}

/* ---- types without ----------------------------------------------------------------------- */

/* Scales to codes -limit .. limit - 1; the largest in magnitude gets -limit. */
static void round_signed_scales(const float scale[SUPER / 16], float largest, int limit,
                                decoded_block *out) {
    const float factor = (float)-limit / largest;
    out->scale = float_to_half(1 / factor);
    for (int g = 0; g < SUPER / 16; g++) {
        out->group_scale[g] = (int8_t)clamped(nearest_int(factor * scale[g]), -limit, limit - 1);
    }
}

static void round_groups(const float x[SUPER], int limit, decoded_block *out) {
    const float d = half_to_float(out->scale);
    for (int g = 0; g < SUPER / 16; g++) {
        round_group(x + 16 * g, 16, d * (float)out->group_scale[g], 0, -limit, limit - 1,
                    out->code + 16 * g);
    }
}

static void choose_q3_k(const encode_input *in, decoded_block *out) {
    enum { LIMIT = 4, SCALE_LIMIT = 32 };
    const bool important = in->importance != NULL;
    float weight[SUPER], scale[SUPER / 16], sums[SUPER / 16];
    if (important) {
        important_weights(in, 2, weight);
        sum_groups(weight, 16, sums);
    }
    for (int at = 0; at < SUPER; at += 16) {
        const search_group group = {in->x + at, important ? weight + at : NULL, 16};
        scale[at / 16] = important ? search_scale(&group, LIMIT, out->code + at)
                                   : search_scale_by_codes(&group, LIMIT, out->code + at);
    }
    const float largest = search_largest(scale, SUPER / 16);
    if (important) {
        const search_group scales = {scale, sums, SUPER / 16};
        out->scale = float_to_half(search_scale(&scales, SCALE_LIMIT, out->group_scale));
        for (int g = 0; g < SUPER / 16; g++) {
            out->group_scale[g] -= SCALE_LIMIT;
        }
    } else if (largest == 0) {
        memset(out->group_scale, -SCALE_LIMIT, sizeof out->group_scale);
    } else {
        round_signed_scales(scale, largest, SCALE_LIMIT, out);
    }
    round_groups(in->x, LIMIT, out);
}

static void choose_q6_k(const encode_input *in, decoded_block *out) {
    enum { LIMIT = 32, SCALE_LIMIT = 128 };
    float squares[SUPER], scale[SUPER / 16];
    for (int i = 0; i < SUPER; i++) {
        squares[i] = in->x[i] * in->x[i];
    }
    const float *weight = in->importance != NULL ? in->importance : squares;
    for (int at = 0; at < SUPER; at += 16) {
        const search_group group = {in->x + at, weight + at, 16};
        scale[at / 16] = search_scale(&group, LIMIT, out->code + at);
    }
    const float largest = search_largest(scale, SUPER / 16);
    if (fabsf(largest) < SEARCH_ZERO) {
        memset(out->code, 0, sizeof out->code);
    } else {
        round_signed_scales(scale, largest, SCALE_LIMIT, out);
        round_groups(in->x, LIMIT, out);
    }
}

const format_info formats_k[] = {
    {10, SUPER, 84, EDGE_LAYOUT_C2MB16, EDGE_TABLE_NONE, .decode = decode_q2_k,
     .choose = choose_q2_k, .store = store_q2_k},
    {11, SUPER, 110, EDGE_LAYOUT_C3B16, EDGE_TABLE_MINUS_4, .decode = decode_q3_k,
     .choose = choose_q3_k, .store = store_q3_k},
    {12, SUPER, 144, EDGE_LAYOUT_C4MB32, EDGE_TABLE_NONE, .decode = decode_q4_k,
     .choose = choose_q4_k, .store = store_q4_k},
    {13, SUPER, 176, EDGE_LAYOUT_C5MB32, EDGE_TABLE_NONE, .decode = decode_q5_k,
     .choose = choose_q5_k, .store = store_q5_k},
    {14, SUPER, 210, EDGE_LAYOUT_C6B16, EDGE_TABLE_MINUS_32, .decode = decode_q6_k,
     .choose = choose_q6_k, .store = store_q6_k},
    {0},
};
