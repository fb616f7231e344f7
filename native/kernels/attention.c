/* Rotary embedding, cache writes, attention.
 *
 * Attention walks the keys in blocks of PAGE_POSITIONS at fixed absolute positions with a running
 * maximum (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022). A query's arithmetic
 * depends on its own position alone: not on the tile it is in, the chunking or the threads. */
#include <math.h>

#include "kernels/exp.h"
#include "kv.h"

void FN(rotate)(const rotate_args *a, int64_t i) {
    const int half = a->n_rot / 2;
    const float *angles = a->angles + i * a->n_rot;
    for (int32_t head = 0; head < a->n_heads + a->n_kv_heads; head++) {
        float *x = a->x + i * a->x_stride + (int64_t)head * a->head_dim;
        const int step = a->interleaved ? 2 : 1, apart = a->interleaved ? 1 : half;
        for (int j = 0; j < half; j++) {
            const float cosine = angles[2 * j], sine = angles[2 * j + 1];
            const float x0 = x[step * j], x1 = x[step * j + apart];
            x[step * j] = x0 * cosine - x1 * sine;
            x[step * j + apart] = x0 * sine + x1 * cosine;
        }
    }
}

void FN(store)(const float *k, const float *v, int32_t head_dim, void *place, int32_t slot) {
    uint16_t *keys = (uint16_t *)place + (int64_t)(slot / 16) * head_dim * 16 + slot % 16;
    uint16_t *values =
        (uint16_t *)((uint8_t *)place + kv_key_bytes(head_dim)) + (int64_t)slot * head_dim;
    for (int32_t d = 0; d < head_dim; d += 16) {
        uint16_t halves[16];
        vf_to_half(halves, vf_load(k + d));
        for (int i = 0; i < 16; i++) {
            keys[(d + i) * 16] = halves[i];
        }
        vf_to_half(values + d, vf_load(v + d));
    }
}

enum { KEY_PANELS = PAGE_POSITIONS / 16 };
_Static_assert(KEY_PANELS % ATTENTION_WIDTH == 0, "whole pages");

/* QUERIES queries at most, on their way over the keys. */
typedef struct {
    float q[QUERIES][MAX_HEAD_DIM]; /* scaled by 1 / sqrt(head_dim) */
    float p[QUERIES][PAGE_POSITIONS];
    float sum[QUERIES][MAX_HEAD_DIM]; /* of exp(score - most) * value */
    float most[QUERIES], total[QUERIES];
    /* It sees first <= position < last, of sinks first_sink <= position. */
    int32_t first[QUERIES], first_sink[QUERIES], last[QUERIES];
} tile;

/* p = scores of n queries with the positions of `panels` key panels from the i-th on. Two panels
 * at a time let each query load serve two products. */
INLINE void score(tile *t, const uint16_t *keys, int i_panel, int32_t head_dim, int n, int panels) {
    const uint16_t *first = keys + (int64_t)i_panel * head_dim * 16;
    vf sum[2][QUERIES];
    UNROLL for (int i = 0; i < n; i++) { sum[0][i] = sum[1][i] = vf_zero(); }
    for (int32_t d = 0; d < head_dim; d++) {
        const vf key = vf_from_half(first + 16 * d);
        const vf next = panels > 1 ? vf_from_half(first + 16 * (head_dim + d)) : key;
        UNROLL for (int i = 0; i < n; i++) {
            const vf q = vf_set1(t->q[i][d]);
            sum[0][i] = vf_fma(key, q, sum[0][i]);
            if (panels > 1) {
                sum[1][i] = vf_fma(next, q, sum[1][i]);
            }
        }
    }
    UNROLL for (int i = 0; i < n; i++) {
        vf_store(&t->p[i][16 * i_panel], sum[0][i]);
        if (panels > 1) {
            vf_store(&t->p[i][16 * (i_panel + 1)], sum[1][i]);
        }
    }
}

