/* The vocabulary for 64-bit ARM: four registers of 4 lanes. See scalar.h for the meaning.
 * With EDGE_DOTPROD dot products of four bytes are one instruction, see dotprod.h; with EDGE_I8MM
 * those of two rows and two columns, see i8mm.h. */
#ifndef EDGE_ISA_NEON_H
#define EDGE_ISA_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "formats/formats.h"
#include "isa/neon_words.h"

/* A vector of codes is not 64 bytes but where they come from and what is still to be done with
 * them: vc_dot does it a quarter at a time, so that 32 registers are enough for a whole group. */
typedef struct {
    const uint8_t *from[2]; /* second NULL: nothing to add */
    int shift, mask, up, up_mask;
    const uint8_t *table;
    bool given;
    uint8x16_t v[4]; /* when given */
} vc;

#define TILE 4
#define FLOAT_COLUMNS 2
#define PANELS 1
#define PANEL_COLUMNS 4
#define QUERIES 4
#define ATTENTION_WIDTH 1
#define SIGNED_WEIGHTS 1
#ifdef EDGE_DOTPROD
#define NEEDS_MAX 0
#else
#define NEEDS_MAX 1
#endif

INLINE vf vf_div(vf a, vf b) {
    QUARTERS(i) a.v[i] = vdivq_f32(a.v[i], b.v[i]);
    return a;
}
/* Not fmax, which has rules of its own for NaN. */
INLINE vf vf_max(vf a, vf b) {
    QUARTERS(i) a.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
INLINE vf vf_min(vf a, vf b) {
    QUARTERS(i) a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
INLINE float vf_sum(vf a) {
    const float32x4_t low = vaddq_f32(a.v[0], a.v[2]), high = vaddq_f32(a.v[1], a.v[3]);
    const float32x4_t four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float vf_hmax(vf a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
INLINE vf vf_from_half(const uint16_t *p) {
    const float16x8_t a = vreinterpretq_f16_u16(vld1q_u16(p));
    const float16x8_t b = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return (vf){{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)),
                 vcvt_high_f32_f16(b)}};
}
INLINE void vf_to_half(uint16_t *p, vf a) {
    QUARTERS(i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}

INLINE int32_t vi_hmax(vi a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}
INLINE int32_t vi_hsum(vi a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
INLINE vi vi_round(vf a) {
    vi r;
    QUARTERS(i) r.v[i] = vcvtnq_s32_f32(a.v[i]);
    return r;
}
INLINE void vi_to_steps(int8_t *p, vi a) {
    const uint8x16_t order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vqtbl1q_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)), order));
}
INLINE vi vi_from_i8(const uint8_t *p) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                 vmovl_high_s16(high)}};
}
INLINE vi vi_from_u8(const uint8_t *p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                 vmovl_high_s16(high)}};
}
INLINE vi vi_pair_dot(vi a, const int16_t pair[2]) {
    int32_t both;
    memcpy(&both, pair, 4);
    const int16x8_t p = vreinterpretq_s16_s32(vdupq_n_s32(both));
    QUARTERS(i) {
        const int16x8_t x = vreinterpretq_s16_s32(a.v[i]);
        a.v[i] = vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(p)), vmull_high_s16(x, p));
    }
    return a;
}

INLINE uint8x16_t bits(uint8x16_t a, int shift, int mask) {
    a = a >> shift;
    return mask < 255 >> shift ? vandq_u8(a, vdupq_n_u8((uint8_t)mask)) : a;
}
INLINE vc vc_load(const uint8_t *p) { return (vc){.from = {p}, .mask = 255}; }
INLINE vc vc_bits(vc a, int shift, int mask) {
    if (a.given) {
        QUARTERS(i) a.v[i] = bits(a.v[i], shift, mask);
        return a;
    }
    a.shift = shift;
    a.mask = mask;
    return a;
}
INLINE vc vc_or_bits(vc w, vc a, int up, int mask) {
    w.from[1] = a.from[0];
    w.up = up;
    w.up_mask = mask;
    return w;
}
/* Bytes of the full range stay signed. */
INLINE vc vc_signed(vc a) { return a; }
INLINE vc vc_table(const uint8_t table[16], vc a, int max) {
    (void)max;
    a.table = table;
    return a;
}
INLINE uint8x16_t quarter(vc a, int i) {
    uint8x16_t w = a.given ? a.v[i] : bits(vld1q_u8(a.from[0] + 16 * i), a.shift, a.mask);
    if (a.up_mask != 0) {
        const uint8x16_t b = vld1q_u8(a.from[1] + 16 * i);
        const uint8x16_t moved = a.up < 0 ? b >> -a.up : b << a.up;
        w = vorrq_u8(w, vandq_u8(moved, vdupq_n_u8((uint8_t)a.up_mask)));
    }
    return a.table != NULL ? vqtbl1q_u8(vld1q_u8(a.table), w) : w;
}
INLINE void vc_zip(vc low, vc high, vc *a, vc *b) {
    *a = *b = low;
    QUARTERS(i) {
        a->v[i] = vzip1q_u8(low.v[i], high.v[i]);
        b->v[i] = vzip2q_u8(low.v[i], high.v[i]);
    }
}
/* Byte i is all ones when bit i is set. */
INLINE uint8x16_t bytes_of(const uint8_t bits[2]) {
    const uint8x8_t bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return vtstq_u8(vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1])), vcombine_u8(bit, bit));
}
/* One index after the other, a table of 1 KiB is more than byte look-ups reach; whole entries, so
 * that there is one load for two bytes, and their bytes are parted at the end. */
