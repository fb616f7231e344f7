/* Blocks with float scales: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4 of 32 weights; Q1_0 of 128,
 * Q2_0 of 64 or, in a fork of ggml, 128; NVFP4 of 64.
 *
 *   Q4_0    fp16 d, u8 q[16]                      value = d * (code - 8)
 *   Q4_1    fp16 d, fp16 m, u8 q[16]              value = d * code + m
 *   Q5_0    fp16 d, u32 high, u8 q[16]            value = d * (code - 16)
 *   Q5_1    fp16 d, fp16 m, u32 high, u8 q[16]    value = d * code + m
 *   Q8_0    fp16 d, i8 q[32]                      value = d * code
 *   IQ4_NL  fp16 d, u8 q[16]                      value = d * iq4_nl[code]
 *   MXFP4   u8 e, u8 q[16]                        value = 2^(e - 128) * mxfp4[code]
 *   Q1_0    fp16 d, u8 q[16]                      value = d * (2 * code - 1)
 *   Q2_0    fp16 d, u8 q[16 or 32]                value = d * (code - 1)
 *   NVFP4   u8 e[4], u8 q[32]                     value = scale / 2 * mxfp4[code]
 * k 0..15 in the low nibbles, 16..31 in the high; bit k of high: the fifth bit of code k. A byte
 * of Q1_0 has the codes of 8 k, one of Q2_0 those of 4, the first in its lowest bits.
 * NVFP4 has a scale for 16 k each, whose codes are 8 bytes, k 0..7 in the low nibbles. e: three
 * bits of mantissa below four of exponent, 1.0 at exponent 7, denormals at 0. Byte 0x7f, not a
 * number, means zero; bit 7 says nothing.
 *
 * Scales and codes are chosen as ggml's quantisers do (ggml-quants.c), to the bit.
 */
#include <math.h>
#include <string.h>

#include "formats.h"
#include "numbers.h"
#include "search.h"

/* ---- decoding ---------------------------------------------------------------------------- */

static void nibbles(const uint8_t q[16], int8_t code[GROUP]) {
    for (int i = 0; i < 16; i++) {
        code[i] = q[i] & 15;
        code[i + 16] = q[i] >> 4;
    }
}

static void fifth_bits(const uint8_t high[4], int8_t code[GROUP]) {
    for (int k = 0; k < GROUP; k++) {
        code[k] |= (high[k / 8] >> k % 8 & 1) << 4;
    }
}

static void decode_q4_0(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    nibbles(block + 2, out->code);
}

static void decode_q4_1(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    out->min = read_u16(block + 2);
    nibbles(block + 4, out->code);
}

static void decode_q5_0(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    nibbles(block + 6, out->code);
    fifth_bits(block + 2, out->code);
}

static void decode_q5_1(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    out->min = read_u16(block + 2);
    nibbles(block + 8, out->code);
    fifth_bits(block + 4, out->code);
}

static void decode_q8_0(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    memcpy(out->code, block + 2, GROUP);
}

/* 2^(e - 128) as bfloat16; 2^-128 and 2^-127 are denormal. */
static uint16_t mxfp4_scale(int e) { return (uint16_t)(e < 2 ? 0x20 << e : (e - 1) << 7); }

static void decode_mxfp4(const uint8_t *block, decoded_block *out) {
    out->scale = mxfp4_scale(block[0]);
    nibbles(block + 1, out->code);
}

static void decode_q1_0(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    for (int k = 0; k < 128; k++) {
        out->code[k] = block[2 + k / 8] >> k % 8 & 1;
    }
}

static void two_bits(const uint8_t *block, int n, decoded_block *out) {
    out->scale = read_u16(block);
    for (int k = 0; k < n; k++) {
        out->code[k] = block[2 + k / 4] >> k % 4 * 2 & 3;
    }
}

static void decode_q2_0(const uint8_t *block, decoded_block *out) { two_bits(block, 64, out); }

static void decode_q2_0_128(const uint8_t *block, decoded_block *out) { two_bits(block, 128, out); }

/* To m * 2^(e' - 10): 8 more, but for denormals. */
static int8_t nvfp4_scale(unsigned byte) {
    const unsigned e = byte >> 3 & 15, mantissa = byte & 7;
    return (int8_t)(e == 0 ? mantissa : (e - 1) << 4 | 8 | mantissa);
}

