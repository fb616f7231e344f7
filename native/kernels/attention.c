/* Attention over the pages of a cache, see kv.h.
 *
 * It walks the keys in blocks of PAGE_POSITIONS at fixed absolute positions with a running
 * maximum (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022). A query's arithmetic
 * depends on its own position alone: not on the tile it is in, the chunking or the threads.
 *
 * In this file:
 *   query         one head of one row (token) of x; those that share a key head go together
 *   tile          up to QUERIES queries that walk over the keys together
 *   block         what a page has of one layer and key head: 64 positions
 *   slot          a position in its page, 0..63
 *   panel         16 slots: keys lie in panels, a lane is a slot
 *   i, n          a query of the tile, how many there are
 *   d             an element of a head, 0..head_dim - 1
 *   sinks         the first pages, which every position sees whatever its window of pages
 *
 * Per block: scores of its keys (score), what all keys of the page share (add_base), exp and the
 * running maximum (soften), and the sum of the values (gather). */
#include <math.h>

#include "kernels/exp.h"
#include "kv.h"

enum { KEY_PANELS = PAGE_POSITIONS / 16 }; /* of a page */
_Static_assert(KEY_PANELS % ATTENTION_WIDTH == 0, "whole pages");
_Static_assert(QUERIES <= TILE, "the queries of a tile are columns of a matmul");

/* QUERIES queries at most, on their way over the keys. */
typedef struct {
    float softcap;                         /* of scores, 0: none */
    float q[QUERIES][MAX_HEAD_DIM];        /* scaled by 1 / sqrt(head_dim) */
    float p[QUERIES][PAGE_POSITIONS];      /* of the block: scores, then exp(score - most) */
    float scaled[QUERIES][PAGE_POSITIONS]; /* p times the scales of a group of values */
    float sum[QUERIES][MAX_HEAD_DIM]; /* of exp(score - most) * value, over all blocks so far */
    float most[QUERIES];              /* the largest score so far */
    float total[QUERIES];             /* of exp(score - most) */
    /* Positions that a query sees: first <= position < last; in the pages of sinks
     * first_sink <= position. With a window of pages first is later than first_sink, which only
     * the window of the model bounds. */
    int32_t first[QUERIES], first_sink[QUERIES], last[QUERIES];
    /* The queries as a tile of quantised activations, (head_dim / GROUP) groups of n columns, for
     * keys that are codes. */
    uint8_t codes[QUERIES * MAX_HEAD_DIM / GROUP * Q8_COLUMN_BYTES] __attribute__((aligned(64)));
} tile;

/* One layer and key head of a page. The compiler knows type and info. */
typedef struct {
    int32_t type; /* edge_kv_type */
    kv_type_info info;
    int32_t head_dim;
    const uint8_t *keys;   /* 4 panels: f16 [4][head_dim][16], or codes as in layouts.h */
    const uint8_t *values; /* f16 [64][head_dim], or groups of codes as in kv.h */
    /* Bytes to the same place of the page that comes next. That is asked for on the way: no
     * hardware prefetcher looks there. */
    uintptr_t ahead;
} block;

/* Slots first .. last - 1 of a page. */
typedef struct {
    int first, last;
} slot_range;

/* Elements d .. d + 15 of a head; of two, d .. d + 31. */
typedef struct {
    int32_t d;
    bool two;
} elements;

/* ---- scores ------------------------------------------------------------------------------ */

INLINE void prefetch_next(const block *b, const void *p) {
    __builtin_prefetch((const void *)((uintptr_t)p + b->ahead));
}

/* p = scores of n queries with the slots of `panels` panels (1 or 2) of float16 keys from the i-th
 * on. Two panels at a time let each query load serve two products. */