INLINE void vc_grid(const grid_info *grid, int index_bits, const uint8_t *index,
                    const uint8_t *high, vc *low, vc *high_out) {
    const uint16_t *entries = grid->entries;
    *low = *high_out = (vc){.given = true};
    QUARTERS(i) {
        uint16_t at[16];
        uint8x16x2_t both = {{vld1q_u8(index + 16 * i), vdupq_n_u8(0)}};
        UNROLL for (int b = 0; b < index_bits - 8; b++) {
            const uint8x16_t bit = vandq_u8(bytes_of(high + 8 * b + 2 * i), vdupq_n_u8(1 << b));
            both.val[1] = vorrq_u8(both.val[1], bit);
        }
        vst2q_u8((uint8_t *)at, both);
        uint16x8_t a = vdupq_n_u16(0), b = a;
        UNROLL for (int j = 0; j < 8; j++) {
            a[j] = entries[at[j]];
            b[j] = entries[at[8 + j]];
        }
        low->v[i] = vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
        high_out->v[i] = vuzp2q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
    }
}

/* Minus the sums of x of up to four columns, times the zero of the weights. */
INLINE int32x4_t starts(q8_group q, int first, int n, int zero_shift, int c) {
    int32x4_t r = vdupq_n_s32(0);
    UNROLL for (int j = 0; j < c && zero_shift >= 0; j++) {
        r[j] = n == STEPS ? q.minus_sum[j] : q.minus_halves[2 * j + (first != 0)];
    }
    return zero_shift > 0 ? r << zero_shift : r;
}

/* Compilers would keep all x in registers, for which there are too many: they are loaded again. */
INLINE void forget_x(int c) {
    if (c > 2) {
        __asm__ volatile("" : : : "memory");
    }
}

#ifdef EDGE_DOTPROD
/* sum + the dot products of four rows with the four bytes of x in lane j. */
INLINE int32x4_t dot_lane(int32x4_t sum, int8x16_t w, int8x16_t x, int j) {
    switch (j) {
    case 0: return vdotq_laneq_s32(sum, w, x, 0);
    case 1: return vdotq_laneq_s32(sum, w, x, 1);
    case 2: return vdotq_laneq_s32(sum, w, x, 2);
    default: return vdotq_laneq_s32(sum, w, x, 3);
    }
}

