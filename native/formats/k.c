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
#include <string.h>

#include "formats.h"

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

static void decode_q2_k(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block + 80);
    out->min = read_u16(block + 82);
    for (int g = 0; g < 16; g++) {
        out->group_scale[g] = block[g] & 15;
        out->group_min[g] = block[g] >> 4;
    }
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
static void six_bits(const uint8_t s[12], decoded_block *out) {
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
    six_bits(block + 4, out);
    add_fields(block + 16, 4, 32, 0, out->code);
}

static void decode_q5_k(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    out->min = read_u16(block + 2);
    six_bits(block + 4, out);
    add_fields(block + 48, 4, 32, 0, out->code);
    add_fields(block + 16, 1, 32, 4, out->code);
}

static void decode_q6_k(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block + 208);
    memcpy(out->group_scale, block + 192, 16);
    add_fields(block, 4, 64, 0, out->code);
    add_fields(block + 128, 2, 32, 4, out->code);
}

const format_info formats_k[] = {
    {10, SUPER, 84, EDGE_LAYOUT_C2MB16, EDGE_TABLE_NONE, .decode = decode_q2_k},
    {11, SUPER, 110, EDGE_LAYOUT_C3B16, EDGE_TABLE_MINUS_4, .decode = decode_q3_k},
    {12, SUPER, 144, EDGE_LAYOUT_C4MB32, EDGE_TABLE_NONE, .decode = decode_q4_k},
    {13, SUPER, 176, EDGE_LAYOUT_C5MB32, EDGE_TABLE_NONE, .decode = decode_q5_k},
    {14, SUPER, 210, EDGE_LAYOUT_C6B16, EDGE_TABLE_MINUS_32, .decode = decode_q6_k},
    {0},
};
