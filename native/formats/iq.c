/* Super-blocks of 256 with a fp16 scale d whose codes are not evenly spaced: the IQ types.
 *
 *   IQ4_XS   fp16 d, u16 high, u8 low[4], u8 q[128]
 *            32: d * scale * iq4_nl[code]; scale + 32: nibble g of low | pair g of high << 4.
 *            16 bytes a group: k 0..15 in the low nibbles, 16..31 in the high.
 *
 * The others have 8 (IQ3: 4) weights in an entry of a grid; scales are unit * d * (2 s + 1), signs
 * are bits, the first weight's lowest. Sign codes of 7 bits leave out the last weight's bit, which
 * makes the number of negative weights even.
 *
 *   IQ1_S    fp16 d, u8 index[32], u16 h[8]
 *            32: h: 4 x 3 upper bits of the indices, 3 bits s, 1 bit: delta is negative
 *   IQ1_M    u8 index[32], u8 h[16], u16 s[4]
 *            16: a nibble of h per index: 3 upper bits, 1 bit: delta is negative; s[i]: 4 x 3 bits,
 *            and above them bits 4 i .. 4 i + 3 of fp16 d
 *            value = d * (2 s + 1) * (-1, 0 or 1, + 1/8 or - 1/8)
 *   IQ2_XXS  fp16 d, 8 of: u8 index[4], u32: 4 sign codes, 4 bits s                32, unit 1/8
 *   IQ2_XS   fp16 d, u16 x[32]: index of 9 bits, sign code; u8 s[8]: nibbles       16
 *   IQ2_S    fp16 d, u8 index[32], u8 sign[32], u8 h[8]: pairs above the indices,  16
 *            u8 s[8]: nibbles
 *   IQ3_XXS  fp16 d, u8 index[64], u32 x[8]: 4 sign codes, 4 bits s                32, unit 1/4
 *   IQ3_S    fp16 d, u8 index[64], u8 h[8]: a bit above each index, u8 sign[32],   32, unit 1
 *            u8 s[4]: nibbles
 */
#include <string.h>

#include "encode_iq.h"

static void decode_iq4_xs(const uint8_t *block, decoded_block *out) {
    const uint16_t high = read_u16(block + 2);
    out->scale = read_u16(block);
    for (int g = 0; g < 8; g++) {
        const int low = block[4 + g / 2] >> (g % 2 * 4) & 15;
        out->group_scale[g] = (int8_t)((low | (high >> (2 * g) & 3) << 4) - 32);
        const uint8_t *q = block + 8 + 16 * g;
        for (int i = 0; i < 16; i++) {
            out->code[GROUP * g + i] = q[i] & 15;
            out->code[GROUP * g + 16 + i] = q[i] >> 4;
        }
    }
}

/* ---- IQ1 --------------------------------------------------------------------------------- */

/* 8 codes: the weights of entry `index`, plus 1, with the sign of delta above them. */
static void iq1_codes(int index, bool negative, int8_t code[8]) {
    for (int i = 0; i < 8; i++) {
        code[i] = (int8_t)((iq1_grid[index] >> (2 * i) & 3) | negative << 2);
    }
}

static void decode_iq1_s(const uint8_t *block, decoded_block *out) {
    out->scale = read_u16(block);
    for (int g = 0; g < 8; g++) {
        const uint16_t h = read_u16(block + 34 + 2 * g);
        out->group_scale[g] = (int8_t)(2 * (h >> 12 & 7) + 1);
        for (int i = 0; i < 4; i++) {
            const int index = block[2 + 4 * g + i] | (h >> (3 * i) & 7) << 8;
            iq1_codes(index, h >> 15, out->code + GROUP * g + 8 * i);
        }
    }
}

static void decode_iq1_m(const uint8_t *block, decoded_block *out) {
    const uint8_t *h = block + 32;
    unsigned scale = 0;
    for (int i = 0; i < 4; i++) {
        const uint16_t s = read_u16(block + 48 + 2 * i);
        scale |= (unsigned)(s >> 12) << (4 * i);
        for (int j = 0; j < 4; j++) {
            out->group_scale[4 * i + j] = (int8_t)(2 * (s >> (3 * j) & 7) + 1);
        }
    }
    out->scale = (uint16_t)scale;
    for (int i = 0; i < 32; i++) {
        const int nibble = h[i / 2] >> (i % 2 * 4) & 15;
        iq1_codes(block[i] | (nibble & 7) << 8, nibble >> 3, out->code + 8 * i);
    }
}

/* ---- IQ2 and IQ3 ------------------------------------------------------------------------- */

static uint32_t read_u32(const uint8_t *p) { return read_u16(p) | (uint32_t)read_u16(p + 2) << 16; }

