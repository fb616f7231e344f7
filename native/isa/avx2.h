/* The vocabulary for AVX2, FMA and F16C: two registers of 8 lanes. See scalar.h for the meaning.
 * With EDGE_AVXVNNI dot products have an instruction of their own: see avxvnni.h. */
#ifndef EDGE_ISA_AVX2_H
#define EDGE_ISA_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#include "formats/formats.h"

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
#define FLOAT_COLUMNS 2
#define PANELS 1
#define PANEL_COLUMNS 4
#define QUERIES 4
#define ATTENTION_WIDTH 1
#define SIGNED_WEIGHTS 0
#ifdef EDGE_AVXVNNI
#define NEEDS_MAX 0
#else
#define NEEDS_MAX 1
#endif

INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vf_store(float *p, vf a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
INLINE vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vf vf_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }

/* All ones in the 8 lanes base.. that are below n. */
INLINE __m256i lanes_below(int base, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - base), lane);
}
INLINE vf vf_load_n(const float *p, int n) {
    return (vf){_mm256_maskload_ps(p, lanes_below(0, n)),
                _mm256_maskload_ps(p + 8, lanes_below(8, n))};
}
INLINE void vf_store_n(float *p, vf a, int n) {
    _mm256_maskstore_ps(p, lanes_below(0, n), a.lo);
    _mm256_maskstore_ps(p + 8, lanes_below(8, n), a.hi);
}
INLINE vf vf_add(vf a, vf b) { return (vf){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE vf vf_sub(vf a, vf b) { return (vf){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE vf vf_mul(vf a, vf b) { return (vf){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE vf vf_div(vf a, vf b) { return (vf){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
INLINE vf vf_fma(vf a, vf b, vf c) {
    return (vf){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE vf vf_max(vf a, vf b) { return (vf){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE vf vf_min(vf a, vf b) { return (vf){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE float vf_sum(vf a) {
    const __m256 eight = _mm256_add_ps(a.lo, a.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float vf_hmax(vf a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE vf vf_keep(vf a, int first, int last, float fill) {
    const __m256i lo = _mm256_andnot_si256(lanes_below(0, first), lanes_below(0, last));
    const __m256i hi = _mm256_andnot_si256(lanes_below(8, first), lanes_below(8, last));
    const __m256 f = _mm256_set1_ps(fill);
    return (vf){_mm256_blendv_ps(f, a.lo, _mm256_castsi256_ps(lo)),
                _mm256_blendv_ps(f, a.hi, _mm256_castsi256_ps(hi))};
}
INLINE vf vf_from_half(const uint16_t *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE vf vf_from_bfloat(const uint16_t *p) {
    const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
INLINE void vf_to_half(uint16_t *p, vf a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

INLINE vi vi_set1(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE vi vi_add(vi a, vi b) {
    return (vi){_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
INLINE vi vi_max(vi a, vi b) {
    return (vi){_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
INLINE int32_t vi_hmax(vi a) {
    const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
INLINE int32_t vi_hsum(vi a) {
    const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
INLINE vi vi_abs_bits(vf a) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return (vi){_mm256_and_si256(_mm256_castps_si256(a.lo), mask),
                _mm256_and_si256(_mm256_castps_si256(a.hi), mask)};
}
INLINE vi vi_round(vf a) { return (vi){_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
INLINE vf vf_from_int(vi a) { return (vf){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
INLINE vf vf_pow2(vi n) {
    const __m256i bias = _mm256_set1_epi32(127);
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}
INLINE void vi_to_steps(int8_t *p, vi a) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i words = _mm256_packs_epi32(a.lo, a.hi); /* 0-3 8-11 | 4-7 12-15 */
    const __m256i sorted = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1));
    _mm_storeu_si128((__m128i *)p, _mm_shuffle_epi8(bytes, order));
}
INLINE vi vi_from_i8(const uint8_t *p) {
    const __m128i b = _mm_loadu_si128((const __m128i *)p);
    return (vi){_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))};
}
INLINE vi vi_from_u8(const uint8_t *p) {
    const __m128i b = _mm_loadu_si128((const __m128i *)p);
    return (vi){_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))};
}
INLINE vi vi_bits(vi a, int shift, int mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return (vi){_mm256_and_si256(_mm256_srli_epi32(a.lo, shift), m),
                _mm256_and_si256(_mm256_srli_epi32(a.hi, shift), m)};
}
INLINE vi vi_mul(vi a, vi b) {
    return (vi){_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
INLINE vi vi_pair(vi low, vi high) {
    return (vi){_mm256_blend_epi16(low.lo, _mm256_slli_epi32(high.lo, 16), 0xaa),
                _mm256_blend_epi16(low.hi, _mm256_slli_epi32(high.hi, 16), 0xaa)};
}
INLINE __m256i four_bytes(const void *p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}
INLINE vi vi_pair_dot(vi a, const int16_t pair[2]) {
    const __m256i p = four_bytes(pair);
    return (vi){_mm256_madd_epi16(a.lo, p), _mm256_madd_epi16(a.hi, p)};
}

INLINE vc vc_load(const uint8_t *p) {
    return (vc){_mm256_loadu_si256((const __m256i *)p),
                _mm256_loadu_si256((const __m256i *)(p + 32))};
}
INLINE vc vc_bits(vc a, int shift, int mask) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    return (vc){_mm256_and_si256(_mm256_srli_epi16(a.lo, shift), m),
                _mm256_and_si256(_mm256_srli_epi16(a.hi, shift), m)};
}
INLINE vc vc_or_bits(vc w, vc a, int up, int mask) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    const __m256i lo = up < 0 ? _mm256_srli_epi16(a.lo, -up) : _mm256_slli_epi16(a.lo, up);
    const __m256i hi = up < 0 ? _mm256_srli_epi16(a.hi, -up) : _mm256_slli_epi16(a.hi, up);
    return (vc){_mm256_or_si256(w.lo, _mm256_and_si256(lo, m)),
                _mm256_or_si256(w.hi, _mm256_and_si256(hi, m))};
}
INLINE vc vc_flip(vc a) {
    const __m256i top = _mm256_set1_epi8(-128);
    return (vc){_mm256_xor_si256(a.lo, top), _mm256_xor_si256(a.hi, top)};
}
INLINE vc vc_look(__m128i table, vc a) {
    const __m256i t = _mm256_broadcastsi128_si256(table);
    return (vc){_mm256_shuffle_epi8(t, a.lo), _mm256_shuffle_epi8(t, a.hi)};
}
INLINE void vc_zip(vc low, vc high, vc *a, vc *b) {
    *a = (vc){_mm256_unpacklo_epi8(low.lo, high.lo), _mm256_unpacklo_epi8(low.hi, high.hi)};
    *b = (vc){_mm256_unpackhi_epi8(low.lo, high.lo), _mm256_unpackhi_epi8(low.hi, high.hi)};
}
/* All ones in the 16-bit lanes whose bit is set. */
INLINE __m256i lanes_of(int bits) {
    const __m256i one = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                          8192, 16384, -32768);
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16((short)bits), one), one);
}
/* Four entries side by side. */
INLINE int64_t four_entries(const uint16_t *entries, const uint16_t *at) {
    return (int64_t)(entries[at[0]] | (uint64_t)entries[at[1]] << 16 |
                     (uint64_t)entries[at[2]] << 32 | (uint64_t)entries[at[3]] << 48);
}
/* One index after the other, no shuffle of this ISA reaches far enough; whole entries, so that
 * there is one load for two bytes, and their bytes are parted at the end. */
INLINE void vc_grid(const grid_info *grid, int index_bits, const uint8_t *index,
                    const uint8_t *high, vc *low, vc *high_out) {
    uint16_t at[64];
    UNROLL for (int i = 0; i < 64; i += 16) {
        __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(index + i)));
        for (int b = 0; b < index_bits - 8; b++) {
            const int bits = high[8 * b + i / 8] | high[8 * b + i / 8 + 1] << 8;
            const __m256i bit = _mm256_set1_epi16((short)(256 << b));
            wide = _mm256_or_si256(wide, _mm256_and_si256(lanes_of(bits), bit));
        }
        _mm256_storeu_si256((__m256i *)(at + i), wide);
    }
    const uint16_t *entries = grid->entries;
    __m256i e[4];
    UNROLL for (int i = 0; i < 4; i++) {
        const uint16_t *p = at + 16 * i;
        e[i] = _mm256_setr_epi64x(four_entries(entries, p), four_entries(entries, p + 4),
                                  four_entries(entries, p + 8), four_entries(entries, p + 12));
    }
    const __m256i mask = _mm256_set1_epi16(255);
    __m256i lows[2], highs[2];
    UNROLL for (int i = 0; i < 2; i++) {
        const __m256i p = e[2 * i], q = e[2 * i + 1];
        const __m256i l = _mm256_packus_epi16(_mm256_and_si256(p, mask), _mm256_and_si256(q, mask));
        const __m256i h = _mm256_packus_epi16(_mm256_srli_epi16(p, 8), _mm256_srli_epi16(q, 8));
        lows[i] = _mm256_permute4x64_epi64(l, 0xd8);
        highs[i] = _mm256_permute4x64_epi64(h, 0xd8);
    }
    *low = (vc){lows[0], lows[1]};
    *high_out = (vc){highs[0], highs[1]};
}

INLINE vi start_at(q8_group q, int j, int first, int n, int zero_shift) {
    if (zero_shift < 0) {
        return vi_set1(0);
    }
    if (n == STEPS) {
        const __m256i sum = _mm256_slli_epi32(_mm256_set1_epi32(q.minus_sum[j]), zero_shift);
        return (vi){sum, sum};
    }
    const vi zeros = vi_set1(first == 0 ? 1 << zero_shift : 1 << (zero_shift + 16));
    return vi_pair_dot(zeros, q.minus_halves + 2 * j);
}

#ifdef EDGE_AVXVNNI
INLINE vc vc_signed(vc a) { return vc_flip(a); }
INLINE vc vc_table(const uint8_t table[16], vc a, int max) {
    (void)max;
    return vc_look(_mm_loadu_si128((const __m128i *)table), a);
}
INLINE void vc_dot(vi *dot, int row, const vc *w, int panels, int first, int n, q8_group q,
                   int zero_shift, int max, int c) {
    (void)row, (void)max, (void)panels;
    UNROLL for (int j = 0; j < c; j++) { dot[j] = start_at(q, j, first, n, zero_shift); }
    UNROLL for (int s = first; s < first + n; s++) {
        UNROLL for (int j = 0; j < c; j++) {
            const __m256i four = four_bytes(q.codes + 4 * (s * q.stride + j));
            dot[j].lo = _mm256_dpbusd_avx_epi32(dot[j].lo, w[s].lo, four);
            dot[j].hi = _mm256_dpbusd_avx_epi32(dot[j].hi, w[s].hi, four);
        }
    }
}
#else
/* Bytes of the full range stay signed: see dot_signed. */
INLINE vc vc_signed(vc a) { return a; }
INLINE vc vc_table(const uint8_t table[16], vc a, int max) {
    const __m128i t = _mm_loadu_si128((const __m128i *)table);
    return vc_look(max == 255 ? _mm_xor_si128(t, _mm_set1_epi8(-128)) : t, a);
}

/* |w| with its sign moved onto x: 2 x 128 x 127 fits 16 bits, widened at each step. */
INLINE void dot_signed(vi *dot, const vc *w, int first, int n, q8_group q, int c) {
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL for (int j = 0; j < c; j++) { dot[j] = vi_set1(0); }
    UNROLL for (int s = first; s < first + n; s++) {
        const __m256i lo = _mm256_abs_epi8(w[s].lo), hi = _mm256_abs_epi8(w[s].hi);
        UNROLL for (int j = 0; j < c; j++) {
            const __m256i four = four_bytes(q.codes + 4 * (s * q.stride + j));
            const __m256i a = _mm256_maddubs_epi16(lo, _mm256_sign_epi8(four, w[s].lo));
            const __m256i b = _mm256_maddubs_epi16(hi, _mm256_sign_epi8(four, w[s].hi));
            dot[j].lo = _mm256_add_epi32(dot[j].lo, _mm256_madd_epi16(a, ones));
            dot[j].hi = _mm256_add_epi32(dot[j].hi, _mm256_madd_epi16(b, ones));
        }
    }
}

/* Pairs of products of as many steps as fit 16 bits are widened at once: all 8 for codes up to 15
 * (8 x 2 x 15 x 127 = 30480), 4 up to 31, 2 up to 63, 1 up to 127. */
INLINE void vc_dot(vi *dot, int row, const vc *w, int panels, int first, int n, q8_group q,
                   int zero_shift, int max, int c) {
    (void)row, (void)panels;
    if (max == 255) {
        dot_signed(dot, w, first, n, q, c);
        return;
    }
    const __m256i ones = _mm256_set1_epi16(1);
    const int most = max <= 15 ? 8 : max <= 31 ? 4 : max <= 63 ? 2 : 1, fit = most < n ? most : n;
    UNROLL for (int j = 0; j < c; j++) { dot[j] = start_at(q, j, first, n, zero_shift); }
    UNROLL for (int s = first; s < first + n; s += fit) {
        vi pairs[TILE] = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
        UNROLL for (int i = s; i < s + fit; i++) {
            UNROLL for (int j = 0; j < c; j++) {
                const __m256i four = four_bytes(q.codes + 4 * (i * q.stride + j));
                const __m256i lo = _mm256_maddubs_epi16(w[i].lo, four);
                const __m256i hi = _mm256_maddubs_epi16(w[i].hi, four);
                pairs[j].lo = i == s ? lo : _mm256_add_epi16(pairs[j].lo, lo);
                pairs[j].hi = i == s ? hi : _mm256_add_epi16(pairs[j].hi, hi);
            }
        }
        UNROLL for (int j = 0; j < c; j++) {
            dot[j].lo = _mm256_add_epi32(dot[j].lo, _mm256_madd_epi16(pairs[j].lo, ones));
            dot[j].hi = _mm256_add_epi32(dot[j].hi, _mm256_madd_epi16(pairs[j].hi, ones));
        }
    }
}
#endif

#endif
