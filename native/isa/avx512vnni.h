/* The vocabulary for AVX-512 with VNNI: one register of 16 lanes. See scalar.h for the meaning.
 * With EDGE_AVX512VBMI grids are looked up by bytes: see avx512vbmi.h. */
#ifndef EDGE_ISA_AVX512VNNI_H
#define EDGE_ISA_AVX512VNNI_H

#include <immintrin.h>
#include <stdint.h>

#include "formats/formats.h"

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vc;

#define TILE 8
#define FLOAT_COLUMNS 8
#define PANELS 2
#define PANEL_COLUMNS 4
#define QUERIES 8
#define ATTENTION_WIDTH 2
#define NEEDS_MAX 0
#define SIGNED_WEIGHTS 0

INLINE __mmask16 lanes_below(int n) {
    return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
INLINE void vf_store_n(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), a); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE float vf_sum(vf a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
INLINE vf vf_keep(vf a, int first, int last, float fill) {
    const __mmask16 keep = (__mmask16)(lanes_below(last) & ~lanes_below(first));
    return _mm512_mask_mov_ps(_mm512_set1_ps(fill), keep, a);
}
INLINE vf vf_from_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE vf vf_from_bfloat(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE void vf_to_half(uint16_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
INLINE int32_t vi_hmax(vi a) { return _mm512_reduce_max_epi32(a); }
INLINE int32_t vi_hsum(vi a) { return _mm512_reduce_add_epi32(a); }
INLINE vi vi_abs_bits(vf a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
}
INLINE vi vi_round(vf a) { return _mm512_cvtps_epi32(a); }
INLINE vf vf_from_int(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vf vf_pow2(vi n) {
    const __m512i biased = _mm512_add_epi32(n, _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
INLINE void vi_to_steps(int8_t *p, vi a) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128((__m128i *)p, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(a), order));
}
INLINE vi vi_from_i8(const uint8_t *p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE vi vi_from_u8(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE vi vi_bits(vi a, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi32(a, (unsigned)shift), _mm512_set1_epi32(mask));
}
INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
INLINE vi vi_pair(vi low, vi high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
}
INLINE __m512i four_bytes(const void *p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}
INLINE vi vi_pair_dot(vi a, const int16_t pair[2]) {
    return _mm512_madd_epi16(a, four_bytes(pair));
}

INLINE vc vc_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE vc vc_bits(vc a, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi16(a, (unsigned)shift), _mm512_set1_epi8((char)mask));
}
INLINE vc vc_or_bits(vc w, vc a, int up, int mask) {
    const __m512i shifted =
        up < 0 ? _mm512_srli_epi16(a, (unsigned)-up) : _mm512_slli_epi16(a, (unsigned)up);
    return _mm512_ternarylogic_epi32(w, shifted, _mm512_set1_epi8((char)mask), 0xf8);
}
INLINE vc vc_signed(vc a) { return _mm512_xor_si512(a, _mm512_set1_epi8(-128)); }
INLINE vc vc_table(const uint8_t table[16], vc a, int max) {
    (void)max;
    const __m128i t = _mm_loadu_si128((const __m128i *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), a);
}
INLINE void vc_zip(vc low, vc high, vc *a, vc *b) {
    *a = _mm512_unpacklo_epi8(low, high);
    *b = _mm512_unpackhi_epi8(low, high);
}

#ifdef EDGE_AVX512VBMI
/* 64 indices into a table of 128 << n bytes: two registers at a time by the low 7 bits, then one
 * choice for each bit above. */
INLINE __m512i look_up(const uint8_t *table, int n, __m512i index, const __mmask64 *choose) {
    __m512i at[8];
    UNROLL for (int i = 0; i < 1 << n; i++) {
        at[i] = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128 * i), index,
                                         _mm512_load_si512(table + 128 * i + 64));
    }
    UNROLL for (int b = 0; b < n; b++) {
        UNROLL for (int i = 0; i < 1 << (n - b - 1); i++) {
            at[i] = _mm512_mask_blend_epi8(choose[b], at[2 * i], at[2 * i + 1]);
        }
    }
    return at[0];
}
INLINE void vc_grid(const grid_info *grid, int index_bits, const uint8_t *index,
                    const uint8_t *high, vc *low, vc *high_out) {
    const __m512i i = _mm512_loadu_si512(index);
    __mmask64 choose[3] = {_mm512_movepi8_mask(i)};
    UNROLL for (int b = 0; b < index_bits - 8; b++) {
        __builtin_memcpy(&choose[1 + b], high + 8 * b, 8);
    }
    *low = look_up(grid->low, index_bits - 7, i, choose);
    *high_out = look_up(grid->high, index_bits - 7, i, choose);
}
#else
/* 32 indices into a table of 64 << n entries of 16 bits: two registers at a time by the low 6 bits,
 * then one choice for each bit above. */
INLINE __m512i look_up(const uint16_t *entries, int n, __m512i index) {
    __m512i at[16];
    UNROLL for (int i = 0; i < 1 << n; i++) {
        at[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(entries + 64 * i), index,
                                          _mm512_loadu_si512(entries + 64 * i + 32));
    }
    UNROLL for (int b = 0; b < n; b++) {
        const __mmask32 choose = _mm512_test_epi16_mask(index, _mm512_set1_epi16((short)(64 << b)));
        UNROLL for (int i = 0; i < 1 << (n - b - 1); i++) {
            at[i] = _mm512_mask_blend_epi16(choose, at[2 * i], at[2 * i + 1]);
        }
    }
    return at[0];
}
INLINE void vc_grid(const grid_info *grid, int index_bits, const uint8_t *index,
                    const uint8_t *high, vc *low, vc *high_out) {
    __m512i e[2];
    UNROLL for (int i = 0; i < 2; i++) {
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(index + 32 * i)));
        UNROLL for (int b = 0; b < index_bits - 8; b++) {
            __mmask32 bits;
            __builtin_memcpy(&bits, high + 8 * b + 4 * i, 4);
            wide = _mm512_mask_add_epi16(wide, bits, wide, _mm512_set1_epi16((short)(256 << b)));
        }
        e[i] = look_up(grid->entries, index_bits - 6, wide);
    }
    const __m512i low_bytes = _mm512_set1_epi16(255);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i l =
        _mm512_packus_epi16(_mm512_and_si512(e[0], low_bytes), _mm512_and_si512(e[1], low_bytes));
    const __m512i h = _mm512_packus_epi16(_mm512_srli_epi16(e[0], 8), _mm512_srli_epi16(e[1], 8));
    *low = _mm512_permutexvar_epi64(order, l);
    *high_out = _mm512_permutexvar_epi64(order, h);
}
#endif