/* Scores of query i in a block, first <= slot < last, to exp(score - most); rescales its sums. */
INLINE void soften(tile *t, int i, int first, int last, int32_t head_dim) {
    vf s[KEY_PANELS], block_most = vf_set1(-INFINITY);
    for (int panel = 0; panel < KEY_PANELS; panel++) {
        s[panel] = vf_keep(vf_load(&t->p[i][16 * panel]), first - 16 * panel, last - 16 * panel,
                           -INFINITY);
        block_most = vf_max(block_most, s[panel]);
    }
    const float before = t->most[i], now = vf_hmax(block_most);
    const float most = now > before ? now : before;
    for (int panel = 0; panel < KEY_PANELS; panel++) {
        s[panel] = vf_keep(vf_exp(vf_sub(s[panel], vf_set1(most))), first - 16 * panel,
                           last - 16 * panel, 0.0f);
        vf_store(&t->p[i][16 * panel], s[panel]);
    }
    _Static_assert(KEY_PANELS == 4, "the tree below is of four");
    const float total = vf_sum(vf_add(vf_add(s[0], s[1]), vf_add(s[2], s[3])));
    if (most == before) { /* the factor would be 1, exactly */
        t->total[i] += total;
    } else if (before == -INFINITY) { /* nothing yet */
        t->total[i] = total;
    } else {
        float factors[16];
        vf_store(factors, vf_exp(vf_set1(before - most)));
        t->total[i] = fmaf(t->total[i], factors[0], total);
        for (int32_t d = 0; d < head_dim; d += 16) {
            vf_store(&t->sum[i][d], vf_mul(vf_load(&t->sum[i][d]), vf_set1(factors[0])));
        }
    }
    t->most[i] = most;
}

/* sum += p * value over first <= slot < last, in this order, for queries i0 .. i0 + n - 1 and
 * 16 or 32 elements from d on. */
INLINE void gather_some(tile *t, const uint16_t *values, int first, int last, int32_t head_dim,
                        int i0, int n, int32_t d, bool two) {
    vf sum[2][QUERIES];
    UNROLL for (int i = 0; i < n; i++) {
        sum[0][i] = vf_load(&t->sum[i0 + i][d]);
        sum[1][i] = two ? vf_load(&t->sum[i0 + i][d + 16]) : sum[0][i];
    }
    for (int slot = first; slot < last; slot++) {
        const uint16_t *value = values + (int64_t)slot * head_dim + d;
        const vf here = vf_from_half(value), next = two ? vf_from_half(value + 16) : here;
        UNROLL for (int i = 0; i < n; i++) {
            const vf p = vf_set1(t->p[i0 + i][slot]);
            sum[0][i] = vf_fma(p, here, sum[0][i]);
            if (two) {
                sum[1][i] = vf_fma(p, next, sum[1][i]);
            }
        }
    }
    UNROLL for (int i = 0; i < n; i++) {
        vf_store(&t->sum[i0 + i][d], sum[0][i]);
        if (two) {
            vf_store(&t->sum[i0 + i][d + 16], sum[1][i]);
        }
    }
}

INLINE void gather_values(tile *t, const uint16_t *values, int first, int last, int32_t head_dim,
                          int i0, int n) {
    int32_t d = 0;
    for (; ATTENTION_WIDTH > 1 && d + 32 <= head_dim; d += 32) {
        gather_some(t, values, first, last, head_dim, i0, n, d, true);
    }
    for (; d < head_dim; d += 16) {
        gather_some(t, values, first, last, head_dim, i0, n, d, false);
    }
}

static inline int32_t max(int32_t x, int32_t y) { return x > y ? x : y; }

static inline int clamp(int32_t x, int32_t low, int32_t high) {
    return x < low ? low : x > high ? high : x;
}

