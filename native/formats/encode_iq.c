/* The search of IQ4_XS, and what writes the blocks that iq.c reads. */
#include <string.h>

#include "encode_iq.h"
#include "search.h"

/* With the bits of ggml's quantize_row_iq4_nl_impl. */
void choose_iq4_xs(const encode_input *in, decoded_block *out) {
    const float square = 2 * sum_of_squares(in->x) / SUPER;
    float scale[SUPER / GROUP];
    for (int g = 0; g < SUPER / GROUP; g++) {
        const float *x = in->x + GROUP * g;
        float error_weight[GROUP];
        if (in->importance != NULL) {
            search_error_weights(x, in->importance + GROUP * g, square, GROUP, error_weight);
        } else {
            for (int i = 0; i < GROUP; i++) {
                error_weight[i] = x[i] * x[i];
            }
        }
        scale[g] = search_scale_iq4(&(search_group){x, error_weight, GROUP});
    }
    const float unit = -search_largest(scale, SUPER / GROUP) / 32,
                inverse = unit != 0 ? 1 / unit : 0;
    out->scale = float_to_half(unit);
    for (int g = 0; g < SUPER / GROUP; g++) {
        const int s = clamped(nearest_int(inverse * scale[g]), -32, 31);
        const float step = unit * (float)s;
        out->group_scale[g] = (int8_t)s;
        nearest_iq4(in->x + GROUP * g, step != 0 ? 1 / step : 0, GROUP, out->code + GROUP * g);
    }
}

void store_iq4_xs(const decoded_block *in, uint8_t *block) {
    unsigned high = 0;
    write_u16(block, in->scale);
    for (int g = 0; g < 8; g++) {
        const unsigned s = (unsigned)(in->group_scale[g] + 32);
        high |= s >> 4 << (2 * g);
        block[4 + g / 2] = (uint8_t)(g % 2 == 0 ? s & 15 : block[4 + g / 2] | (s & 15) << 4);
        const int8_t *code = in->code + GROUP * g;
        for (int i = 0; i < 16; i++) {
            block[8 + 16 * g + i] = (uint8_t)(code[i] | code[16 + i] << 4);
        }
    }
    write_u16(block + 2, (uint16_t)high);
}

/* ---- IQ1 --------------------------------------------------------------------------------- */

/* Which entry 8 codes are. The grid ascends. */
static unsigned iq1_index(const int8_t code[8]) {
    unsigned entry = 0, first = 0;
    for (int i = 0; i < 8; i++) {
        entry |= (code[i] & 3u) << (2 * i);
    }
    for (unsigned half = 1024; half > 0; half /= 2) {
        first += iq1_grid[first + half] <= entry ? half : 0;
    }
    return first;
}

void store_iq1_s(const decoded_block *in, uint8_t *block) {
    write_u16(block, in->scale);
    for (int g = 0; g < 8; g++) {
        const int8_t *code = in->code + GROUP * g;
        unsigned h = (unsigned)(in->group_scale[g] / 2) << 12 | (code[0] >> 2 & 1u) << 15;
        for (int i = 0; i < 4; i++) {
            const unsigned index = iq1_index(code + 8 * i);
            block[2 + 4 * g + i] = (uint8_t)index;
            h |= index >> 8 << (3 * i);
        }
        write_u16(block + 34 + 2 * g, (uint16_t)h);
    }
}

void store_iq1_m(const decoded_block *in, uint8_t *block) {
    memset(block + 32, 0, 16);
    for (int i = 0; i < 32; i++) {
        const int8_t *code = in->code + 8 * i;
        const unsigned index = iq1_index(code), nibble = index >> 8 | (code[0] >> 2 & 1u) << 3;
        block[i] = (uint8_t)index;
        block[32 + i / 2] |= (uint8_t)(nibble << (i % 2 * 4));
    }
    for (int i = 0; i < 4; i++) {
        unsigned s = in->scale >> (4 * i) << 12;
        for (int j = 0; j < 4; j++) {
            s |= (unsigned)(in->group_scale[4 * i + j] / 2) << (3 * j);
        }
        write_u16(block + 48 + 2 * i, (uint16_t)s);
    }
}

/* ---- IQ2 and IQ3 ------------------------------------------------------------------------- */

/* Sign codes and s of a group of 32. */
static void write_signs_and_scale(const decoded_grid *in, int g, uint8_t *dst) {
    uint32_t bits = (uint32_t)in->group_scale[g] << 28;
    for (int i = 0; i < 4; i++) {
        bits |= (uint32_t)(in->sign[4 * g + i] & 127) << (7 * i);
    }
    write_u16(dst, (uint16_t)bits);
    write_u16(dst + 2, (uint16_t)(bits >> 16));
}

static void write_nibbles(const uint8_t *in, int n, uint8_t *dst) {
    for (int i = 0; i < n; i += 2) {
        dst[i / 2] = (uint8_t)(in[i] | in[i + 1] << 4);
    }
}

void store_iq2_xxs(const decoded_grid *in, uint8_t *block) {
    write_u16(block, in->scale);
    for (int g = 0; g < 8; g++) {
        uint8_t *group = block + 2 + 8 * g;
        for (int i = 0; i < 4; i++) {
            group[i] = (uint8_t)in->index[4 * g + i];
        }
        write_signs_and_scale(in, g, group + 4);
    }
}

void store_iq2_xs(const decoded_grid *in, uint8_t *block) {
    write_u16(block, in->scale);
    for (int i = 0; i < 32; i++) {
        write_u16(block + 2 + 2 * i, (uint16_t)(in->index[i] | (in->sign[i] & 127) << 9));
    }
    write_nibbles(in->group_scale, 16, block + 66);
}

void store_iq2_s(const decoded_grid *in, uint8_t *block) {
    write_u16(block, in->scale);
    memset(block + 66, 0, 8);
    for (int i = 0; i < 32; i++) {
        block[2 + i] = (uint8_t)in->index[i];
        block[66 + i / 4] |= (uint8_t)(in->index[i] >> 8 << (i % 4 * 2));
    }
    memcpy(block + 34, in->sign, 32);
    write_nibbles(in->group_scale, 16, block + 74);
}

void store_iq3_xxs(const decoded_grid *in, uint8_t *block) {
    write_u16(block, in->scale);
    for (int i = 0; i < 64; i++) {
        block[2 + i] = (uint8_t)in->index[i];
    }
    for (int g = 0; g < 8; g++) {
        write_signs_and_scale(in, g, block + 66 + 4 * g);
    }
}

void store_iq3_s(const decoded_grid *in, uint8_t *block) {
    write_u16(block, in->scale);
    memset(block + 66, 0, 8);
    for (int i = 0; i < 64; i++) {
        block[2 + i] = (uint8_t)in->index[i];
        block[66 + i / 8] |= (uint8_t)(in->index[i] >> 8 << i % 8);
    }
    memcpy(block + 74, in->sign, 32);
    write_nibbles(in->group_scale, 8, block + 106);
}
