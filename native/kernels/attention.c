/* Attention over the pages of a cache, see kv.h.
 *
 * It walks the keys in blocks of PAGE_POSITIONS at fixed absolute positions with a running
 * maximum (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022). A query's arithmetic
 * depends on its own position alone: not on the tile it is in, the chunking or the threads. */
#include <math.h>

#include "kernels/exp.h"
#include "kv.h"

enum { KEY_PANELS = PAGE_POSITIONS / 16 };
_Static_assert(KEY_PANELS % ATTENTION_WIDTH == 0, "whole pages");
_Static_assert(QUERIES <= TILE, "the queries of a tile are columns of a matmul");

/* QUERIES queries at most, on their way over the keys. */
typedef struct {
    float q[QUERIES][MAX_HEAD_DIM]; /* scaled by 1 / sqrt(head_dim) */
    float p[QUERIES][PAGE_POSITIONS];
    float scaled[QUERIES][PAGE_POSITIONS]; /* p times the scales of a group of values */
    float sum[QUERIES][MAX_HEAD_DIM];      /* of exp(score - most) * value */
    float most[QUERIES], total[QUERIES];
    /* It sees first <= position < last, of sinks first_sink <= position. */
    int32_t first[QUERIES], first_sink[QUERIES], last[QUERIES];
    /* The queries as a tile of quantised activations, for keys that are codes. */
    uint8_t codes[QUERIES * MAX_HEAD_DIM / GROUP * Q8_COLUMN_BYTES] __attribute__((aligned(64)));
} tile;

/* One layer and head of a page, as the compiler knows it. ahead: bytes to the same place of the
 * page that comes next, which is asked for on the way: it is where no hardware prefetcher looks. */
typedef struct {
    int32_t type;
    kv_type_info info;
    int32_t head_dim;
    const uint8_t *keys, *values;
    uintptr_t ahead;
} block;

INLINE void prefetch_next(const block *b, const void *p) {
    __builtin_prefetch((const void *)((uintptr_t)p + b->ahead));
}

/* p = scores of n queries with the positions of `panels` panels of float16 keys from the i-th on.
 * Two panels at a time let each query load serve two products. */
