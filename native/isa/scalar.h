/* The vocabulary in plain C: what every other instruction set must equal, bit for bit.
 *
 *   vf  16 float lanes      vi  16 int32 lanes      vc  64 code bytes: 16 rows x 4 k
 * A lane of vf and vi is a row of a panel, a position of a key panel, or an element of a vector.
 */
#ifndef EDGE_ISA_SCALAR_H
#define EDGE_ISA_SCALAR_H

#include <math.h>
#include <string.h>

#include "formats/formats.h"

typedef struct {
    float v[16];
} vf;
typedef struct {
    int32_t v[16];
} vi;
typedef struct {
    uint8_t v[64];
} vc;

/* Loops as they are, and one matmul function for any number of columns: unrolled and specialised
 * they would be most of the library. */
#undef UNROLL
#define UNROLL
#define SPECIALIZED static __attribute__((noinline))

#define TILE 4            /* columns per matmul tile */
#define PANELS 1          /* of weights at a time where the tile is full */
#define PANEL_COLUMNS 4   /* columns of it at a time then */
#define QUERIES 4         /* per attention tile */
#define FLOAT_COLUMNS 4   /* of a tile of float weights at a time */
#define NEEDS_MAX 0       /* vc_dot needs max as a constant */
#define SIGNED_WEIGHTS 0  /* tables and codes of 8 bits come to vc_dot signed: below */
#define ATTENTION_WIDTH 1 /* key panels, or 16s of a value, at a time: 1 or 2 */

#define LANES(i) for (int i = 0; i < 16; i++)

