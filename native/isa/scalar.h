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

#define TILE 4            /* columns per matmul tile */
#define QUERIES 4         /* per attention tile */
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
/* The low bytes. */
static inline void vi_to_bytes(int8_t *p, vi a) { LANES(i) p[i] = (int8_t)a.v[i]; }

static inline vc vc_load(const uint8_t *p) {
    vc r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline vc vc_low(vc a) {
    for (int i = 0; i < 64; i++) a.v[i] &= 15;
    return a;
}
static inline vc vc_high(vc a) {
    for (int i = 0; i < 64; i++) a.v[i] >>= 4;
    return a;
}
/* Signed bytes as vc_dot_signed wants them. */
static inline vc vc_signed(vc a) { return a; }
/* The same for codes 0..15 through a table of 16 signed values. */
static inline vc vc_table(const int8_t table[16], vc a) {
    for (int i = 0; i < 64; i++) a.v[i] = (uint8_t)table[a.v[i]];
    return a;
}

/* One group of 32 k, c columns: dot[j] += sum over k of w * x[j], exact.
 * w: 8 steps of 4 k; x: (8, c, 4) signed; minus_sum[j] = minus the sum of x[j].
 * The codes stand for code - zero, 0 <= code <= 15. */
static inline void vc_dot_nibbles(vi *dot, const vc w[8], const int8_t *x, const int32_t *minus_sum,
                                  int zero, int c) {
    for (int j = 0; j < c; j++) {
        LANES(i) {
            int32_t sum = zero * minus_sum[j];
            for (int k = 0; k < 32; k++) {
                sum += w[k / 4].v[4 * i + k % 4] * x[k / 4 * 4 * c + 4 * j + k % 4];
            }
            dot[j].v[i] = sum;
        }
    }
}
/* The same for what vc_signed and vc_table return. */
static inline void vc_dot_signed(vi *dot, const vc w[8], const int8_t *x, const int32_t *minus_sum,
                                 int c) {
    (void)minus_sum;
    for (int j = 0; j < c; j++) {
        LANES(i) {
            int32_t sum = 0;
            for (int k = 0; k < 32; k++) {
                sum += (int8_t)w[k / 4].v[4 * i + k % 4] * x[k / 4 * 4 * c + 4 * j + k % 4];
            }
            dot[j].v[i] = sum;
        }
    }
}

#endif
