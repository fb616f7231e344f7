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
 */
#include <string.h>

#include "formats.h"

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

static void decode_mxfp4(const uint8_t *block, decoded_block *out) {
    /* as bfloat16; 2^-128 and 2^-127 are denormal */
    out->scale = (uint16_t)(block[0] < 2 ? 0x20 << block[0] : (block[0] - 1) << 7);
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

static void decode_nvfp4(const uint8_t *block, decoded_block *out) {
    for (int g = 0; g < 4; g++) {
        const int e = block[g] >> 3 & 15, mantissa = block[g] & 7;
        if (block[g] != 0x7f) { /* to m * 2^(e' - 10): 8 more, but for denormals */
            out->group_scale[g] = (int8_t)(e == 0 ? mantissa : (e - 1) << 4 | 8 | mantissa);
        }
        for (int i = 0; i < 8; i++) {
            out->code[16 * g + i] = block[4 + 8 * g + i] & 15;
            out->code[16 * g + 8 + i] = block[4 + 8 * g + i] >> 4;
        }
    }
}

const format_info formats_legacy[] = {
    {2, GROUP, 18, EDGE_LAYOUT_C4H32, EDGE_TABLE_MINUS_8, .decode = decode_q4_0},
    {3, GROUP, 20, EDGE_LAYOUT_C4MH32, EDGE_TABLE_NONE, .decode = decode_q4_1},
    {6, GROUP, 22, EDGE_LAYOUT_C5H32, EDGE_TABLE_MINUS_16, .decode = decode_q5_0},
    {7, GROUP, 24, EDGE_LAYOUT_C5MH32, EDGE_TABLE_NONE, .decode = decode_q5_1},
    {8, GROUP, 34, EDGE_LAYOUT_C8H32, EDGE_TABLE_NONE, .decode = decode_q8_0},
    {20, GROUP, 18, EDGE_LAYOUT_C4H32, EDGE_TABLE_IQ4_NL, .decode = decode_q4_0},
    {39, GROUP, 17, EDGE_LAYOUT_C4E32, EDGE_TABLE_MXFP4, .decode = decode_mxfp4},
    {40, 64, 36, EDGE_LAYOUT_C4U16, EDGE_TABLE_MXFP4, .decode = decode_nvfp4},
    {41, 128, 18, EDGE_LAYOUT_C1H128, EDGE_TABLE_SIGN, .decode = decode_q1_0},
    {42, 64, 18, EDGE_LAYOUT_C2H64, EDGE_TABLE_MINUS_1, .decode = decode_q2_0},
    {42 | 128 << 16, 128, 34, EDGE_LAYOUT_C2H128, EDGE_TABLE_MINUS_1, .decode = decode_q2_0_128},
    {0},
};
