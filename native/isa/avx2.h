/* The vocabulary for AVX2, FMA and F16C: two registers of 8 lanes. See scalar.h for the meaning. */
#ifndef EDGE_ISA_AVX2_H
#define EDGE_ISA_AVX2_H

#include <immintrin.h>
#include <stdint.h>

typedef struct {
    __m256 lo, hi;
} vf;
typedef struct {
    __m256i lo, hi;
} vi;
typedef struct {
    __m256i lo, hi;
} vc;

#define TILE 4
#define QUERIES 4
#define ATTENTION_WIDTH 1

static inline vf vf_load(const float *p) {
    return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
static inline void vf_store(float *p, vf a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
static inline vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf vf_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }

/* All ones in the 8 lanes base.. that are below n. */
static inline __m256i lanes_below(int base, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - base), lane);
}
static inline vf vf_load_n(const float *p, int n) {
    return (vf){_mm256_maskload_ps(p, lanes_below(0, n)),
                _mm256_maskload_ps(p + 8, lanes_below(8, n))};
}
static inline void vf_store_n(float *p, vf a, int n) {
    _mm256_maskstore_ps(p, lanes_below(0, n), a.lo);
    _mm256_maskstore_ps(p + 8, lanes_below(8, n), a.hi);
}
static inline vf vf_add(vf a, vf b) {
    return (vf){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
static inline vf vf_sub(vf a, vf b) {
    return (vf){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
static inline vf vf_mul(vf a, vf b) {
    return (vf){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
static inline vf vf_div(vf a, vf b) {
    return (vf){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
static inline vf vf_fma(vf a, vf b, vf c) {
    return (vf){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline vf vf_max(vf a, vf b) {
    return (vf){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
static inline vf vf_min(vf a, vf b) {
    return (vf){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
static inline float vf_sum(vf a) {
    const __m256 eight = _mm256_add_ps(a.lo, a.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float vf_hmax(vf a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline vf vf_keep(vf a, int first, int last, float fill) {
    const __m256i lo = _mm256_andnot_si256(lanes_below(0, first), lanes_below(0, last));
    const __m256i hi = _mm256_andnot_si256(lanes_below(8, first), lanes_below(8, last));
    const __m256 f = _mm256_set1_ps(fill);
    return (vf){_mm256_blendv_ps(f, a.lo, _mm256_castsi256_ps(lo)),
                _mm256_blendv_ps(f, a.hi, _mm256_castsi256_ps(hi))};
}
static inline vf vf_from_half(const uint16_t *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
static inline vf vf_from_bfloat(const uint16_t *p) {
    const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
static inline void vf_to_half(uint16_t *p, vf a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

static inline vi vi_set1(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline vi vi_add(vi a, vi b) {
    return (vi){_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
static inline vi vi_max(vi a, vi b) {
    return (vi){_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
static inline int32_t vi_hmax(vi a) {
    const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
static inline int32_t vi_hsum(vi a) {
    const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline vi vi_abs_bits(vf a) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return (vi){_mm256_and_si256(_mm256_castps_si256(a.lo), mask),
                _mm256_and_si256(_mm256_castps_si256(a.hi), mask)};
}
static inline vi vi_round(vf a) { return (vi){_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
static inline vf vf_from_int(vi a) {
    return (vf){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
static inline vf vf_pow2(vi n) {
    const __m256i bias = _mm256_set1_epi32(127);
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}
static inline void vi_to_bytes(int8_t *p, vi a) {
    const __m256i words = _mm256_packs_epi32(a.lo, a.hi); /* 0-3 8-11 | 4-7 12-15 */
    const __m256i sorted = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(sorted),
                                                   _mm256_extracti128_si256(sorted, 1)));
}

static inline vc vc_load(const uint8_t *p) {
    return (vc){_mm256_loadu_si256((const __m256i *)p),
                _mm256_loadu_si256((const __m256i *)(p + 32))};
}
static inline vc vc_low(vc a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return (vc){_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
static inline vc vc_high(vc a) {
    return vc_low((vc){_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
static inline vc vc_signed(vc a) { return a; }
static inline vc vc_table(const int8_t table[16], vc a) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vc){_mm256_shuffle_epi8(t, a.lo), _mm256_shuffle_epi8(t, a.hi)};
}
static inline __m256i four_bytes(const int8_t *p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}

/* Pairs of products fit 16 bits for all 8 steps (8 x 2 x 15 x 127 = 30480): one widening a group.
 */
static inline void vc_dot_nibbles(vi *dot, const vc w[8], const int8_t *x, const int32_t *minus_sum,
                                  int zero, int c) {
    const __m256i ones = _mm256_set1_epi16(1);
    vi pairs[TILE];
    UNROLL for (int j = 0; j < c; j++) {
        pairs[j] = (vi){_mm256_setzero_si256(), _mm256_setzero_si256()};
    }
    UNROLL for (int s = 0; s < 8; s++) {
        UNROLL for (int j = 0; j < c; j++) {
            const __m256i four = four_bytes(x + 4 * (s * c + j));
            pairs[j].lo = _mm256_add_epi16(pairs[j].lo, _mm256_maddubs_epi16(w[s].lo, four));
            pairs[j].hi = _mm256_add_epi16(pairs[j].hi, _mm256_maddubs_epi16(w[s].hi, four));
        }
    }
    UNROLL for (int j = 0; j < c; j++) {
        const vi sum = {_mm256_madd_epi16(pairs[j].lo, ones), _mm256_madd_epi16(pairs[j].hi, ones)};
        dot[j] = zero == 0 ? sum : vi_add(sum, vi_set1(zero * minus_sum[j]));
    }
}

/* |w| with its sign moved onto x: 2 x 128 x 127 fits 16 bits, widened at each step. */
static inline void vc_dot_signed(vi *dot, const vc w[8], const int8_t *x, const int32_t *minus_sum,
                                 int c) {
    (void)minus_sum;
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL for (int j = 0; j < c; j++) { dot[j] = vi_set1(0); }
    UNROLL for (int s = 0; s < 8; s++) {
        const __m256i lo = _mm256_abs_epi8(w[s].lo), hi = _mm256_abs_epi8(w[s].hi);
        UNROLL for (int j = 0; j < c; j++) {
            const __m256i four = four_bytes(x + 4 * (s * c + j));
            const __m256i a = _mm256_maddubs_epi16(lo, _mm256_sign_epi8(four, w[s].lo));
            const __m256i b = _mm256_maddubs_epi16(hi, _mm256_sign_epi8(four, w[s].hi));
            dot[j].lo = _mm256_add_epi32(dot[j].lo, _mm256_madd_epi16(a, ones));
            dot[j].hi = _mm256_add_epi32(dot[j].hi, _mm256_madd_epi16(b, ones));
        }
    }
}

#endif