INLINE vi start_at(q8_group q, int j, int first, int n, int zero_shift) {
    if (zero_shift < 0) {
        return _mm512_setzero_si512();
    }
    if (n == STEPS) {
        return _mm512_slli_epi32(_mm512_set1_epi32(q.minus_sum[j]), (unsigned)zero_shift);
    }
    const vi zeros = vi_set1(first == 0 ? 1 << zero_shift : 1 << (zero_shift + 16));
    return vi_pair_dot(zeros, q.minus_halves + 2 * j);
}
/* dpbusd takes unsigned weights as they are. Two panels by four columns are what keeps its two
 * ports busy: eight chains hide the latency, and one broadcast from memory feeds two of them. */
INLINE void vc_dot(vi *dot, int row, const vc *w, int panels, int first, int n, q8_group q,
                   int zero_shift, int max, int c) {
    (void)row, (void)max;
    UNROLL for (int j = 0; j < c; j++) {
        const vi start = start_at(q, j, first, n, zero_shift);
        UNROLL for (int p = 0; p < panels; p++) { dot[p * c + j] = start; }
    }
    UNROLL for (int s = first; s < first + n; s++) {
        UNROLL for (int j = 0; j < c; j++) {
            const __m512i four = four_bytes(q.codes + 4 * (s * q.stride + j));
            UNROLL for (int p = 0; p < panels; p++) {
                dot[p * c + j] = _mm512_dpbusd_epi32(dot[p * c + j], w[p * STEPS + s], four);
            }
        }
    }
}

/* bfloat16 dot products, which not every CPU with VNNI has: see kernels/bf16.c. */
#define HAS_BF16_DOT
#define BF16_TARGET __attribute__((target("avx512bf16")))

BF16_TARGET INLINE void vf_to_bfloat(uint16_t *p, vf a, vf b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
/* 16 rows of two k, a pair in each lane. */
INLINE vi vi_pair_rows(const uint16_t *a, const uint16_t *b) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)a));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
BF16_TARGET INLINE vf vf_dot_bfloat(vf sum, vi pairs, const uint16_t x[2]) {
    return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)four_bytes(x));
}

#endif
