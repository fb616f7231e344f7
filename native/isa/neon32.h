/* The vocabulary for 32-bit ARM with NEON and VFPv4: four registers of 4 lanes, sixteen of them in
 * all. See scalar.h for the meaning.
 *
 * NEON flushes denormals to zero and VFP, which compilers use for what is written without
 * intrinsics, does not: see FLUSHES_DENORMALS in kernels/isa.h. */
#ifndef EDGE_ISA_NEON32_H
#define EDGE_ISA_NEON32_H

#include <arm_neon.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "formats/formats.h"
#include "isa/neon_words.h"

typedef uint8x16_t vc; /* 4 rows x 4 k */

#define TILE 4
#define FLOAT_COLUMNS 2
#define PANELS 1
#define PANEL_COLUMNS 4
#define QUERIES 4
#define ATTENTION_WIDTH 1
#define NEEDS_MAX 1
#define SIGNED_WEIGHTS 1
#define CODE_ROWS 4
#define FLUSHES_DENORMALS

/* There is no such instruction but VFP's. */
static inline vf vf_div(vf a, vf b) {
    float x[16], y[16];
    vf_store(x, a);
    vf_store(y, b);
    for (int i = 0; i < 16; i++) {
        x[i] /= y[i];
    }
    return vf_load(x);
}
/* Where a is NaN it is b. Compilers do not compare floats by NEON but one by one. Of two zeros the
 * sign may be the other one, which no kernel tells apart. */
static inline float32x4_t unless_nan(float32x4_t a, float32x4_t b, float32x4_t chosen) {
    const uint32x4_t twice = vshlq_n_u32(vreinterpretq_u32_f32(a), 1);
    return vbslq_f32(vcgtq_u32(twice, vdupq_n_u32(0xff000000)), b, chosen);
}
static inline float32x4_t larger(float32x4_t a, float32x4_t b) {
    return unless_nan(a, b, vmaxq_f32(a, b));
}
static inline float32x4_t smaller(float32x4_t a, float32x4_t b) {
    return unless_nan(a, b, vminq_f32(a, b));
}
static inline vf vf_max(vf a, vf b) {
    QUARTERS(i) a.v[i] = larger(a.v[i], b.v[i]);
    return a;
}
static inline vf vf_min(vf a, vf b) {
    QUARTERS(i) a.v[i] = smaller(a.v[i], b.v[i]);
    return a;
}
static inline float vf_sum(vf a) {
    const float32x4_t low = vaddq_f32(a.v[0], a.v[2]), high = vaddq_f32(a.v[1], a.v[3]);
    const float32x4_t four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(vpadd_f32(two, two), 0);
}
static inline float vf_hmax(vf a) {
    const float32x4_t four = vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]));
    const float32x2_t two = vmax_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(vpmax_f32(two, two), 0);
}
static inline vf vf_from_half(const uint16_t *p) {
    return (vf){{vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))),
                 vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4))),
                 vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 8))),
                 vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 12)))}};
}
/* As scalar.h: the instruction for it would say that it flushed where a float16 is denormal, which
 * small scales are. */
static inline uint16x4_t to_half(float32x4_t a) {
    const uint32x4_t u = vreinterpretq_u32_f32(a),
                     magnitude = vandq_u32(u, vdupq_n_u32(0x7fffffff));
    const uint32x4_t even = vandq_u32(vshrq_n_u32(magnitude, 13), vdupq_n_u32(1));
    const uint32x4_t rounded =
        vaddq_u32(vsubq_u32(magnitude, vdupq_n_u32(0x38000000 - 0xfff)), even);
    const uint32x4_t normal = vminq_u32(vshrq_n_u32(rounded, 13), vdupq_n_u32(0x7c00));
    const float32x4_t shifted = vaddq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(0.5f));
    const uint32x4_t tiny = vsubq_u32(vreinterpretq_u32_f32(shifted), vdupq_n_u32(0x3f000000));
    const uint32x4_t nan =
        vorrq_u32(vdupq_n_u32(0x7e00), vandq_u32(vshrq_n_u32(magnitude, 13), vdupq_n_u32(0x3ff)));
    uint32x4_t h = vbslq_u32(vcgeq_u32(magnitude, vdupq_n_u32(0x38800000)), normal, tiny);
    h = vbslq_u32(vcgtq_u32(magnitude, vdupq_n_u32(0x7f800000)), nan, h);
    return vmovn_u32(vorrq_u32(h, vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(0x8000))));
}
static inline void vf_to_half(uint16_t *p, vf a) {
    vst1_u16(p, to_half(a.v[0]));
    vst1_u16(p + 4, to_half(a.v[1]));
    vst1_u16(p + 8, to_half(a.v[2]));
    vst1_u16(p + 12, to_half(a.v[3]));
}