/* All n queries over the block that starts at position `base`. */
INLINE void attend_block(tile *t, const uint8_t *place, int32_t base, bool is_sink,
                         int32_t head_dim, int n) {
    const uint16_t *keys = (const uint16_t *)place;
    const uint16_t *values = (const uint16_t *)(place + kv_key_bytes(head_dim));
    int first[QUERIES], last[QUERIES], low = PAGE_POSITIONS, high = 0, all_first = 0,
                                       all_last = PAGE_POSITIONS;
    for (int i = 0; i < n; i++) {
        first[i] = clamp((is_sink ? t->first_sink : t->first)[i] - base, 0, PAGE_POSITIONS);
        last[i] = clamp(t->last[i] - base, first[i], PAGE_POSITIONS);
        low = first[i] < low ? first[i] : low;
        high = last[i] > high ? last[i] : high;
        all_first = first[i] > all_first ? first[i] : all_first;
        all_last = last[i] < all_last ? last[i] : all_last;
    }
    for (int panel = low / 16 / ATTENTION_WIDTH * ATTENTION_WIDTH; 16 * panel < high;
         panel += ATTENTION_WIDTH) {
        score(t, keys, panel, head_dim, n, ATTENTION_WIDTH);
    }
    for (int i = 0; i < n; i++) {
        if (first[i] < last[i]) {
            soften(t, i, first[i], last[i], head_dim);
        }
    }
    if (all_first < all_last) { /* what all see together, what each sees alone before and after */
        for (int i = 0; i < n; i++) {
            gather_values(t, values, first[i], all_first, head_dim, i, 1);
        }
        gather_values(t, values, all_first, all_last, head_dim, 0, n);
        for (int i = 0; i < n; i++) {
            gather_values(t, values, all_last, last[i], head_dim, i, 1);
        }
    } else {
        for (int i = 0; i < n; i++) {
            gather_values(t, values, first[i], last[i], head_dim, i, 1);
        }
    }
}

/* Queries j0 .. j0 + n - 1; query j is head j % group of row j / group. */
INLINE void attend(const attention_args *a, int64_t j0, int n) {
    tile t;
    const float scale = 1.0f / sqrtf((float)a->head_dim);
    const int64_t first_head = (int64_t)a->i_kv_head * a->group;
    for (int i = 0; i < n; i++) {
        const int64_t row = (j0 + i) / a->group, head = first_head + (j0 + i) % a->group;
        const float *q = a->x + row * a->x_stride + head * a->head_dim;
        for (int32_t d = 0; d < a->head_dim; d += 16) {
            vf_store(&t.q[i][d], vf_mul(vf_load(q + d), vf_set1(scale)));
            vf_store(&t.sum[i][d], vf_zero());
        }
        t.most[i] = -INFINITY;
        t.total[i] = 0.0f;
        t.last[i] = a->start + (int32_t)row + 1;
        const int32_t page = kv_first_page(a->kv, (t.last[i] - 1) / PAGE_POSITIONS);
        t.first_sink[i] = a->window > 0 && t.last[i] > a->window ? t.last[i] - a->window : 0;
        t.first[i] = max(t.first_sink[i], page * PAGE_POSITIONS);
    }
    int32_t base = t.first_sink[0] / PAGE_POSITIONS * PAGE_POSITIONS;
    for (; base < t.last[n - 1]; base += PAGE_POSITIONS) {
        const bool is_sink = base < a->kv->sink_pages * PAGE_POSITIONS;
        if (!is_sink) { /* over what nobody sees */
            base = max(base, t.first[0] / PAGE_POSITIONS * PAGE_POSITIONS);
        }
        const uint8_t *page = a->kv->pages[base / PAGE_POSITIONS];
        attend_block(&t, page + a->kv_offset, base, is_sink, a->head_dim, n);
    }
    for (int i = 0; i < n; i++) {
        const int64_t row = (j0 + i) / a->group, head = first_head + (j0 + i) % a->group;
        float *out = a->out + row * a->out_stride + head * a->head_dim;
        for (int32_t d = 0; d < a->head_dim; d += 16) {
            vf_store(out + d, vf_div(vf_load(&t.sum[i][d]), vf_set1(t.total[i])));
        }
    }
}

void FN(attention)(const attention_args *a, int64_t row0, int64_t row1) {
    int64_t j = row0 * a->group;
    const int64_t end = row1 * a->group;
    for (; j + QUERIES <= end; j += QUERIES) {
        attend(a, j, QUERIES);
    }
    switch (end - j) {
#if QUERIES > 4
    case 7: attend(a, j, 7); break;
    case 6: attend(a, j, 6); break;
    case 5: attend(a, j, 5); break;
    case 4: attend(a, j, 4); break;
#endif
    case 3: attend(a, j, 3); break;
    case 2: attend(a, j, 2); break;
    case 1: attend(a, j, 1); break;
    default: break;
    }
}