static void decode_nvfp4(const uint8_t *block, decoded_block *out) {
    for (int g = 0; g < 4; g++) {
        if (block[g] != 0x7f) {
            out->group_scale[g] = nvfp4_scale(block[g]);
        }
        for (int i = 0; i < 8; i++) {
            out->code[16 * g + i] = block[4 + 8 * g + i] & 15;
            out->code[16 * g + 8 + i] = block[4 + 8 * g + i] >> 4;
        }
    }
}

/* ---- storing ----------------------------------------------------------------------------- */

static void put_nibbles(const int8_t code[GROUP], uint8_t q[16]) {
    for (int i = 0; i < 16; i++) {
        q[i] = (uint8_t)((code[i] & 15) | (code[i + 16] & 15) << 4);
    }
}

static void put_fifth_bits(const int8_t code[GROUP], uint8_t high[4]) {
    for (int j = 0; j < 4; j++) {
        unsigned bits = 0;
        for (int i = 0; i < 8; i++) {
            bits |= (code[8 * j + i] >> 4 & 1u) << i;
        }
        high[j] = (uint8_t)bits;
    }
}

static void store_q4_0(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    put_nibbles(in->code, block + 2);
}

static void store_q4_1(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    write_u16(block + 2, in->min);
    put_nibbles(in->code, block + 4);
}

static void store_q5_0(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    put_fifth_bits(in->code, block + 2);
    put_nibbles(in->code, block + 6);
}

static void store_q5_1(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    write_u16(block + 2, in->min);
    put_fifth_bits(in->code, block + 4);
    put_nibbles(in->code, block + 8);
}

static void store_q8_0(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    memcpy(block + 2, in->code, GROUP);
}

static void store_mxfp4(const decoded_block *in, uint8_t *block) {
    block[0] = (uint8_t)(in->scale < 0x80 ? in->scale >> 6 : (in->scale >> 7) + 1);
    put_nibbles(in->code, block + 1);
}

/* codes of 8 / per_byte bits, the first lowest. */
static void put_codes(const int8_t *code, int n, int per_byte, uint8_t *q) {
    for (int j = 0; j < n / per_byte; j++) {
        unsigned byte = 0;
        for (int i = 0; i < per_byte; i++) {
            byte |= (unsigned)code[per_byte * j + i] << i * 8 / per_byte;
        }
        q[j] = (uint8_t)byte;
    }
}

static void store_q1_0(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    put_codes(in->code, 128, 8, block + 2);
}

static void store_q2_0(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    put_codes(in->code, 64, 4, block + 2);
}

static void store_q2_0_128(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    put_codes(in->code, 128, 4, block + 2);
}

static void store_nvfp4(const decoded_block *in, uint8_t *block) {
    for (int g = 0; g < 4; g++) {
        const unsigned scale = (uint8_t)in->group_scale[g];
        const unsigned byte = scale & 8 ? ((scale >> 4) + 1) << 3 | (scale & 7) : scale;
        block[g] = (uint8_t)(byte != 0x7f ? byte : 0xff);
        for (int i = 0; i < 8; i++) {
            const int8_t *code = in->code + 16 * g + i;
            block[4 + 8 * g + i] = (uint8_t)(code[0] | code[8] << 4);
        }
    }
}

/* ---- choosing scales and codes ------------------------------------------------------------ */

static float inverse(float scale) { return scale != 0 ? 1 / scale : 0; }

/* Codes around limit. Without importance the largest element gets code 0. */
static void choose_around(const encode_input *in, int limit, decoded_block *out) {
    if (in->importance != NULL) {
        float error_weight[GROUP];
        search_error_weights(in->x, in->importance, in->row_square, GROUP, error_weight);
        const search_group group = {in->x, error_weight, GROUP};
        out->scale = float_to_half(search_scale(&group, limit, out->code));
        return;
    }
    const float scale = search_largest(in->x, GROUP) / (float)-limit, factor = inverse(scale);
    out->scale = float_to_half(scale);
    for (int i = 0; i < GROUP; i++) {
        const int32_t code = whole_part(in->x[i] * factor + ((float)limit + 0.5f));
        out->code[i] = (int8_t)(code < 2 * limit - 1 ? code : 2 * limit - 1);
    }
}

static void choose_q4_0(const encode_input *in, decoded_block *out) { choose_around(in, 8, out); }
static void choose_q5_0(const encode_input *in, decoded_block *out) { choose_around(in, 16, out); }

/* Integers in the order of the floats with these bits, and back: a vector of minima of integers is
 * plain C, one of floats is not. */
