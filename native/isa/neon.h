/* The vocabulary for 64-bit ARM: four registers of 4 lanes. See scalar.h for the meaning. */
#ifndef EDGE_ISA_NEON_H
#define EDGE_ISA_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "formats/formats.h"

typedef struct {
    float32x4_t v[4];
} vf;
typedef struct {
    int32x4_t v[4];
} vi;
typedef struct {
    uint8x16_t v[4];
} vc;

#define TILE 4
#define FLOAT_COLUMNS 2
#define PANELS 1
#define PANEL_COLUMNS 4
#define QUERIES 4
#define ATTENTION_WIDTH 1
#define NEEDS_MAX 1

#define QUARTERS(i) UNROLL for (int i = 0; i < 4; i++)

static inline vf vf_load(const float *p) {
    return (vf){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
static inline void vf_store(float *p, vf a) { QUARTERS(i) vst1q_f32(p + 4 * i, a.v[i]); }
static inline vf vf_set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return (vf){{v, v, v, v}};
}
static inline vf vf_zero(void) { return vf_set1(0.0f); }
static inline vf vf_load_n(const float *p, int n) {
    if (n >= 16) {
        return vf_load(p);
    }
    float some[16] = {0};
    memcpy(some, p, (size_t)n * 4);
    return vf_load(some);
}
static inline void vf_store_n(float *p, vf a, int n) {
    if (n >= 16) {
        vf_store(p, a);
        return;
    }
    float all[16];
    vf_store(all, a);
    memcpy(p, all, (size_t)n * 4);
}
static inline vf vf_add(vf a, vf b) {
    QUARTERS(i) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
    return a;
}
static inline vf vf_sub(vf a, vf b) {
    QUARTERS(i) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
    return a;
}
static inline vf vf_mul(vf a, vf b) {
    QUARTERS(i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
    return a;
}
static inline vf vf_div(vf a, vf b) {
    QUARTERS(i) a.v[i] = vdivq_f32(a.v[i], b.v[i]);
    return a;
}
static inline vf vf_fma(vf a, vf b, vf c) {
    QUARTERS(i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return c;
}
/* Not fmax, which has rules of its own for NaN. */
static inline vf vf_max(vf a, vf b) {
    QUARTERS(i) a.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
static inline vf vf_min(vf a, vf b) {
    QUARTERS(i) a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
static inline float vf_sum(vf a) {
    const float32x4_t low = vaddq_f32(a.v[0], a.v[2]), high = vaddq_f32(a.v[1], a.v[3]);
    const float32x4_t four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
static inline float vf_hmax(vf a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
static inline vf vf_keep(vf a, int first, int last, float fill) {
    if (first <= 0 && last >= 16) {
        return a;
    }
    const int32x4_t lane = {0, 1, 2, 3};
    QUARTERS(i) {
        const uint32x4_t before = vcltq_s32(lane, vdupq_n_s32(first - 4 * i));
        const uint32x4_t keep = vbicq_u32(vcltq_s32(lane, vdupq_n_s32(last - 4 * i)), before);
        a.v[i] = vbslq_f32(keep, a.v[i], vdupq_n_f32(fill));
    }
    return a;
}
static inline vf vf_from_half(const uint16_t *p) {
    const float16x8_t a = vreinterpretq_f16_u16(vld1q_u16(p));
    const float16x8_t b = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return (vf){{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)),
                 vcvt_high_f32_f16(b)}};
}
static inline vf vf_from_bfloat(const uint16_t *p) {
    vf r;
    QUARTERS(i) r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return r;
}
static inline void vf_to_half(uint16_t *p, vf a) {
    QUARTERS(i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}

static inline vi vi_set1(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return (vi){{v, v, v, v}};
}
static inline vi vi_add(vi a, vi b) {
    QUARTERS(i) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
    return a;
}
static inline vi vi_max(vi a, vi b) {
    QUARTERS(i) a.v[i] = vmaxq_s32(a.v[i], b.v[i]);
    return a;
}
static inline int32_t vi_hmax(vi a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}
static inline int32_t vi_hsum(vi a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
static inline vi vi_abs_bits(vf a) {
    vi r;
    QUARTERS(i) r.v[i] = vreinterpretq_s32_f32(vabsq_f32(a.v[i]));
    return r;
}
static inline vi vi_round(vf a) {
    vi r;
    QUARTERS(i) r.v[i] = vcvtnq_s32_f32(a.v[i]);
    return r;
}
static inline vf vf_from_int(vi a) {
    vf r;
    QUARTERS(i) r.v[i] = vcvtq_f32_s32(a.v[i]);
    return r;
}
static inline vf vf_pow2(vi n) {
    const int32x4_t bias = vdupq_n_s32(127);
    vf r;
    QUARTERS(i) r.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], bias), 23));
    return r;
}
static inline void vi_to_steps(int8_t *p, vi a) {
    const uint8x16_t order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vqtbl1q_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)), order));
}
static inline vi vi_from_i8(const uint8_t *p) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                 vmovl_high_s16(high)}};
}
static inline vi vi_from_u8(const uint8_t *p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                 vmovl_high_s16(high)}};
}
static inline vi vi_bits(vi a, int shift, int mask) {
    QUARTERS(i) a.v[i] = (a.v[i] >> shift) & vdupq_n_s32(mask);
    return a;
}
static inline vi vi_mul(vi a, vi b) {
    QUARTERS(i) a.v[i] = vmulq_s32(a.v[i], b.v[i]);
    return a;
}
static inline vi vi_pair(vi low, vi high) {
    QUARTERS(i) low.v[i] = vsliq_n_s32(low.v[i], high.v[i], 16);
    return low;
}
static inline vi vi_pair_dot(vi a, const int16_t pair[2]) {
    int32_t both;
    memcpy(&both, pair, 4);
    const int16x8_t p = vreinterpretq_s16_s32(vdupq_n_s32(both));
    QUARTERS(i) {
        const int16x8_t x = vreinterpretq_s16_s32(a.v[i]);
        a.v[i] = vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(p)), vmull_high_s16(x, p));
    }
    return a;
}