INLINE void score_halves(tile *t, const block *b, int i_panel, int n, int panels) {
    const int32_t head_dim = b->head_dim;
    const uint16_t *first = (const uint16_t *)b->keys + (int64_t)i_panel * head_dim * 16;
    vf sum[2][QUERIES];
    UNROLL for (int i = 0; i < n; i++) { sum[0][i] = sum[1][i] = vf_zero(); }
    for (int32_t d = 0; d < head_dim; d += 2) { /* a cache line */
        prefetch_next(b, first + 16 * d);
        if (panels > 1) {
            prefetch_next(b, first + 16 * (head_dim + d));
        }
        UNROLL for (int32_t e = d; e < d + 2; e++) {
            const vf key = vf_from_half(first + 16 * e);
            const vf next = panels > 1 ? vf_from_half(first + 16 * (head_dim + e)) : key;
            UNROLL for (int i = 0; i < n; i++) {
                const vf q = vf_set1(t->q[i][e]);
                sum[0][i] = vf_fma(key, q, sum[0][i]);
                if (panels > 1) {
                    sum[1][i] = vf_fma(next, q, sum[1][i]);
                }
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

/* The same of keys that are codes: a matmul of 16 rows and n columns. */
INLINE void score_codes(tile *t, const block *b, int i_panel, int n) {
    const int64_t bytes = panel_bytes(b->info.layout, b->head_dim);
    const uint8_t *panel = b->keys + i_panel * bytes;
    for (int64_t i = 0; i < bytes; i += 64) {
        prefetch_next(b, panel + i);
    }
    const tile_args args = {.panel = panel,
                            .panel_bytes = bytes,
                            .k = b->head_dim,
                            .x = t->codes,
                            .table = b->info.table,
                            .out = &t->p[0][16 * i_panel],
                            .stride = PAGE_POSITIONS};
    FN(tiles)[b->info.layout][n - 1](&args);
}

INLINE void score(tile *t, const block *b, int i_panel, int n) {
    if (b->info.bits == 16) {
        score_halves(t, b, i_panel, n, ATTENTION_WIDTH);
        return;
    }
    for (int i = 0; i < ATTENTION_WIDTH; i++) {
        score_codes(t, b, i_panel + i, n);
    }
}

/* p += what the base of a page adds to the scores of n queries: their products with the mean key,
 * and with the direction times what each key's codes missed of it. */
ONCE void add_base(tile *t, kv_base base, int32_t head_dim, int n) {
    float center[MAX_HEAD_DIM], direction[MAX_HEAD_DIM];
    FN(get_base)(base, 0, head_dim, center);
    FN(get_base)(base, 1, head_dim, direction);
    for (int i = 0; i < n; i++) {
        vf with_center = vf_zero(), with_direction = vf_zero();
        for (int32_t d = 0; d < head_dim; d += 16) {
            const vf q = vf_load(&t->q[i][d]);
            with_center = vf_fma(q, vf_load(center + d), with_center);
            with_direction = vf_fma(q, vf_load(direction + d), with_direction);
        }
        const vf mean = vf_set1(vf_sum(with_center)), along = vf_set1(vf_sum(with_direction));
        for (int slot = 0; slot < PAGE_POSITIONS; slot += 16) {
            float *p = &t->p[i][slot];
            const vf missed = vf_fma(vf_from_half(base.missed + slot), along, mean);
            vf_store(p, vf_add(vf_load(p), missed));
        }
    }
}

/* Scores of query i in a block, first <= slot < last, to exp(score - most); rescales its sums. */
ONCE void soften(tile *t, int i, int first, int last, int32_t head_dim) {
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

/* Elements d .. d + 15 of the value at a slot; of codes, without their scale. */
INLINE vf value_at(const block *b, int slot, int32_t d) {
    if (b->info.bits == 16) {
        return vf_from_half((const uint16_t *)b->values + (int64_t)slot * b->head_dim + d);
    }
    const int32_t n = kv_value_group(b->type, b->head_dim);
    const uint8_t *group = b->values + d / n * kv_group_bytes(b->type, b->head_dim);
    const int64_t at = (int64_t)(d % n / GROUP * PAGE_POSITIONS + slot) * GROUP;
    const uint8_t *codes = group + 2 * PAGE_POSITIONS + at * b->info.bits / 8;
    if (b->info.bits == 8) {
        return vf_from_int(vi_from_i8(codes + d % GROUP));
    }
    const vi code = vi_bits(vi_from_u8(codes), d % GROUP / 4, 15);
    return vf_from_int(vi_add(code, vi_set1(-8)));
}

/* sum += p * value over first <= slot < last, in this order, for queries i0 .. i0 + n - 1 and
 * 16 or 32 elements from d on. */
INLINE void gather_some(tile *t, const block *b, int first, int last, int i0, int n, int32_t d,
                        bool two) {
    const float (*p)[PAGE_POSITIONS] = b->info.bits == 16 ? t->p : t->scaled;
    vf sum[2][QUERIES];
    UNROLL for (int i = 0; i < n; i++) {
        sum[0][i] = vf_load(&t->sum[i0 + i][d]);
        sum[1][i] = two ? vf_load(&t->sum[i0 + i][d + 16]) : sum[0][i];
    }
    for (int slot = first; slot < last; slot++) {
        const vf here = value_at(b, slot, d), next = two ? value_at(b, slot, d + 16) : here;
        if (b->info.bits == 16) {
            prefetch_next(b, (const uint16_t *)b->values + (int64_t)slot * b->head_dim + d);
        }
        UNROLL for (int i = 0; i < n; i++) {
            const vf weight = vf_set1(p[i0 + i][slot]);
            sum[0][i] = vf_fma(weight, here, sum[0][i]);
            if (two) {
                sum[1][i] = vf_fma(weight, next, sum[1][i]);
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

/* scaled = p times the scales of the group of values that begins with element d. */
INLINE void scale_weights(tile *t, const block *b, int32_t d, int n) {
    const int64_t bytes = kv_group_bytes(b->type, b->head_dim);
    const uint8_t *group = b->values + d / kv_value_group(b->type, b->head_dim) * bytes;
    for (int slot = 0; slot < PAGE_POSITIONS; slot += 16) {
        const vf scale = vf_from_half((const uint16_t *)group + slot);
        UNROLL for (int i = 0; i < n; i++) {
            vf_store(&t->scaled[i][slot], vf_mul(vf_load(&t->p[i][slot]), scale));
        }
    }
    for (int64_t i = 0; i < bytes; i += 64) {
        prefetch_next(b, group + i);
    }
}

/* The same for one query, type known to the compiler. */
INLINE void gather_as(tile *t, block b, int32_t type, const int slots[2], int i, int32_t d,
                      bool two) {
    b.type = type;
    b.info = kv_type_table[type];
    gather_some(t, &b, slots[0], slots[1], i, 1, d, two);
}

/* The same for one query, over what others of its tile do not see: at the ends of what is seen, and
 * rare. The block comes as a copy: of one whose address was given away nothing would be known. */
ONCE void gather_alone(tile *t, block b, int first, int last, int i, int32_t d, bool two) {
    const int slots[2] = {first, last};
    if (first >= last) {
        return;
    }
    switch (b.type) {
    case EDGE_KV_F16: gather_as(t, b, EDGE_KV_F16, slots, i, d, two); break;
    case EDGE_KV_Q8: gather_as(t, b, EDGE_KV_Q8, slots, i, d, two); break;
    default: gather_as(t, b, EDGE_KV_Q4, slots, i, d, two); break;
    }
}

/* Slots that a block's queries see: each of them first .. last - 1, all together from the largest
 * first to the least last, any of them from the least first to the largest last. */
typedef struct {
    int first[QUERIES], last[QUERIES];
    int all_first, all_last, any_first, any_last;
} sight;

INLINE void gather_columns(tile *t, const block *b, const sight *s, int n, int32_t d, bool two) {
    if (s->all_first < s->all_last) { /* what each sees alone before, all together, and after */
        for (int i = 0; i < n && s->any_first < s->all_first; i++) {
            gather_alone(t, *b, s->first[i], s->all_first, i, d, two);
        }
        gather_some(t, b, s->all_first, s->all_last, 0, n, d, two);
        for (int i = 0; i < n && s->all_last < s->any_last; i++) {
            gather_alone(t, *b, s->all_last, s->last[i], i, d, two);
        }
    } else {
        for (int i = 0; i < n; i++) {
            gather_alone(t, *b, s->first[i], s->last[i], i, d, two);
        }
    }
}

INLINE void gather_values(tile *t, const block *b, const sight *s, int n) {
    const int width = ATTENTION_WIDTH > 1 ? 32 : 16;
    for (int32_t d = 0; d < b->head_dim; d += width) {
        if (b->info.bits < 16 && d % kv_value_group(b->type, b->head_dim) == 0) {
            scale_weights(t, b, d, n);
        }
        gather_columns(t, b, s, n, d, width == 32 && d + 32 <= b->head_dim);
    }
}

static inline int32_t max(int32_t x, int32_t y) { return x > y ? x : y; }

static inline int clamp(int32_t x, int32_t low, int32_t high) {
    return x < low ? low : x > high ? high : x;
}

/* All n queries over the block that starts at position `base`. */
INLINE void attend_block(tile *t, const block *b, int32_t base, bool is_sink, int n) {
    sight s = {.all_last = PAGE_POSITIONS, .any_first = PAGE_POSITIONS};
    for (int i = 0; i < n; i++) {
        s.first[i] = clamp((is_sink ? t->first_sink : t->first)[i] - base, 0, PAGE_POSITIONS);
        s.last[i] = clamp(t->last[i] - base, s.first[i], PAGE_POSITIONS);
        s.any_first = s.first[i] < s.any_first ? s.first[i] : s.any_first;
        s.any_last = s.last[i] > s.any_last ? s.last[i] : s.any_last;
        s.all_first = s.first[i] > s.all_first ? s.first[i] : s.all_first;
        s.all_last = s.last[i] < s.all_last ? s.last[i] : s.all_last;
    }
    for (int panel = s.any_first / 16 / ATTENTION_WIDTH * ATTENTION_WIDTH; 16 * panel < s.any_last;
         panel += ATTENTION_WIDTH) {
        score(t, b, panel, n);
    }
    if (b->info.based) {
        add_base(t, kv_base_of(b->keys, b->type, b->head_dim), b->head_dim, n);
    }
    for (int i = 0; i < n; i++) {
        if (s.first[i] < s.last[i]) {
            soften(t, i, s.first[i], s.last[i], b->head_dim);
        }
    }
    gather_values(t, b, &s, n);
}

/* Queries j0 .. j0 + n - 1 into the tile; query j is head j % group of row j / group. */
ONCE void begin(tile *t, const attention_args *a, int64_t j0, int n) {
    const kv_type_info type = kv_type_table[a->kv->shape.type];
    const float scale = 1.0f / sqrtf((float)a->head_dim);
    const int64_t first_head = (int64_t)a->i_kv_head * a->group;
    for (int i = 0; i < n; i++) {
        const int64_t row = (j0 + i) / a->group, head = first_head + (j0 + i) % a->group;
        const float *q = a->x + row * a->x_stride + head * a->head_dim;
        for (int32_t d = 0; d < a->head_dim; d += 16) {
            vf_store(&t->q[i][d], vf_mul(vf_load(q + d), vf_set1(scale)));
            vf_store(&t->sum[i][d], vf_zero());
        }
        if (type.based) {
            FN(turn)(t->q[i], a->head_dim);
        }
        if (type.bits < 16) {
            FN(quantize)(t->q[i], a->head_dim, (q8_place){t->codes, i, n, false});
        }
        t->most[i] = -INFINITY;
        t->total[i] = 0.0f;
        t->last[i] = a->start + (int32_t)row + 1;
        const int32_t page = kv_first_page(a->kv, (t->last[i] - 1) / PAGE_POSITIONS);
        t->first_sink[i] = a->window > 0 && t->last[i] > a->window ? t->last[i] - a->window : 0;
        t->first[i] = max(t->first_sink[i], page * PAGE_POSITIONS);
    }
}

/* What the queries saw, to where it belongs. */
ONCE void end(tile *t, const attention_args *a, int64_t j0, int n) {
    const kv_type_info type = kv_type_table[a->kv->shape.type];
    const int64_t first_head = (int64_t)a->i_kv_head * a->group;
    for (int i = 0; i < n; i++) {
        const int64_t row = (j0 + i) / a->group, head = first_head + (j0 + i) % a->group;
        float *out = a->out + row * a->out_stride + head * a->head_dim;
        for (int32_t d = 0; d < a->head_dim; d += 16) {
            vf_store(out + d, vf_div(vf_load(&t->sum[i][d]), vf_set1(t->total[i])));
        }
        if (type.based) {
            FN(turn)(out, a->head_dim);
        }
    }
}

SPECIALIZED void attend(const attention_args *a, int64_t j0, int n, int32_t type) {
    tile t;
    block b = {.type = type, .info = kv_type_table[type], .head_dim = a->head_dim};
    begin(&t, a, j0, n);
    const int32_t key_bytes = (int32_t)kv_values_at(type, a->head_dim);
    int32_t base = t.first_sink[0] / PAGE_POSITIONS * PAGE_POSITIONS;
    const int32_t gap_end = t.first[0] / PAGE_POSITIONS * PAGE_POSITIONS;
    while (base < t.last[n - 1]) {
        const bool is_sink = base < a->kv->sink_pages * PAGE_POSITIONS;
        base = is_sink ? base : max(base, gap_end); /* over what nobody sees */
        int32_t next = base + PAGE_POSITIONS;
        if (next >= a->kv->sink_pages * PAGE_POSITIONS) {
            next = max(next, gap_end);
        }
        void *const *pages = a->kv->pages;
        const uint8_t *page = pages[base / PAGE_POSITIONS];
        b.keys = page + a->kv_offset;
        b.values = b.keys + key_bytes;
        const void *after = next < t.last[n - 1] ? pages[next / PAGE_POSITIONS] : page;
        b.ahead = (uintptr_t)after - (uintptr_t)page;
        attend_block(&t, &b, base, is_sink, n);
        base = next;
    }
    end(&t, a, j0, n);
}

/* One function per type and number of queries. */
INLINE void attend_all(const attention_args *a, int64_t j, int64_t last, int32_t type) {
    for (; j + QUERIES <= last; j += QUERIES) {
        attend(a, j, QUERIES, type);
    }
    switch (last - j) {
#if QUERIES > 4
    case 7: attend(a, j, 7, type); break;
    case 6: attend(a, j, 6, type); break;
    case 5: attend(a, j, 5, type); break;
    case 4: attend(a, j, 4, type); break;
#endif
    case 3: attend(a, j, 3, type); break;
    case 2: attend(a, j, 2, type); break;
    case 1: attend(a, j, 1, type); break;
    default: break;
    }
}

void FN(attention)(const attention_args *a, int64_t row0, int64_t row1) {
    const int64_t first = row0 * a->group, last = row1 * a->group;
    switch (a->kv->shape.type) {
    case EDGE_KV_F16: attend_all(a, first, last, EDGE_KV_F16); break;
    case EDGE_KV_Q8: attend_all(a, first, last, EDGE_KV_Q8); break;
    default: attend_all(a, first, last, EDGE_KV_Q4); break;
    }
}
