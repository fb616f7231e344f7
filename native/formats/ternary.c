/* Super-blocks of 256 weights -1, 0, 1 with a fp16 scale: TQ1_0, TQ2_0. value = d * (code - 1).
 *
 *   TQ1_0  u8 q[48], u8 r[4], fp16 d
 *          A byte holds 5 codes (of r: 4) as digits to the base 3 of a fraction of 256, rounded up:
 *          the first is the whole part of 3 * byte / 256, the rest are in 3 * byte modulo 256.
 *          q[0..31]: digit n of byte i is k 32 n + i; q[32..47]: k 160 + 16 n + i;
 *          r: k 240 + 4 n + i.
 *   TQ2_0  u8 q[64], fp16 d
 *          Bits 2 j of byte 32 h + i: k 128 h + 32 j + i. A code of 3 is possible, and means 2 d.
 *
 * Scales and codes are chosen as ggml's quantisers do (ggml-quants.c), to the bit.
 */
#include "formats.h"
#include "search.h"

/* n codes of each of `bytes` bytes. */
static void digits(const uint8_t *q, int bytes, int n, int8_t *code) {
    for (int i = 0; i < bytes; i++) {
        unsigned rest = q[i];
        for (int j = 0; j < n; j++) {
            code[j * bytes + i] = (int8_t)(rest * 3 >> 8);
            rest = rest * 3 & 255;
        }
    }
}

static void one_scale(uint16_t scale, decoded_block *out) {
    out->scale = scale;
    for (int g = 0; g < SUPER / GROUP; g++) {
        out->group_scale[g] = 1;
    }
}

static void decode_tq1_0(const uint8_t *block, decoded_block *out) {
    one_scale(read_u16(block + 52), out);
    digits(block, 32, 5, out->code);
    digits(block + 32, 16, 5, out->code + 160);
    digits(block + 48, 4, 4, out->code + 240);
}

static void decode_tq2_0(const uint8_t *block, decoded_block *out) {
    one_scale(read_u16(block + 64), out);
    int8_t *code = out->code;
    for (int h = 0; h < 2; h++) {
        for (int j = 0; j < 4; j++, code += 32) {
            for (int i = 0; i < 32; i++) {
                code[i] = block[32 * h + i] >> (2 * j) & 3;
            }
        }
    }
}

/* The inverse of digits(), of n codes a byte. */
static void put_digits(const int8_t *code, int bytes, int n, uint8_t *q) {
    for (int i = 0; i < bytes; i++) {
        unsigned number = 0;
        for (int j = 0; j < 5; j++) {
            number = 3 * number + (j < n ? (unsigned)code[j * bytes + i] : 0);
        }
        q[i] = (uint8_t)((number * 256 + 242) / 243);
    }
}

static void store_tq1_0(const decoded_block *in, uint8_t *block) {
    put_digits(in->code, 32, 5, block);
    put_digits(in->code + 160, 16, 5, block + 32);
    put_digits(in->code + 240, 4, 4, block + 48);
    write_u16(block + 52, in->scale);
}

static void store_tq2_0(const decoded_block *in, uint8_t *block) {
    for (int i = 0; i < 64; i++) {
        const int8_t *code = in->code + i / 32 * 128 + i % 32;
        block[i] = (uint8_t)(code[0] | code[32] << 2 | code[64] << 4 | code[96] << 6);
    }
    write_u16(block + 64, in->scale);
}

/* The largest magnitude is the scale: a code of 3 is never chosen. */
static void choose_ternary(const encode_input *in, decoded_block *out) {
    const float scale = search_magnitude(in->x, SUPER);
    const float factor = scale != 0 ? 1 / scale : 0;
    one_scale(float_to_half(scale), out);
    for (int i = 0; i < SUPER; i++) {
        out->code[i] = (int8_t)(nearest_away(in->x[i] * factor) + 1);
    }
}

const format_info formats_ternary[] = {
    {34, SUPER, 54, EDGE_LAYOUT_C2B32, EDGE_TABLE_MINUS_1, .decode = decode_tq1_0,
     .choose = choose_ternary, .store = store_tq1_0},
    {35, SUPER, 66, EDGE_LAYOUT_C2B32, EDGE_TABLE_MINUS_1, .decode = decode_tq2_0,
     .choose = choose_ternary, .store = store_tq2_0},
    {0},
};