INLINE void score_halves(tile *t, const block *b, int i_panel, int n, int panels) {
    const int32_t head_dim = b->head_dim;
    const uint16_t *first = (const uint16_t *)b->keys + (int64_t)i_panel * head_dim * 16;
    vf sum[2][QUERIES]; /* (panels, n), of 16 slots each */
    UNROLL for (int i = 0; i < n; i++) { sum[0][i] = sum[1][i] = vf_zero(); }
    for (int32_t d = 0; d < head_dim; d += 2) { /* 2 x 16 halves: a cache line */
        prefetch_next(b, first + 16 * d);
        if (panels > 1) {
            prefetch_next(b, first + 16 * (head_dim + d));
        }
        UNROLL for (int32_t e = d; e < d + 2; e++) {
            const vf key = vf_from_half(first + 16 * e); /* element e of 16 keys */
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

/* The same of keys that are codes: a matmul whose 16 rows are slots and whose n columns are
 * queries. */
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

/* p = scores of n queries with the slots of ATTENTION_WIDTH panels from the i-th on. */
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
    float center[MAX_HEAD_DIM], direction[MAX_HEAD_DIM]; /* (head_dim) each; the mean key first */
    FN(get_base)(base, 0, head_dim, center);
    FN(get_base)(base, 1, head_dim, direction);
    for (int i = 0; i < n; i++) {
        vf with_center = vf_zero(), with_direction = vf_zero();
        for (int32_t d = 0; d < head_dim; d += 16) {
            const vf q = vf_load(&t->q[i][d]);
            with_center = vf_fma(q, vf_load(center + d), with_center);
            with_direction = vf_fma(q, vf_load(direction + d), with_direction);
        }
        /* the same for all slots; and what is to be multiplied with each slot's `missed` */
        const vf mean = vf_set1(vf_sum(with_center)), along = vf_set1(vf_sum(with_direction));
        for (int slot = 0; slot < PAGE_POSITIONS; slot += 16) {
            float *p = &t->p[i][slot];
            const vf missed = vf_fma(vf_from_half(base.missed + slot), along, mean);
            vf_store(p, vf_add(vf_load(p), missed));
        }
    }
}

/* p = softcap * tanh(p / softcap), the scores of n queries in a block. */
ONCE void cap_scores(tile *t, int n) {
    const vf cap = vf_set1(t->softcap);
    for (int i = 0; i < n; i++) {
        for (int slot = 0; slot < PAGE_POSITIONS; slot += 16) {
            float *p = &t->p[i][slot];
            vf_store(p, vf_mul(cap, vf_tanh(vf_div(vf_load(p), cap))));
        }
    }
}

/* Scores of query i in the slots of a block that it sees, to exp(score - most); other slots get 0.
 * Where `most` rises, what was summed before is multiplied with exp(old most - new most). */
ONCE void soften(tile *t, int i, int first, int last, int32_t head_dim) {
    vf s[KEY_PANELS]; /* the 64 slots: scores, then their exponentials */
    vf block_most = vf_set1(-INFINITY);
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
        float factors[16]; /* all the same */
        vf_store(factors, vf_exp(vf_set1(before - most)));
        t->total[i] = fmaf(t->total[i], factors[0], total);
        for (int32_t d = 0; d < head_dim; d += 16) {
            vf_store(&t->sum[i][d], vf_mul(vf_load(&t->sum[i][d]), vf_set1(factors[0])));
        }
    }
    t->most[i] = most;
}

/* ---- values ------------------------------------------------------------------------------ */

/* Elements d .. d + 15 of the value at a slot; of codes, without their scale. */
INLINE vf value_at(const block *b, int slot, int32_t d) {
    if (b->info.bits == 16) {
        return vf_from_half((const uint16_t *)b->values + (int64_t)slot * b->head_dim + d);
    }
    /* group: f16 scale[64] for n elements, then n / 32 times the codes of 32 elements per slot */
    const int32_t n = kv_value_group(b->type, b->head_dim);
    const uint8_t *group = b->values + d / n * kv_group_bytes(b->type, b->head_dim);
    const int64_t at = (int64_t)(d % n / GROUP * PAGE_POSITIONS + slot) * GROUP;
    const uint8_t *codes = group + 2 * PAGE_POSITIONS + at * b->info.bits / 8;
    if (b->info.bits == 8) {
        return vf_from_int(vi_from_i8(codes + d % GROUP));
    }
    /* 16 bytes: elements 0..15 in the low nibbles, 16..31 in the high ones */
    const vi code = vi_bits(vi_from_u8(codes), d % GROUP / 4, 15);
    return vf_from_int(vi_add(code, vi_set1(-8)));
}

/* sum += p * value over the slots, in their order, for queries i0 .. i0 + n - 1. */
INLINE void gather_some(tile *t, const block *b, slot_range slots, int i0, int n, elements e) {
    const float (*p)[PAGE_POSITIONS] = b->info.bits == 16 ? t->p : t->scaled;
    const int32_t d = e.d;
    const bool two = e.two;
    vf sum[2][QUERIES]; /* (16 or 32 elements, n) */
    UNROLL for (int i = 0; i < n; i++) {
        sum[0][i] = vf_load(&t->sum[i0 + i][d]);
        sum[1][i] = two ? vf_load(&t->sum[i0 + i][d + 16]) : sum[0][i];
    }
    for (int slot = slots.first; slot < slots.last; slot++) {
        const vf value = value_at(b, slot, d), next = two ? value_at(b, slot, d + 16) : value;
        if (b->info.bits == 16) {
            prefetch_next(b, (const uint16_t *)b->values + (int64_t)slot * b->head_dim + d);
        }
        UNROLL for (int i = 0; i < n; i++) {
            const vf weight = vf_set1(p[i0 + i][slot]);
            sum[0][i] = vf_fma(weight, value, sum[0][i]);
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

/* scaled = p times the scales of the group of values that begins with element d: so a code need not
 * be multiplied with its scale. */
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

/* gather_some of query i alone, type known to the compiler. */
INLINE void gather_as(tile *t, block b, int32_t type, slot_range slots, int i, elements e) {
    b.type = type;
    b.info = kv_type_table[type];
    gather_some(t, &b, slots, i, 1, e);
}

/* gather_some of query i alone, over slots that others of its tile do not see: they are at the ends
 * of what is seen, and few. The block comes as a copy: of one whose address was given away the
 * compiler would know nothing. */
ONCE void gather_alone(tile *t, block b, int first, int last, int i, elements e) {
    const slot_range slots = {first, last};
    if (first >= last) {
        return;
    }
    switch (b.type) {
    case EDGE_KV_F16: gather_as(t, b, EDGE_KV_F16, slots, i, e); break;
    case EDGE_KV_Q8: gather_as(t, b, EDGE_KV_Q8, slots, i, e); break;
    default: gather_as(t, b, EDGE_KV_Q4, slots, i, e); break;
    }
}

/* Which slots of a block the queries see. */
typedef struct {
    slot_range each[QUERIES]; /* query i sees each[i]; empty where first == last */
    slot_range all;           /* what all see: from the latest first to the earliest last */
    slot_range any;           /* what any sees: from the earliest first to the latest last */
} sight;

/* Some elements of the values of a block, for n queries: what a query sees alone at the front, what
 * all see together, what a query sees alone at the end. So each adds its slots in their order. */
INLINE void gather_columns(tile *t, const block *b, const sight *s, int n, elements e) {
    if (s->all.first < s->all.last) {
        for (int i = 0; i < n && s->any.first < s->all.first; i++) {
            gather_alone(t, *b, s->each[i].first, s->all.first, i, e);
        }
        gather_some(t, b, s->all, 0, n, e);
        for (int i = 0; i < n && s->all.last < s->any.last; i++) {
            gather_alone(t, *b, s->all.last, s->each[i].last, i, e);
        }
    } else { /* nothing together */
        for (int i = 0; i < n; i++) {
            gather_alone(t, *b, s->each[i].first, s->each[i].last, i, e);
        }
    }
}

/* sum += p * value, all elements, of what the n queries see of a block. */
INLINE void gather_values(tile *t, const block *b, const sight *s, int n) {
    const int width = ATTENTION_WIDTH > 1 ? 32 : 16;
    for (int32_t d = 0; d < b->head_dim; d += width) {
        if (b->info.bits < 16 && d % kv_value_group(b->type, b->head_dim) == 0) {
            scale_weights(t, b, d, n);
        }
        gather_columns(t, b, s, n, (elements){d, width == 32 && d + 32 <= b->head_dim});
    }
}

/* ---- blocks, one after the other --------------------------------------------------------- */

static inline int32_t max(int32_t x, int32_t y) { return x > y ? x : y; }

static inline int clamp(int32_t x, int32_t low, int32_t high) {
    return x < low ? low : x > high ? high : x;
}

/* All n queries over a block. base: the position of its slot 0. */
INLINE void attend_block(tile *t, const block *b, int32_t base, bool is_sink, int n) {
    sight s = {.all = {0, PAGE_POSITIONS}, .any = {PAGE_POSITIONS, 0}};
    for (int i = 0; i < n; i++) {
        const int first = clamp((is_sink ? t->first_sink : t->first)[i] - base, 0, PAGE_POSITIONS);
        const int last = clamp(t->last[i] - base, first, PAGE_POSITIONS);
        s.each[i] = (slot_range){first, last};
        s.any.first = first < s.any.first ? first : s.any.first;
        s.any.last = last > s.any.last ? last : s.any.last;
        s.all.first = first > s.all.first ? first : s.all.first;
        s.all.last = last < s.all.last ? last : s.all.last;
    }
    /* ATTENTION_WIDTH panels at a time, from a multiple of it on */
    for (int panel = s.any.first / 16 / ATTENTION_WIDTH * ATTENTION_WIDTH; 16 * panel < s.any.last;
         panel += ATTENTION_WIDTH) {
        score(t, b, panel, n);
    }
    if (b->info.based) {
        add_base(t, kv_base_of(b->keys, b->type, b->head_dim), b->head_dim, n);
    }
    if (t->softcap > 0.0f) {
        cap_scores(t, n);
    }
    for (int i = 0; i < n; i++) {
        if (s.each[i].first < s.each[i].last) {
            soften(t, i, s.each[i].first, s.each[i].last, b->head_dim);
        }
    }
    gather_values(t, b, &s, n);
}

/* Queries j0 .. j0 + n - 1 of the chunk into the tile. Query j is head j % group, of those that
 * share the key head, of row j / group. */
ONCE void begin(tile *t, const attention_args *a, int64_t j0, int n) {
    const kv_type_info type = kv_type_table[a->kv->shape.type];
    const float scale = a->scale > 0.0f ? a->scale : 1.0f / sqrtf((float)a->head_dim);
    const int64_t first_head = (int64_t)a->i_kv_head * a->group;
    t->softcap = a->softcap;
    for (int i = 0; i < n; i++) {
        const int64_t row = (j0 + i) / a->group, head = first_head + (j0 + i) % a->group;
        const float *q = a->x + row * a->x_stride + head * a->head_dim;
        for (int32_t d = 0; d < a->head_dim; d += 16) {
            vf_store(&t->q[i][d], vf_mul(vf_load(q + d), vf_set1(scale)));
            vf_store(&t->sum[i][d], vf_zero());
        }
        if (type.based) { /* keys are turned, so queries are */
            FN(turn)(t->q[i], a->head_dim);
        }
        if (type.bits < 16) {
            FN(quantize)(t->q[i], a->head_dim, (q8_place){t->codes, i, n, false});
        }
        /* the sink is the first score: exp(sink - sink) = 1, and there is no value to add */
        t->most[i] = a->sinks != NULL ? a->sinks[head] : -INFINITY;
        t->total[i] = a->sinks != NULL ? 1.0f : 0.0f;
        t->last[i] = a->start + (int32_t)row + 1;
        /* the first page behind the sinks that it sees, then the model's window of positions */
        const int32_t page = kv_first_page(a->kv, (t->last[i] - 1) / PAGE_POSITIONS);
        t->first_sink[i] = a->window > 0 && t->last[i] > a->window ? t->last[i] - a->window : 0;
        t->first[i] = max(t->first_sink[i], page * PAGE_POSITIONS);
    }
}

/* out = sum / total of the queries. */
ONCE void end(tile *t, const attention_args *a, int64_t j0, int n) {
    const kv_type_info type = kv_type_table[a->kv->shape.type];
    const int64_t first_head = (int64_t)a->i_kv_head * a->group;
    for (int i = 0; i < n; i++) {
        const int64_t row = (j0 + i) / a->group, head = first_head + (j0 + i) % a->group;
        float *out = a->out + row * a->out_stride + head * a->head_dim;
        for (int32_t d = 0; d < a->head_dim; d += 16) {
            vf_store(out + d, vf_div(vf_load(&t->sum[i][d]), vf_set1(t->total[i])));
        }
        if (type.based) { /* values were turned: this turns them back */
            FN(turn)(out, a->head_dim);
        }
    }
}

/* A tile of n queries from j0 on over all blocks that one of them sees, in order of positions: the
 * pages of sinks, then those from gap_end on. The first query sees the earliest positions, the last
 * the latest. */
SPECIALIZED void attend(const attention_args *a, int64_t j0, int n, int32_t type) {
    tile t;
    block b = {.type = type, .info = kv_type_table[type], .head_dim = a->head_dim};
    begin(&t, a, j0, n);
    const int32_t key_bytes = (int32_t)kv_values_at(type, a->head_dim);
    int32_t base = t.first_sink[0] / PAGE_POSITIONS * PAGE_POSITIONS;
    const int32_t gap_end = t.first[0] / PAGE_POSITIONS * PAGE_POSITIONS;
    while (base < t.last[n - 1]) {
        const bool is_sink = base < a->kv->sink_pages * PAGE_POSITIONS;
        base = is_sink ? base : max(base, gap_end); /* pages between are seen by nobody */
        int32_t next = base + PAGE_POSITIONS;       /* the block after this one */
        if (next >= a->kv->sink_pages * PAGE_POSITIONS) {
            next = max(next, gap_end);
        }
        void *const *pages = a->kv->pages;
        const uint8_t *page = pages[base / PAGE_POSITIONS];
        b.keys = page + a->kv_offset;
        b.values = b.keys + key_bytes;
        /* behind the last block nothing is to be asked for: ahead is 0 */
        const void *after = next < t.last[n - 1] ? pages[next / PAGE_POSITIONS] : page;
        b.ahead = (uintptr_t)after - (uintptr_t)page;
        attend_block(&t, &b, base, is_sink, n);
        base = next;
    }
    end(&t, a, j0, n);
}

/* Queries j .. last - 1, in tiles of QUERIES and one of the rest; a function for each size. */
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