static inline int32_t vi_hmax(vi a) {
    const int32x4_t four = vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3]));
    const int32x2_t two = vmax_s32(vget_low_s32(four), vget_high_s32(four));
    return vget_lane_s32(vpmax_s32(two, two), 0);
}
static inline int32_t vi_hsum(vi a) {
    const int32x4_t four = vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3]));
    const int32x2_t two = vadd_s32(vget_low_s32(four), vget_high_s32(four));
    return vget_lane_s32(vpadd_s32(two, two), 0);
}
static inline int32x4_t round_even(float32x4_t a) {
    const float32x4_t shifted = vaddq_f32(a, vdupq_n_f32(0x1.8p23f));
    return vsubq_s32(vreinterpretq_s32_f32(shifted), vdupq_n_s32(0x4b400000));
}
static inline vi vi_round(vf a) {
    vi r;
    QUARTERS(i) r.v[i] = round_even(a.v[i]);
    return r;
}
/* Bytes through a table of 16. */
static inline uint8x16_t look_up(uint8x16_t table, uint8x16_t at) {
    const uint8x8x2_t t = {{vget_low_u8(table), vget_high_u8(table)}};
    return vcombine_u8(vtbl2_u8(t, vget_low_u8(at)), vtbl2_u8(t, vget_high_u8(at)));
}
static inline void vi_to_steps(int8_t *p, vi a) {
    const uint8x16_t order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    const int8x16_t bytes = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    vst1q_u8((uint8_t *)p, look_up(vreinterpretq_u8_s8(bytes), order));
}
static inline vi widen(int16x8_t low, int16x8_t high) {
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                 vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
}
static inline vi vi_from_i8(const uint8_t *p) {
    const int8x16_t b = vreinterpretq_s8_u8(vld1q_u8(p));
    return widen(vmovl_s8(vget_low_s8(b)), vmovl_s8(vget_high_s8(b)));
}
static inline vi vi_from_u8(const uint8_t *p) {
    const uint8x16_t b = vld1q_u8(p);
    return widen(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(b))),
                 vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(b))));
}
/* Of 2 rows low and 2 high, numbers that belong to one row added. */
static inline int32x4_t rows_of(int32x4_t low, int32x4_t high) {
    return vcombine_s32(vpadd_s32(vget_low_s32(low), vget_high_s32(low)),
                        vpadd_s32(vget_low_s32(high), vget_high_s32(high)));
}
static inline int32x4_t pair_dot(int32x4_t a, int16x4_t x) {
    const int16x8_t both = vreinterpretq_s16_s32(a);
    return rows_of(vmull_s16(vget_low_s16(both), x), vmull_s16(vget_high_s16(both), x));
}
static inline vi vi_pair_dot(vi a, const int16_t both[2]) {
    int32_t bits;
    memcpy(&bits, both, 4);
    const int16x4_t x = vreinterpret_s16_s32(vdup_n_s32(bits));
    return (vi){
        {pair_dot(a.v[0], x), pair_dot(a.v[1], x), pair_dot(a.v[2], x), pair_dot(a.v[3], x)}};
}

static inline vc vc_load(const uint8_t *p) { return vld1q_u8(p); }
static inline vc vc_bits(vc a, int shift, int mask) {
    a = a >> shift;
    return mask < 255 >> shift ? vandq_u8(a, vdupq_n_u8((uint8_t)mask)) : a;
}
static inline vc vc_or_bits(vc w, vc a, int up, int mask) {
    const vc moved = up < 0 ? a >> -up : a << up;
    return vorrq_u8(w, vandq_u8(moved, vdupq_n_u8((uint8_t)mask)));
}
static inline vc vc_signed(vc a) { return a; }
static inline vc vc_table(const uint8_t table[16], vc a, int max) {
    (void)max;
    return look_up(vld1q_u8(table), a);
}
static inline void vc_zip(vc low, vc high, vc *a, vc *b) {
    const uint8x16x2_t both = vzipq_u8(low, high);
    *a = both.val[0];
    *b = both.val[1];
}
/* One index after the other; whole entries, so that there is one load for two bytes, and their
 * bytes are parted at the end. */
static inline void vc_grid(const grid_info *grid, int index_bits, const uint8_t *index,
                           const uint8_t *high, vc *low, vc *high_out) {
    uint16_t e[16];
    for (int i = 0; i < 16; i++) {
        int at = index[i];
        for (int b = 0; b < index_bits - 8; b++) {
            at |= (high[8 * b + i / 8] >> i % 8 & 1) << (8 + b);
        }
        e[i] = grid->entries[at];
    }
    const uint8x16x2_t parted = vld2q_u8((const uint8_t *)e);
    *low = parted.val[0];
    *high_out = parted.val[1];
}