static inline vf vf_load(const float *p) {
    vf r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline void vf_store(float *p, vf a) { memcpy(p, a.v, sizeof a.v); }
static inline vf vf_set1(float x) {
    vf r;
    LANES(i) r.v[i] = x;
    return r;
}
static inline vf vf_zero(void) { return vf_set1(0.0f); }
/* The first n elements, the other lanes 0. */
static inline vf vf_load_n(const float *p, int n) {
    vf r = vf_zero();
    LANES(i) if (i < n) r.v[i] = p[i];
    return r;
}
static inline void vf_store_n(float *p, vf a, int n) { LANES(i) if (i < n) p[i] = a.v[i]; }
static inline vf vf_add(vf a, vf b) {
    LANES(i) a.v[i] += b.v[i];
    return a;
}
static inline vf vf_sub(vf a, vf b) {
    LANES(i) a.v[i] -= b.v[i];
    return a;
}
static inline vf vf_mul(vf a, vf b) {
    LANES(i) a.v[i] *= b.v[i];
    return a;
}
static inline vf vf_div(vf a, vf b) {
    LANES(i) a.v[i] /= b.v[i];
    return a;
}
/* a * b + c, rounded once. */
static inline vf vf_fma(vf a, vf b, vf c) {
    LANES(i) c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
/* Where a or b is NaN the result is b. */
static inline vf vf_max(vf a, vf b) {
    LANES(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
static inline vf vf_min(vf a, vf b) {
    LANES(i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
/* The one tree of every sum: lanes i and i + 8, then + 4, + 2, + 1. */
static inline float vf_sum(vf a) {
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            a.v[i] += a.v[i + half];
        }
    }
    return a.v[0];
}
/* Of numbers: with a NaN the result is any lane. */
static inline float vf_hmax(vf a) {
    float m = a.v[0];
    LANES(i) m = m > a.v[i] ? m : a.v[i];
    return m;
}
/* a in lanes first <= i < last, fill in the others. */
static inline vf vf_keep(vf a, int first, int last, float fill) {
    LANES(i) if (i < first || i >= last) a.v[i] = fill;
    return a;
}
static inline vf vf_from_half(const uint16_t *p) {
    vf r;
    LANES(i) r.v[i] = half_to_float(p[i]);
    return r;
}
static inline vf vf_from_bfloat(const uint16_t *p) {
    vf r;
    LANES(i) r.v[i] = bfloat_to_float(p[i]);
    return r;
}
/* To float16, to nearest even. */
static inline void vf_to_half(uint16_t *p, vf a) {
    LANES(i) {
        uint32_t u;
        memcpy(&u, &a.v[i], 4);
        const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
        uint32_t h;
        if (magnitude >= 0x7f800000) { /* infinity, NaN made quiet */
            h = 0x7c00 | (magnitude > 0x7f800000 ? 0x200 | (magnitude >> 13 & 0x3ff) : 0);
        } else if (magnitude >= 0x38800000) { /* normal; a carry may reach infinity */
            h = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
            h = h > 0x7c00 ? 0x7c00 : h;
        } else { /* denormal: adding 0.5 rounds to multiples of 2^-24 */
            float f;
            memcpy(&f, &magnitude, 4);
            f += 0.5f;
            memcpy(&h, &f, 4);
            h -= 0x3f000000;
        }
        p[i] = (uint16_t)(sign | h);
    }
}

static inline vi vi_set1(int32_t x) {
    vi r;
    LANES(i) r.v[i] = x;
    return r;
}
static inline vi vi_add(vi a, vi b) {
    LANES(i) a.v[i] += b.v[i];
    return a;
}
static inline vi vi_max(vi a, vi b) {
    LANES(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
static inline int32_t vi_hmax(vi a) {
    int32_t m = a.v[0];
    LANES(i) m = m > a.v[i] ? m : a.v[i];
    return m;
}
static inline int32_t vi_hsum(vi a) {
    int32_t s = 0;
    LANES(i) s += a.v[i];
    return s;
}
/* The bits of |a|: as integers they order like the numbers, NaN last. */
static inline vi vi_abs_bits(vf a) {
    vi r;
    memcpy(r.v, a.v, sizeof r.v);
    LANES(i) r.v[i] &= 0x7fffffff;
    return r;
}
/* To nearest even; |a| < 2^22. */
static inline vi vi_round(vf a) {
    vi r;
    LANES(i) {
        const float shifted = a.v[i] + 0x1.8p23f;
        memcpy(&r.v[i], &shifted, 4);
        r.v[i] -= 0x4b400000;
    }
    return r;
}
static inline vf vf_from_int(vi a) {
    vf r;
    LANES(i) r.v[i] = (float)a.v[i];
    return r;
}
/* 2^n, -126 <= n <= 127. */
static inline vf vf_pow2(vi n) {
    vf r;
    LANES(i) {
        const uint32_t u = (uint32_t)(n.v[i] + 127) << 23;
        memcpy(&r.v[i], &u, 4);
    }
    return r;
}
/* The low bytes, 4 x 4 transposed: lane 4 t + s to byte 4 s + t. */
static inline void vi_to_steps(int8_t *p, vi a) {
    LANES(i) p[4 * (i % 4) + i / 4] = (int8_t)a.v[i];
}
static inline vi vi_from_i8(const uint8_t *p) {
    vi r;
    LANES(i) r.v[i] = (int8_t)p[i];
    return r;
}
static inline vi vi_from_u8(const uint8_t *p) {
    vi r;
    LANES(i) r.v[i] = p[i];
    return r;
}
/* (a >> shift) & mask, a not negative. */
static inline vi vi_bits(vi a, int shift, int mask) {
    LANES(i) a.v[i] = a.v[i] >> shift & mask;
    return a;
}
static inline vi vi_mul(vi a, vi b) {
    LANES(i) a.v[i] *= b.v[i];
    return a;
}
/* Two 16-bit numbers per lane, low and high: |a|, |b| < 2^15. */
static inline vi vi_pair(vi low, vi high) {
    LANES(i)
    low.v[i] = (int32_t)((uint32_t)low.v[i] & 0xffff) | (int32_t)((uint32_t)high.v[i] << 16);
    return low;
}
/* low(a) * pair[0] + high(a) * pair[1]. */
static inline vi vi_pair_dot(vi a, const int16_t pair[2]) {
    LANES(i) {
        const int16_t low = (int16_t)(a.v[i] & 0xffff), high = (int16_t)(a.v[i] >> 16);
        a.v[i] = low * pair[0] + high * pair[1];
    }
    return a;
}

static inline vc vc_load(const uint8_t *p) {
    vc r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
#define BYTES(i) for (int i = 0; i < 64; i++)
/* (a >> shift) & mask of each byte; the mask leaves nothing that came from the next byte. */
static inline vc vc_bits(vc a, int shift, int mask) {
    BYTES(i) a.v[i] = (uint8_t)(a.v[i] >> shift & mask);
    return a;
}
/* w | (a << up) & mask of each byte, up < 0: a >> -up. */
static inline vc vc_or_bits(vc w, vc a, int up, int mask) {
    BYTES(i) w.v[i] |= (uint8_t)((up < 0 ? a.v[i] >> -up : a.v[i] << up) & mask);
    return w;
}
/* Weights come to vc_dot as unsigned bytes, which stand for w - zero; max: their largest, 255 where
 * that is not known. Signed bytes thus: zero = 128, max = 255. With SIGNED_WEIGHTS tables and codes
 * of 8 bits are signed as they are, zero_shift is -1 and max their largest magnitude. */
static inline vc vc_signed(vc a) {
    BYTES(i) a.v[i] ^= 0x80;
    return a;
}
/* Codes 0..15 through a table of bytes, which is one of zero 128 when max is 255. */
static inline vc vc_table(const uint8_t table[16], vc a, int max) {
    (void)max;
    BYTES(i) a.v[i] = table[a.v[i]];
    return a;
}
/* Bytes of two vectors in turn, 16 by 16: a from the first halves of every 16, b from the second.
 */
static inline void vc_zip(vc low, vc high, vc *a, vc *b) {
    BYTES(i) {
        const int from = i / 16 * 16 + i % 16 / 2;
        a->v[i] = i % 2 == 0 ? low.v[from] : high.v[from];
        b->v[i] = i % 2 == 0 ? low.v[from + 8] : high.v[from + 8];
    }
}
/* 64 indices of 8 bits, and 8 bytes for each bit above, through a grid: the bytes of its entries.
 */
static inline void vc_grid(const grid_info *grid, int index_bits, const uint8_t *index,
                           const uint8_t *high, vc *low, vc *high_out) {
    BYTES(i) {
        int at = index[i];
        for (int b = 0; b < index_bits - 8; b++) {
            at |= (high[8 * b + i / 8] >> i % 8 & 1) << (8 + b);
        }
        low->v[i] = grid->low[at];
        high_out->v[i] = grid->high[at];
    }
}

/* c columns of a group against PANELS or fewer panels: dot[p * c + j] = the sum over steps
 * first .. first + n - 1 of w[p * STEPS + step] * x[j], exact; for all 8 steps of (w - zero) *
 * x[j], zero = 1 << zero_shift, or 0 for zero_shift -1. Of a half zero_shift is -1. */
static inline void vc_dot(vi *dot, int row, const vc *w, int panels, int first, int n, q8_group q,
                          int zero_shift, int max, int c) {
    (void)row, (void)max;
    for (int i = 0; i < panels * c; i++) {
        const int p = i / c, j = i % c;
        LANES(r) {
            const int32_t minus_sum =
                n == STEPS ? q.minus_sum[j] : q.minus_halves[2 * j + (first != 0)];
            int32_t sum = zero_shift < 0 ? 0 : minus_sum * (1 << zero_shift);
            for (int s = first; s < first + n; s++) {
                for (int t = 0; t < 4; t++) {
                    sum += w[p * STEPS + s].v[4 * r + t] * q.codes[4 * (s * q.stride + j) + t];
                }
            }
            dot[i].v[r] = sum;
        }
    }
}

#endif