static inline vc vc_load(const uint8_t *p) {
    return (vc){{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}
static inline vc vc_bits(vc a, int shift, int mask) {
    QUARTERS(i) {
        a.v[i] = a.v[i] >> shift;
        if (mask < 255 >> shift) {
            a.v[i] = vandq_u8(a.v[i], vdupq_n_u8((uint8_t)mask));
        }
    }
    return a;
}
static inline vc vc_or_bits(vc w, vc a, int up, int mask) {
    QUARTERS(i) {
        const uint8x16_t moved = up < 0 ? a.v[i] >> -up : a.v[i] << up;
        w.v[i] = vorrq_u8(w.v[i], vandq_u8(moved, vdupq_n_u8((uint8_t)mask)));
    }
    return w;
}
/* Bytes of the full range stay signed. */
static inline vc vc_signed(vc a) { return a; }
static inline vc vc_table(const uint8_t table[16], vc a, int max) {
    uint8x16_t t = vld1q_u8(table);
    if (max == 255) {
        t = veorq_u8(t, vdupq_n_u8(128));
    }
    QUARTERS(i) a.v[i] = vqtbl1q_u8(t, a.v[i]);
    return a;
}
static inline void vc_zip(vc low, vc high, vc *a, vc *b) {
    QUARTERS(i) {
        a->v[i] = vzip1q_u8(low.v[i], high.v[i]);
        b->v[i] = vzip2q_u8(low.v[i], high.v[i]);
    }
}
/* One index after the other; whole entries, so that there is one load for two bytes, and their
 * bytes are parted at the end. */
static inline void vc_grid(const grid_info *grid, int index_bits, const uint8_t *index,
                           const uint8_t *high, vc *low, vc *high_out) {
    const uint16_t *entries = grid->entries;
    for (int i = 0; i < 4; i++) {
        uint16_t e[16];
        for (int j = 0; j < 16; j++) {
            const int k = 16 * i + j;
            int at = index[k];
            for (int b = 0; b < index_bits - 8; b++) {
                at |= (high[8 * b + k / 8] >> k % 8 & 1) << (8 + b);
            }
            e[j] = entries[at];
        }
        const uint8x16x2_t parted = vld2q_u8((const uint8_t *)e);
        low->v[i] = parted.val[0];
        high_out->v[i] = parted.val[1];
    }
}

static inline int32x4_t start_at(q8_group q, int j, int first, int n, int zero_shift) {
    if (zero_shift < 0) {
        return vdupq_n_s32(0);
    }
    const int32_t minus_sum = n == STEPS ? q.minus_sum[j] : q.minus_halves[2 * j + (first != 0)];
    return vdupq_n_s32(minus_sum * (1 << zero_shift));
}

/* The x of a step, beside 4 rows. */
static inline int8x16_t four_bytes(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}

/* Products of as many steps as fit 16 bits are widened at once: all 8 for codes up to 31
 * (8 x 31 x 127 = 31496), 4 up to 63, 2 up to 127 and for signed bytes. */
static inline void vc_dot(vi *dot, const vc *w, int panels, int first, int n, q8_group q,
                          int zero_shift, int max, int c) {
    (void)panels;
    const int most = max <= 31 ? 8 : max <= 63 ? 4 : 2, fit = most < n ? most : n;
    QUARTERS(i) {
        UNROLL for (int j = 0; j < c; j++) {
            int32x4_t sum = start_at(q, j, first, n, max == 255 ? -1 : zero_shift);
            UNROLL for (int s = first; s < first + n; s += fit) {
                int16x8_t low = vdupq_n_s16(0), high = low;
                UNROLL for (int k = s; k < s + fit; k++) {
                    const int8x16_t a = vreinterpretq_s8_u8(w[k].v[i]);
                    const int8x16_t x = four_bytes(q.codes + 4 * (k * q.stride + j));
                    low = vmlal_s8(low, vget_low_s8(a), vget_low_s8(x));
                    high = vmlal_high_s8(high, a, x);
                }
                if (2 * max * 127 * fit < 32768) {
                    sum = vpadalq_s16(sum, vpaddq_s16(low, high));
                } else {
                    sum = vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
                }
            }
            dot[j].v[i] = sum;
        }
    }
}

#endif