static inline int32x4_t start_at(q8_group q, int j, int first, int n, int zero_shift) {
    if (zero_shift < 0) {
        return vdupq_n_s32(0);
    }
    const int32_t minus_sum = n == STEPS ? q.minus_sum[j] : q.minus_halves[2 * j + (first != 0)];
    return vdupq_n_s32(minus_sum * (1 << zero_shift));
}

/* The x of a step of c columns, each beside 2 rows. */
INLINE void columns_of(int8x8_t *x, const int8_t *p, int c) {
    const int32_t *four = (const int32_t *)p;
    if (c == 4) {
        const int32x2x4_t v = vld4_dup_s32(four);
        UNROLL for (int j = 0; j < 4; j++) { x[j] = vreinterpret_s8_s32(v.val[j]); }
    } else if (c == 3) {
        const int32x2x3_t v = vld3_dup_s32(four);
        UNROLL for (int j = 0; j < 3; j++) { x[j] = vreinterpret_s8_s32(v.val[j]); }
    } else if (c == 2) {
        const int32x2x2_t v = vld2_dup_s32(four);
        UNROLL for (int j = 0; j < 2; j++) { x[j] = vreinterpret_s8_s32(v.val[j]); }
    } else {
        x[0] = vreinterpret_s8_s32(vld1_dup_s32(four));
    }
}

INLINE int16x8_t pairs_of(int16x8_t low, int16x8_t high) {
    return vcombine_s16(vpadd_s16(vget_low_s16(low), vget_high_s16(low)),
                        vpadd_s16(vget_low_s16(high), vget_high_s16(high)));
}

/* sum[c] += steps first .. first + n - 1 of 4 rows, `fit` of them in 16 bits; small: even two such
 * sums. */
INLINE void dot_columns(int32x4_t *sum, const vc *w, int first, int n, const int8_t *codes,
                        int stride, int fit, bool small, int c) {
    int32x4_t low_sum[TILE], high_sum[TILE];
    int8x8_t x[TILE], next[TILE];
    columns_of(next, codes + 4 * first * stride, c);
    UNROLL for (int s = first; s < first + n; s += fit) {
        int16x8_t low[TILE], high[TILE];
        UNROLL for (int k = s; k < s + fit; k++) {
            const int8x8_t a = vget_low_s8(vreinterpretq_s8_u8(w[k]));
            const int8x8_t b = vget_high_s8(vreinterpretq_s8_u8(w[k]));
            UNROLL for (int j = 0; j < c; j++) { x[j] = next[j]; }
            if (k + 1 < first + n) {
                columns_of(next, codes + 4 * (k + 1) * stride, c);
            }
            UNROLL for (int j = 0; j < c; j++) {
                low[j] = k == s ? vmull_s8(a, x[j]) : vmlal_s8(low[j], a, x[j]);
                high[j] = k == s ? vmull_s8(b, x[j]) : vmlal_s8(high[j], b, x[j]);
                if (c > 1) { /* one step after the other, or compilers load all x first, which the
                                registers do not hold */
                    __asm__("" : "+r"(codes), "+w"(low[j]), "+w"(high[j]));
                }
            }
        }
        UNROLL for (int j = 0; j < c; j++) {
            if (small) { /* fit == n */
                sum[j] = vpadalq_s16(sum[j], pairs_of(low[j], high[j]));
            } else {
                low_sum[j] = s == first ? vpaddlq_s16(low[j]) : vpadalq_s16(low_sum[j], low[j]);
                high_sum[j] = s == first ? vpaddlq_s16(high[j]) : vpadalq_s16(high_sum[j], high[j]);
            }
        }
    }
    UNROLL for (int j = 0; j < c && !small; j++) {
        sum[j] = vaddq_s32(sum[j], rows_of(low_sum[j], high_sum[j]));
    }
}

/* Products of as many steps as fit 16 bits are added before they are widened: all 8 for codes up
 * to 31 (8 x 31 x 127 = 31496), 4 up to 64, 2 of any bytes. */
INLINE void vc_dot(vi *dot, int row, const vc *w, int panels, int first, int n, q8_group q,
                   int zero_shift, int max, int c) {
    (void)panels;
    const int most = max <= 31 ? 8 : max <= 64 ? 4 : 2, fit = most < n ? most : n;
    const int columns = fit < n ? 2 : TILE; /* sums take registers too */
    UNROLL for (int j = 0; j < c; j += columns) {
        const int m = c - j < columns ? c - j : columns;
        int32x4_t sum[TILE];
        UNROLL for (int i = 0; i < m; i++) { sum[i] = start_at(q, j + i, first, n, zero_shift); }
        const bool small = fit == n && 2 * n * max * 127 < 32768;
        dot_columns(sum, w, first, n, q.codes + 4 * j, q.stride, fit, small, m);
        UNROLL for (int i = 0; i < m; i++) { dot[j + i].v[row / CODE_ROWS] = sum[i]; }
    }
}

#endif
