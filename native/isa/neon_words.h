/* Words of the vocabulary that are the same for 64-bit and 32-bit ARM: four registers of 4 lanes.
 * See scalar.h for the meaning. */
#ifndef EDGE_ISA_NEON_WORDS_H
#define EDGE_ISA_NEON_WORDS_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float32x4_t v[4];
} vf;
typedef struct {
    int32x4_t v[4];
} vi;

#define QUARTERS(i) UNROLL for (int i = 0; i < 4; i++)

INLINE vf vf_load(const float *p) {
    return (vf){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
INLINE void vf_store(float *p, vf a) { QUARTERS(i) vst1q_f32(p + 4 * i, a.v[i]); }
INLINE vf vf_set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return (vf){{v, v, v, v}};
}
INLINE vf vf_zero(void) { return vf_set1(0.0f); }
INLINE vf vf_load_n(const float *p, int n) {
    if (n >= 16) {
        return vf_load(p);
    }
    float some[16] = {0};
    memcpy(some, p, (size_t)n * 4);
    return vf_load(some);
}
INLINE void vf_store_n(float *p, vf a, int n) {
    if (n >= 16) {
        vf_store(p, a);
        return;
    }
    float all[16];
    vf_store(all, a);
    memcpy(p, all, (size_t)n * 4);
}
INLINE vf vf_add(vf a, vf b) {
    QUARTERS(i) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
    return a;
}
INLINE vf vf_sub(vf a, vf b) {
    QUARTERS(i) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
    return a;
}
INLINE vf vf_mul(vf a, vf b) {
    QUARTERS(i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
    return a;
}
INLINE vf vf_fma(vf a, vf b, vf c) {
    QUARTERS(i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return c;
}
INLINE vf vf_keep(vf a, int first, int last, float fill) {
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
INLINE vf vf_from_bfloat(const uint16_t *p) {
    vf r;
    QUARTERS(i) r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return r;
}
INLINE vi vi_set1(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return (vi){{v, v, v, v}};
}
INLINE vi vi_add(vi a, vi b) {
    QUARTERS(i) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
    return a;
}
INLINE vi vi_max(vi a, vi b) {
    QUARTERS(i) a.v[i] = vmaxq_s32(a.v[i], b.v[i]);
    return a;
}
INLINE vi vi_abs_bits(vf a) {
    vi r;
    QUARTERS(i) r.v[i] = vreinterpretq_s32_f32(vabsq_f32(a.v[i]));
    return r;
}
INLINE vf vf_from_int(vi a) {
    vf r;
    QUARTERS(i) r.v[i] = vcvtq_f32_s32(a.v[i]);
    return r;
}
INLINE vf vf_pow2(vi n) {
    const int32x4_t bias = vdupq_n_s32(127);
    vf r;
    QUARTERS(i) r.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], bias), 23));
    return r;
}
INLINE vi vi_bits(vi a, int shift, int mask) {
    QUARTERS(i) a.v[i] = (a.v[i] >> shift) & vdupq_n_s32(mask);
    return a;
}
INLINE vi vi_mul(vi a, vi b) {
    QUARTERS(i) a.v[i] = vmulq_s32(a.v[i], b.v[i]);
    return a;
}
INLINE vi vi_pair(vi low, vi high) {
    QUARTERS(i) low.v[i] = vsliq_n_s32(low.v[i], high.v[i], 16);
    return low;
}

#endif
