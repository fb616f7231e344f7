/* Blocks of 32 with fp16 scales: Q4_0, Q4_1, Q8_0, IQ4_NL.
 *
 *   Q4_0    fp16 d, u8 q[16]           value = d * (code - 8)
 *   Q4_1    fp16 d, fp16 m, u8 q[16]   value = d * code + m
 *   IQ4_NL  fp16 d, u8 q[16]           value = d * iq4_nl_values[code]
 *   Q8_0    fp16 d, i8 q[32]           value = d * code
 * k 0..15 in the low nibbles, 16..31 in the high.
 */
#include <string.h>

#include "formats.h"

const int8_t iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};

static void nibbles(const uint8_t q[16], int8_t code[GROUP]) {
    for (int i = 0; i < 16; i++) {
        code[i] = q[i] & 15;
        code[i + 16] = q[i] >> 4;
    }
}

static void decode_q4_0(const uint8_t *block, decoded_group *out) {
    out->scale = read_u16(block);
    out->min = 0;
    nibbles(block + 2, out->code);
}

static void decode_q4_1(const uint8_t *block, decoded_group *out) {
    out->scale = read_u16(block);
    out->min = read_u16(block + 2);
    nibbles(block + 4, out->code);
}

static void decode_q8_0(const uint8_t *block, decoded_group *out) {
    out->scale = read_u16(block);
    out->min = 0;
    memcpy(out->code, block + 2, GROUP);
}

const format_info formats_legacy[] = {
    {2, GROUP, 18, EDGE_LAYOUT_C4H32, EDGE_TABLE_MINUS_8, decode_q4_0},
    {3, GROUP, 20, EDGE_LAYOUT_C4MH32, EDGE_TABLE_NONE, decode_q4_1},
    {8, GROUP, 34, EDGE_LAYOUT_C8H32, EDGE_TABLE_NONE, decode_q8_0},
    {20, GROUP, 18, EDGE_LAYOUT_C4H32, EDGE_TABLE_IQ4_NL, decode_q4_0},
};
const int32_t n_formats_legacy = sizeof formats_legacy / sizeof *formats_legacy;