#ifdef EDGE_I8MM
INLINE int8x16_t zip_low(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
INLINE int8x16_t zip_high(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

/* Two steps of two rows times two steps of two columns at once. */
INLINE void dot_four(vi *dot, const vc *w, int first, int n, const int8_t *x, int32x4_t start) {
    int8x16_t pairs[STEPS]; /* of steps: columns 0 and 1, 2 and 3 */
    UNROLL for (int s = 0; s < n; s += 2) {
        const int8x16_t a = vld1q_s8(x + 16 * s), b = vld1q_s8(x + 16 * s + 16);
        pairs[s] = zip_low(a, b);
        pairs[s + 1] = zip_high(a, b);
    }
    const int32x4_t starts[2] = {
        vreinterpretq_s32_s64(vdupq_n_s64(vreinterpretq_s64_s32(start)[0])),
        vreinterpretq_s32_s64(vdupq_n_s64(vreinterpretq_s64_s32(start)[1]))};
    QUARTERS(i) {
        int32x4_t low[2] = {starts[0], starts[1]}, high[2] = {starts[0], starts[1]};
        UNROLL for (int s = 0; s < n; s += 2) {
            const int8x16_t a = vreinterpretq_s8_u8(quarter(w[first + s], i));
            const int8x16_t b = vreinterpretq_s8_u8(quarter(w[first + s + 1], i));
            const int8x16_t rows = zip_low(a, b), next = zip_high(a, b);
            UNROLL for (int j = 0; j < 2; j++) {
                low[j] = vmmlaq_s32(low[j], rows, pairs[s + j]);
                high[j] = vmmlaq_s32(high[j], next, pairs[s + j]);
            }
        }
        UNROLL for (int j = 0; j < 2; j++) {
            dot[2 * j].v[i] = vuzp1q_s32(low[j], high[j]);
            dot[2 * j + 1].v[i] = vuzp2q_s32(low[j], high[j]);
        }
    }
}
#endif

INLINE void vc_dot(vi *dot, int row, const vc *w, int panels, int first, int n, q8_group q,
                   int zero_shift, int max, int c) {
    (void)row, (void)panels, (void)max;
    const int32x4_t start = starts(q, first, n, zero_shift, c);
    const int8_t *x = q.codes + 4 * first * q.stride;
#ifdef EDGE_I8MM
    if (c == 4) {
        dot_four(dot, w, first, n, x, start);
        return;
    }
#endif
    QUARTERS(i) {
        int32x4_t sum[TILE];
        int8x16_t four = vdupq_n_s8(0); /* x of four steps and columns one after the other */
        UNROLL for (int j = 0; j < c; j++) { sum[j] = vdupq_n_s32(start[j]); }
        UNROLL for (int s = 0; s < n; s++) {
            const int8x16_t a = vreinterpretq_s8_u8(quarter(w[first + s], i));
            UNROLL for (int j = 0; j < c; j++) {
                const int at = s * c + j;
                four = at % 4 == 0 ? vld1q_s8(x + 4 * at) : four;
                sum[j] = dot_lane(sum[j], a, four, at % 4);
            }
        }
        UNROLL for (int j = 0; j < c; j++) { dot[j].v[i] = sum[j]; }
        forget_x(c);
    }
}
#else
/* x of four steps and columns one after the other, each beside four rows. */
INLINE void four_bytes(int8x16_t x[4], const int8_t *p) {
    const int32x4x4_t all = vld4q_dup_s32((const int32_t *)p);
    UNROLL for (int i = 0; i < 4; i++) { x[i] = vreinterpretq_s8_s32(all.val[i]); }
}

/* Products of as many steps as fit 16 bits are widened at once: all 8 for weights up to 32
 * (8 x 31 x 127 = 31496), 4 up to 64, 2 up to 128. */
INLINE void dot_quarter(int32x4_t *sum, const vc *w, int i, int first, int n, const int8_t *p,
                        int8x16_t *x, int max, int c) {
    const int most = max < 32 ? 8 : max <= 64 ? 4 : 2, fit = most < n ? most : n;
    UNROLL for (int s = 0; s < n; s += fit) {
        int16x8_t low[TILE], high[TILE];
        UNROLL for (int k = s; k < s + fit; k++) {
            const int8x16_t a = vreinterpretq_s8_u8(quarter(w[first + k], i));
            const int8x8_t al = vget_low_s8(a);
            UNROLL for (int j = 0; j < c; j++) {
                const int at = k * c + j;
                if (at % 4 == 0 && (c > 2 || i == 0)) {
                    four_bytes(x + at, p + 4 * at);
                }
                const int8x8_t xl = vget_low_s8(x[at]);
                low[j] = k == s ? vmull_s8(al, xl) : vmlal_s8(low[j], al, xl);
                high[j] = k == s ? vmull_high_s8(a, x[at]) : vmlal_high_s8(high[j], a, x[at]);
            }
        }
        UNROLL for (int j = 0; j < c; j++) {
            if (2 * max * 127 * fit < 32768) {
                sum[j] = vpadalq_s16(sum[j], vpaddq_s16(low[j], high[j]));
            } else {
                const int32x4_t a = vpaddlq_s16(low[j]), b = vpaddlq_s16(high[j]);
                sum[j] = vaddq_s32(sum[j], vpaddq_s32(a, b));
            }
        }
    }
}

INLINE void vc_dot(vi *dot, int row, const vc *w, int panels, int first, int n, q8_group q,
                   int zero_shift, int max, int c) {
    (void)row, (void)panels;
    const int32x4_t start = starts(q, first, n, zero_shift, c);
    int8x16_t x[STEPS * TILE];
    QUARTERS(i) {
        int32x4_t sum[TILE];
        UNROLL for (int j = 0; j < c; j++) { sum[j] = vdupq_n_s32(start[j]); }
        dot_quarter(sum, w, i, first, n, q.codes + 4 * first * q.stride, x, max, c);
        UNROLL for (int j = 0; j < c; j++) { dot[j].v[i] = sum[j]; }
        forget_x(c);
    }
}
#endif

#endif