static inline int32_t in_order(int32_t bits) { return bits < 0 ? bits ^ 0x7fffffff : bits; }

/* The smallest and the largest of a group; of zeros that differ in sign the first. */
static void range(const float *x, float *min, float *max) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int i = 0; i < GROUP; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        const int32_t key = in_order(bits);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    low = in_order(low), high = in_order(high);
    memcpy(min, &low, sizeof low);
    memcpy(max, &high, sizeof high);
    for (int i = GROUP - 1; i >= 0 && (*min == 0 || *max == 0); i--) {
        *min = x[i] == *min ? x[i] : *min;
        *max = x[i] == *max ? x[i] : *max;
    }
}

/* Codes above a min. Without importance the range of the weights is that of the codes. */
static void choose_above(const encode_input *in, int max_code, decoded_block *out) {
    static const search_steps steps = {-0.9f, 0.05f, 36, 0};
    float scale, min, max;
    if (in->importance != NULL) {
        float error_weight[GROUP];
        search_error_weights(in->x, in->importance, in->row_square, GROUP, error_weight);
        const search_group group = {in->x, error_weight, GROUP};
        scale = search_scale_min(&group, max_code, &steps, out->code, &min);
    } else {
        range(in->x, &min, &max);
        scale = (max - min) / (float)max_code;
        const float factor = inverse(scale);
        for (int i = 0; i < GROUP; i++) {
            const int32_t code = whole_part((in->x[i] - min) * factor + 0.5f);
            out->code[i] = (int8_t)(code < max_code ? code : max_code);
        }
    }
    out->scale = float_to_half(scale);
    out->min = float_to_half(min);
}

static void choose_q4_1(const encode_input *in, decoded_block *out) { choose_above(in, 15, out); }
static void choose_q5_1(const encode_input *in, decoded_block *out) { choose_above(in, 31, out); }

static void choose_q8_0(const encode_input *in, decoded_block *out) {
    const float scale = search_magnitude(in->x, GROUP) / 127, factor = inverse(scale);
    out->scale = float_to_half(scale);
    for (int i = 0; i < GROUP; i++) {
        out->code[i] = (int8_t)nearest_away(in->x[i] * factor);
    }
}

static void choose_iq4_nl(const encode_input *in, decoded_block *out) {
    const float *x = in->x;
    float square = 0, error_weight[GROUP];
    for (int i = 0; i < GROUP; i++) {
        square += x[i] * x[i];
        error_weight[i] = x[i] * x[i];
    }
    if (in->importance != NULL) {
        search_error_weights(x, in->importance, square * (2.0f / GROUP), GROUP, error_weight);
    }
    const search_group group = {x, error_weight, GROUP};
    const float scale = search_scale_iq4(&group);
    out->scale = float_to_half(scale);
    nearest_iq4(x, inverse(scale), GROUP, out->code);
}

/* The code of MXFP4 whose value times unit is nearest; of two the smaller magnitude. */
static void nearest_mxfp4(const float *x, float unit, int n, int8_t *code) {
    static const float middle[] = {0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10};
    for (int i = 0; i < n; i++) {
        int magnitude = 0;
        for (int j = 0; j < 7; j++) {
            magnitude += fabsf(x[i]) > middle[j] * unit;
        }
        code[i] = (int8_t)(magnitude | (x[i] < 0 && magnitude != 0 ? 8 : 0));
    }
}

/* The largest magnitude comes to 4 .. 8 units: 8 and more become 12, the largest code. */
static void choose_mxfp4(const encode_input *in, decoded_block *out) {
    const float magnitude = search_magnitude(in->x, GROUP);
    int e = 0;
    if (magnitude > 0) { /* the logarithm rounded to float: it may reach the next power of two */
        const float exponent = (float)(number_log(magnitude) * 0x1.71547652b82fep0);
        const int whole = (int)exponent;
        e = whole - ((float)whole > exponent) - 2 + 127;
    }
    /* The reference wraps below 2^-125: its scale is then enormous and all codes are 0. */
    e = e > 0 ? e : 0;
    out->scale = mxfp4_scale(e);
    nearest_mxfp4(in->x, bfloat_to_float(out->scale), GROUP, out->code);
}

static void choose_q1_0(const encode_input *in, decoded_block *out) {
    float sum = 0;
    for (int i = 0; i < 128; i++) {
        sum += fabsf(in->x[i]);
        out->code[i] = in->x[i] >= 0;
    }
    out->scale = float_to_half(sum / 128);
}

