/* Disk formats: GGUF blocks decoded to codes and scales, and straight to float32.
 *
 * A format is one row of a table: how its blocks lie on disk, which panel layout holds them, and
 * the function that decodes one. */
#ifndef EDGE_FORMATS_H
#define EDGE_FORMATS_H

#include <stdbool.h>
#include <stdint.h>

#include "layouts.h"

/* One block of one row, decoded. */
typedef struct {
    uint16_t scale, min; /* fp16 */
    int8_t code[GROUP];  /* 4-bit codes as 0..15 */
} decoded_group;

typedef struct {
    int32_t type; /* number in the file */
    int32_t block, block_bytes;
    int32_t layout, table;
    /* A block to codes; NULL for formats whose elements are floats. */
    void (*decode)(const uint8_t *block, decoded_group *out);
} format_info;

/* NULL for a type that has no layout. */
const format_info *format_find(int32_t type);

extern const format_info formats_legacy[];
extern const int32_t n_formats_legacy;
extern const format_info formats_float[];
extern const int32_t n_formats_float;

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

static inline bool half_is_finite(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

static inline uint16_t read_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

#endif