/* A sign code of 7 bits to 8. */
static uint8_t even_signs(uint32_t seven) {
    uint32_t odd = seven & 127;
    odd ^= odd >> 4;
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    return (uint8_t)((seven & 127) | odd << 7);
}

/* Sign codes and s of a group of 32. */
static void signs_and_scale(uint32_t bits, int g, decoded_grid *out) {
    for (int i = 0; i < 4; i++) {
        out->sign[4 * g + i] = even_signs(bits >> (7 * i));
    }
    out->group_scale[g] = (uint8_t)(bits >> 28);
}

static void nibbles(const uint8_t *src, int n, uint8_t *out) {
    for (int i = 0; i < n; i++) {
        out[i] = src[i / 2] >> (i % 2 * 4) & 15;
    }
}

static void decode_iq2_xxs(const uint8_t *block, decoded_grid *out) {
    out->scale = read_u16(block);
    for (int g = 0; g < 8; g++) {
        const uint8_t *group = block + 2 + 8 * g;
        for (int i = 0; i < 4; i++) {
            out->index[4 * g + i] = group[i];
        }
        signs_and_scale(read_u32(group + 4), g, out);
    }
}

static void decode_iq2_xs(const uint8_t *block, decoded_grid *out) {
    out->scale = read_u16(block);
    for (int i = 0; i < 32; i++) {
        const uint16_t x = read_u16(block + 2 + 2 * i);
        out->index[i] = x & 511;
        out->sign[i] = even_signs(x >> 9);
    }
    nibbles(block + 66, 16, out->group_scale);
}

static void decode_iq2_s(const uint8_t *block, decoded_grid *out) {
    const uint8_t *h = block + 66;
    out->scale = read_u16(block);
    for (int i = 0; i < 32; i++) {
        out->index[i] = (uint16_t)(block[2 + i] | (h[i / 4] >> (i % 4 * 2) & 3) << 8);
    }
    memcpy(out->sign, block + 34, 32);
    nibbles(block + 74, 16, out->group_scale);
}

static void decode_iq3_xxs(const uint8_t *block, decoded_grid *out) {
    out->scale = read_u16(block);
    for (int i = 0; i < 64; i++) {
        out->index[i] = block[2 + i];
    }
    for (int g = 0; g < 8; g++) {
        signs_and_scale(read_u32(block + 66 + 4 * g), g, out);
    }
}

static void decode_iq3_s(const uint8_t *block, decoded_grid *out) {
    const uint8_t *h = block + 66;
    out->scale = read_u16(block);
    for (int i = 0; i < 64; i++) {
        out->index[i] = (uint16_t)(block[2 + i] | (h[i / 8] >> i % 8 & 1) << 8);
    }
    memcpy(out->sign, block + 74, 32);
    nibbles(block + 106, 8, out->group_scale);
}

#define BLOCK(type, bytes, layout, table, name)                                                    \
    type, SUPER, bytes, layout, table, .decode = decode_##name, .choose = choose_##name,           \
        .store = store_##name
#define GRID(type, bytes, layout, table, name, small)                                              \
    type, SUPER, bytes, layout, table, .compact = small, .decode_grid = decode_##name,             \
        .choose_grid = choose_##name, .store_grid = store_##name, .tables_new = tables_##name

const format_info formats_iq[] = {
    {BLOCK(23, 136, EDGE_LAYOUT_C4B32, EDGE_TABLE_IQ4_NL, iq4_xs)},
    {BLOCK(19, 50, EDGE_LAYOUT_C3B32, EDGE_TABLE_IQ1, iq1_s), .tables_new = tables_iq1,
     .needs_importance = true},
    {BLOCK(29, 56, EDGE_LAYOUT_C3B16, EDGE_TABLE_IQ1, iq1_m), .tables_new = tables_iq1},
    {GRID(16, 66, EDGE_LAYOUT_C3B32, EDGE_TABLE_IQ2, iq2_xxs, EDGE_LAYOUT_G8X8B32),
     .needs_importance = true},
    {GRID(17, 74, EDGE_LAYOUT_C3B16, EDGE_TABLE_IQ2, iq2_xs, EDGE_LAYOUT_G9X8B16),
     .needs_importance = true},
    {GRID(22, 82, EDGE_LAYOUT_C3B16, EDGE_TABLE_IQ2, iq2_s, EDGE_LAYOUT_G10X8B16)},
    {GRID(18, 98, EDGE_LAYOUT_C4B32, EDGE_TABLE_IQ3_XXS, iq3_xxs, EDGE_LAYOUT_G8X4B32)},
    {GRID(21, 110, EDGE_LAYOUT_C4B32, EDGE_TABLE_IQ3_S, iq3_s, EDGE_LAYOUT_G9X4B32)},
    {0},
};