/* The reference has blocks of 64; those of 128 take the same rule. */
static void choose_q2_0(const encode_input *in, int n, decoded_block *out) {
    const float scale = search_magnitude(in->x, n), factor = inverse(scale);
    out->scale = float_to_half(scale);
    for (int i = 0; i < n; i++) { /* -1, 0 or 1: code 3, twice the scale, is never the nearest */
        out->code[i] = (int8_t)(nearest_away(in->x[i] * factor) + 1);
    }
}

static void choose_q2_0_64(const encode_input *in, decoded_block *out) { choose_q2_0(in, 64, out); }
static void choose_q2_0_128(const encode_input *in, decoded_block *out) {
    choose_q2_0(in, 128, out);
}

/* A positive number to 4 bits of exponent and 3 of mantissa, as the reference does: ties up, and
 * from 248 on the largest, 448. */
static unsigned scale_byte(float f) {
    if (f < 0x1p-6f) { /* denormal: multiples of 2^-9 */
        const int mantissa = (int)(f * 512 + 0.5f);
        return mantissa < 7 ? (unsigned)mantissa : 7;
    }
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint32_t byte = ((bits + 0x80000) >> 20) - (120 << 3);
    return byte < 0x78 ? byte : 0x7e;
}

static void choose_nvfp4(const encode_input *in, decoded_block *out) {
    for (int g = 0; g < 4; g++) {
        const float *x = in->x + 16 * g;
        const float wanted = search_magnitude(x, 16) / 6;
        if (wanted > 448) { /* the reference clips; here the block counts as out of range */
            out->scale = float_to_half(INFINITY);
        }
        const unsigned scale = (uint8_t)nvfp4_scale(scale_byte(wanted));
        out->group_scale[g] = (int8_t)scale;
        if (scale != 0) {
            const float unit = (float)((scale & 15) << (scale >> 4)) * 0x1p-10f;
            nearest_mxfp4(x, unit, 16, out->code + 16 * g);
        }
    }
}

const format_info formats_legacy[] = {
    {2, GROUP, 18, EDGE_LAYOUT_C4H32, EDGE_TABLE_MINUS_8, .decode = decode_q4_0,
     .choose = choose_q4_0, .store = store_q4_0},
    {3, GROUP, 20, EDGE_LAYOUT_C4MH32, EDGE_TABLE_NONE, .decode = decode_q4_1,
     .choose = choose_q4_1, .store = store_q4_1},
    {6, GROUP, 22, EDGE_LAYOUT_C5H32, EDGE_TABLE_MINUS_16, .decode = decode_q5_0,
     .choose = choose_q5_0, .store = store_q5_0},
    {7, GROUP, 24, EDGE_LAYOUT_C5MH32, EDGE_TABLE_NONE, .decode = decode_q5_1,
     .choose = choose_q5_1, .store = store_q5_1},
    {8, GROUP, 34, EDGE_LAYOUT_C8H32, EDGE_TABLE_NONE, .decode = decode_q8_0, .choose = choose_q8_0,
     .store = store_q8_0},
    {20, GROUP, 18, EDGE_LAYOUT_C4H32, EDGE_TABLE_IQ4_NL, .decode = decode_q4_0,
     .choose = choose_iq4_nl, .store = store_q4_0},
    {39, GROUP, 17, EDGE_LAYOUT_C4E32, EDGE_TABLE_MXFP4, .decode = decode_mxfp4,
     .choose = choose_mxfp4, .store = store_mxfp4},
    {40, 64, 36, EDGE_LAYOUT_C4U16, EDGE_TABLE_MXFP4, .decode = decode_nvfp4,
     .choose = choose_nvfp4, .store = store_nvfp4},
    {41, 128, 18, EDGE_LAYOUT_C1H128, EDGE_TABLE_SIGN, .decode = decode_q1_0, .choose = choose_q1_0,
     .store = store_q1_0},
    {42, 64, 18, EDGE_LAYOUT_C2H64, EDGE_TABLE_MINUS_1, .decode = decode_q2_0,
     .choose = choose_q2_0_64, .store = store_q2_0},
    {42 | 128 << 16, 128, 34, EDGE_LAYOUT_C2H128, EDGE_TABLE_MINUS_1, .decode = decode_q2_0_128,
     .choose = choose_q2_0_128, .store = store_q2_0_128},
    {0},
};
