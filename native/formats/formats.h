/* Disk formats: GGUF blocks decoded to codes and scales, and straight to float32.
 *
 * A format is one row of a table: how its blocks lie on disk, which panel layout holds them, and
 * the function that decodes one. */
#ifndef EDGE_FORMATS_H
#define EDGE_FORMATS_H

#include <stdbool.h>
#include <stdint.h>

#include "layouts.h"

/* One block of one row, decoded: 32, 64 or 128 weights with one scale, 64 with four scales of 8
 * bits, or a super-block of 256 whose groups of 32 or 16 have small integers for scales (and
 * minima) beside one float each for all. */
typedef struct {
    uint16_t scale, min;            /* fp16; of layouts with scale kind e bfloat16 */
    int8_t group_scale[SUPER / 16]; /* with scale kind u floats of 8 bits, as in layouts.h */
    uint8_t group_min[SUPER / 16];
    int8_t code[SUPER]; /* 0 .. 2^bits - 1; of 8-bit layouts signed */
} decoded_block;

/* A super-block of a type with a grid, decoded as far as its compact layout wants it. The scale of
 * a group is scale * (2 * group_scale + 1), times the unit of its table. */
typedef struct {
    uint16_t scale;                  /* fp16 */
    uint8_t group_scale[SUPER / 16]; /* 0..15, per group of 32 or 16 */
    uint16_t index[SUPER / 4];       /* per 4 or 8 weights: which entry of the grid */
    uint8_t sign[SUPER / 8];         /* bit i of byte j: weight 8 j + i is negative */
} decoded_grid;

/* The grid of a layout: 4 weights as nibbles or 8 as pairs of bits, k 0 lowest. They are codes of
 * the magnitudes in the type's table. */
typedef struct grid_info {
    const uint16_t *entries;
    const uint8_t *low, *high; /* bytes of the entries, 64-byte aligned */
    int32_t index_bits;        /* 8, 9, 10 */
    int32_t weights;           /* per entry: 4, 8 */
} grid_info;

/* A block of weights to encode. */
typedef struct {
    const float *x;          /* the weights */
    const float *importance; /* of their columns; NULL: not known */
    float row_square;        /* mean square of the whole row; 0 without importance */
    const void *tables;      /* what tables_new of the format made */
} encode_input;

typedef struct {
    int32_t type; /* number in the file; where that has two sizes of blocks, | size << 16 */
    int32_t block, block_bytes;
    int32_t layout, table;
    /* A block to codes; out comes as zeros. NULL for formats whose elements are floats, and for
     * those with a grid. */
    void (*decode)(const uint8_t *block, decoded_block *out);
    /* For formats with a grid; compact: their other layout. */
    int32_t compact;
    void (*decode_grid)(const uint8_t *block, decoded_grid *out);
    /* The search for scales and codes, with the bits of ggml's quantisers; out comes as zeros. Then
     * what `store` writes is what `decode` reads. NULL for floats. */
    void (*choose)(const encode_input *in, decoded_block *out);
    void (*store)(const decoded_block *in, uint8_t *block);
    void (*choose_grid)(const encode_input *in, decoded_grid *out);
    void (*store_grid)(const decoded_grid *in, uint8_t *block);
    /* What a search looks up; NULL: nothing. tables_new gives NULL when there is no memory. */
    void *(*tables_new)(void);
    bool needs_importance;
} format_info;

/* NULL for a type that has no layout. */
const format_info *format_find(int32_t type);

/* The grid of a compact layout; NULL for the others. */
const grid_info *grid_of(int32_t layout);

/* The grid of IQ1: 8 weights -1, 0, 1 as pairs of bits, plus 1, the first lowest. */
extern const uint16_t iq1_grid[2048];

/* One array per file of this folder, ended by a row whose block is 0. */
extern const format_info formats_float[], formats_legacy[], formats_k[], formats_iq[],
    formats_ternary[];

/* IEEE 754 binary16 and bfloat16, in plain C. */
static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31;
    uint32_t mantissa = h & 0x3ff;
    union {
        uint32_t u;
        float f;
    } out;
    if (exponent == 31) {
        out.u = sign | 0x7f800000 | mantissa << 13;
    } else if (exponent != 0) {
        out.u = sign | (exponent + 112) << 23 | mantissa << 13;
    } else { /* zero and denormals: mantissa * 2^-24, exact */
        out.f = (float)mantissa * 0x1p-24f;
        out.u |= sign;
    }
    return out.f;
}

static inline float bfloat_to_float(uint16_t b) {
    union {
        uint32_t u;
        float f;
    } out = {(uint32_t)b << 16};
    return out.f;
}

/* To nearest, ties to even; infinity beyond the range. NaN becomes 0x7e00, with its sign. */
static inline uint16_t float_to_half(float f) {
    union {
        float f;
        uint32_t u;
    } in = {f}, magnitude;
    magnitude.u = in.u & 0x7fffffff;
    uint32_t h;
    if (magnitude.u > 0x7f800000) {
        h = 0x7e00;
    } else if (magnitude.u >= 0x38800000) { /* normal; a carry may reach infinity */
        h = (magnitude.u - 0x38000000 + 0xfff + (magnitude.u >> 13 & 1)) >> 13;
        h = magnitude.u >= 0x47800000 ? 0x7c00 : h;
    } else { /* denormal: adding 0.5 rounds to multiples of 2^-24 */
        magnitude.f += 0.5f;
        h = magnitude.u - 0x3f000000;
    }
    return (uint16_t)((in.u >> 16 & 0x8000) | h);
}

/* The same to bfloat16; f is no NaN. */
static inline uint16_t float_to_bfloat(float f) {
    union {
        float f;
        uint32_t u;
    } in = {f};
    return (uint16_t)((in.u + 0x7fff + (in.u >> 16 & 1)) >> 16);
}

static inline bool half_is_finite(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

/* Whether the scales of a block, decoded for this layout, stand for numbers. */
static inline bool scales_are_finite(int32_t layout, const decoded_block *block) {
    if (layout_table[layout].kind == SCALE_E) { /* times the largest code, 12 */
        return bfloat_to_float(block->scale) < 0x1p125f;
    }
    return half_is_finite(block->scale) && half_is_finite(block->min);
}

static inline uint16_t read_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static inline void write_u16(uint8_t *p, uint16_t value) {
    p[0] = (uint8_t)value;
    p[1] = (uint8_t)(value >> 8);
}

#endif
