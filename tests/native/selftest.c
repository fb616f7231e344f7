/* Every table of kernels against scalar, bit for bit, with no Python and no shared library, so that
 * it runs on any board and under any emulator.
 *
 *   selftest              every table that this CPU can run: a line each; 1 and the first
 *                         difference when there is one
 *   selftest --usable     the names of these, the one that is used by default last
 *   selftest --force ISA  this one, even where the CPU lacks it
 *
 * Before each, the disk formats: what they store they read.
 *
 * Data are random, the same in every run. Arrays end at a page that nobody may touch, and outputs
 * have a margin that must stay as it is. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cpu.h"
#include "formats/formats.h"
#include "kernels/kernels.h"
#include "kv.h"
#include "tables.h"

#define SIZE(array) ((int)(sizeof(array) / sizeof *(array)))

enum { MAX_K = 512, MARGIN = 16, MAX_ROWS = 160, MAX_GROUP = 4 };

static const edge_kernels *const plain = &kernels_scalar, *tested;
static long n_cases;

/* ---- memory ------------------------------------------------------------------------------ */

/* Places for arrays, each before a page that may not be touched. */
enum { PANEL, X, WEIGHT, RESIDUAL, TILE_GOT, TILE_WANT, GOT, WANT, PAGES, N_PLACES = PAGES + 8 };
enum { PLACE_BYTES = 1 << 20 };
static uint8_t *places[N_PLACES];

static void map_places(void) {
    const size_t guard = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < N_PLACES; i++) {
        uint8_t *p = mmap(NULL, PLACE_BYTES + guard, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(p + PLACE_BYTES, guard, PROT_NONE) != 0) {
            perror("selftest: no guarded memory");
            exit(2);
        }
        places[i] = p;
    }
}

/* n_bytes at the end of a place, or as near as the alignment lets it. */
static void *array(int place, int64_t n_bytes, int64_t align) {
    if (n_bytes > PLACE_BYTES) {
        fprintf(stderr, "selftest: %lld bytes do not fit\n", (long long)n_bytes);
        exit(2);
    }
    return places[place] + (PLACE_BYTES - n_bytes) / align * align;
}

/* ---- data -------------------------------------------------------------------------------- */

static uint64_t seed;

static uint32_t random_bits(void) { /* splitmix64 */
    uint64_t z = seed += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (uint32_t)(z >> 32);
}

static int below(int n) { return (int)(random_bits() % (uint32_t)n); }

/* What numbers are like. HALVES: codes that lie in the middle between two. EDGES: codes and
 * integers at their limits. */
typedef enum { USUAL, TINY, DENORMAL, LARGE, HALVES, EDGES, N_KINDS } data_kind;
static const char *const kind_names[N_KINDS] = {"usual", "tiny",   "denormal",
                                                "large", "halves", "edges"};

static float random_float(data_kind kind) {
    static const float sizes[N_KINDS] = {1.0f, 0x1p-101f, 1e-39f, 1e30f, 1.0f, 1.0f};
    if (kind == EDGES) {
        return random_bits() % 2 ? 1.0f : -1.0f;
    }
    if (kind == HALVES) {
        return below(8) == 0 ? 127.0f : (float)(below(252) - 126) + 0.5f;
    }
    const float x = (float)((int32_t)random_bits() >> 8) * 0x1p-22f; /* -2 .. 2 */
    return x * x * x * sizes[kind];
}

static float *random_floats(int place, int64_t n, data_kind kind) {
    float *p = array(place, 4 * n, 4);
    for (int64_t i = 0; i < n; i++) {
        p[i] = random_float(kind);
    }
    return p;
}

/* A finite float16. */
static uint16_t random_half(data_kind kind) {
    const uint32_t bits = random_bits(), sign = bits & 0x8000, mantissa = bits & 0x3ff;
    switch (kind) {
    case TINY: return (uint16_t)(sign | (mantissa & 3));
    case DENORMAL: return (uint16_t)(sign | mantissa);
    case LARGE: return (uint16_t)(sign | 0x7800 | mantissa);
    default: return (uint16_t)(sign | (8 + bits / 65536 % 10) << 10 | mantissa);
    }
}

/* A bfloat16 below 2^125. */
static uint16_t random_bfloat(data_kind kind) {
    static const int exponents[N_KINDS] = {120, 20, 0, 240, 120, 127};
    const uint32_t bits = random_bits();
    return (uint16_t)((bits & 0x807f) | (uint32_t)(exponents[kind] + (kind == USUAL) * below(12))
                                            << 7);
}

/* ---- verdicts ---------------------------------------------------------------------------- */

static char what[160]; /* is being compared */

__attribute__((format(printf, 1, 2))) static void begin(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    for (const char *c = what; *c != '\0'; c++) {
        seed = seed * 31 + (uint8_t)*c;
    }
    n_cases++;
}

static void differ(int64_t i, uint32_t got, uint32_t want) {
    printf("%s: %s: element %lld is %08x, scalar's %08x\n", tested->name, what, (long long)i, got,
           want);
    exit(1);
}

/* Any NaN for NaN. */
static void same_floats(const float *got, const float *want, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t a, b;
        memcpy(&a, got + i, 4);
        memcpy(&b, want + i, 4);
        if (a != b && !(got[i] != got[i] && want[i] != want[i])) {
            differ(i, a, b);
        }
    }
}

static void same_bytes(const void *got, const void *want, int64_t n) {
    const uint8_t *a = got, *b = want;
    for (int64_t i = 0; i < n; i++) {
        if (a[i] != b[i]) {
            differ(i, a[i], b[i]);
        }
    }
}

/* n floats for results, a margin before them; both outputs begin as the same numbers. */
static float *output(int place, int64_t n) {
    float *p = array(place, 4 * (MARGIN + n), 4);
    for (int64_t i = 0; i < MARGIN + n; i++) {
        p[i] = (float)(1000 + i);
    }
    return p + MARGIN;
}

static void same_outputs(const float *got, const float *want, int64_t n) {
    same_floats(got - MARGIN, want - MARGIN, MARGIN + n);
}

/* ---- quantised activations --------------------------------------------------------------- */

/* The columns of x (columns, k) as a tile of a table. */
static void *quantized(const edge_kernels *kernels, int place, const float *x, int64_t k,
                       int columns) {
    void *tile = array(place, k / GROUP * Q8_COLUMN_BYTES * columns, 16);
    for (int j = 0; j < columns; j++) {
        kernels->quantize(x + j * k, k, (q8_place){tile, j, columns, false});
    }
    return tile;
}

static void test_quantize(void) {
    static const int widths[] = {32, 96, 320};
    for (int i = 0; i < SIZE(widths); i++) {
        for (int columns = 1; columns <= tested->tile; columns++) {
            for (int kind = 0; kind < N_KINDS; kind++) {
                const int64_t k = widths[i], bytes = k / GROUP * Q8_COLUMN_BYTES * columns;
                const bool twice = columns % 2 == 0, normed = random_bits() % 2;
                begin("quantize, k %d, %d columns, %s", widths[i], columns, kind_names[kind]);
                const float *x = random_floats(X, k * columns, kind);
                const float *weight = random_floats(WEIGHT, k, USUAL);
                uint8_t *got = array(TILE_GOT, bytes, 16), *want = array(TILE_WANT, bytes, 16);
                for (int j = 0; j < columns; j += 1 + twice) {
                    const q8_place to = {got, j, columns, twice},
                                   plain_to = {want, j, columns, twice};
                    if (normed) {
                        const norm_args norm = {weight, columns > 2 ? x : NULL, 1e-5f, columns > 1};
                        tested->norm_quantize(x + j * k, &norm, k, to);
                        plain->norm_quantize(x + j * k, &norm, k, plain_to);
                    } else {
                        tested->quantize(x + j * k, k, to);
                        plain->quantize(x + j * k, k, plain_to);
                    }
                }
                same_bytes(got, want, bytes);
            }
        }
    }
}

/* ---- matmuls ----------------------------------------------------------------------------- */

/* A panel of random codes, and of scales of a kind. */
static void fill_panel(uint8_t *panel, int32_t layout, int64_t k, data_kind kind) {
    const layout_info *l = &layout_table[layout];
    const int64_t bytes = panel_bytes(layout, k), n_blocks = (k + l->block - 1) / l->block;
    if (l->kind == SCALE_NONE) {
        for (int64_t i = 0; i < PANEL_ROWS * k; i++) {
            const float x = random_float(kind);
            const uint16_t half = l->bits == 16 && layout == EDGE_LAYOUT_F16 ? random_half(kind)
                                                                             : random_bfloat(kind);
            memcpy(panel + i * l->bits / 8, l->bits == 32 ? (const void *)&x : &half,
                   (size_t)l->bits / 8);
        }
        return;
    }
    for (int64_t i = 0; i < bytes; i++) {
        panel[i] = kind == EDGES ? (random_bits() % 2 ? 0xff : 0x00) : (uint8_t)random_bits();
    }
    const bool groups = l->kind == SCALE_H || l->kind == SCALE_E;
    uint8_t *at = panel + (groups ? front_bytes(l, n_blocks) : 0);
    for (int64_t b = 0; b < n_blocks; b++, at += groups ? block_bytes(l) : l->front_bytes) {
        for (int i = 0; i < (groups ? l->header_bytes : l->front_bytes) / 2; i++) {
            const uint16_t scale = l->kind == SCALE_E ? random_bfloat(kind) : random_half(kind);
            memcpy(at + 2 * i, &scale, 2);
        }
    }
}

/* The same columns by a table's tile, and by scalar one by one. `panels` 2: of a pair. */
static void compare_tile(int32_t layout, int32_t table, int64_t k, int panels, int columns,
                         data_kind kind) {
    begin("%s with table %d, k %d, %d columns of %d panels, %s", layout_table[layout].name, table,
          (int)k, columns, panels, kind_names[kind]);
    const int64_t bytes = panel_bytes(layout, k), stride = PANEL_ROWS * panels + below(4);
    uint8_t *panel = array(PANEL, panels * bytes, layout_table[layout].block == 1 ? 32 : 64);
    for (int p = 0; p < panels; p++) {
        fill_panel(panel + p * bytes, layout, k, kind);
    }
    const float *x = random_floats(X, columns * k, kind == EDGES ? EDGES : below(EDGES));
    const int64_t n = (columns - 1) * stride + PANEL_ROWS * panels;
    float *got = output(GOT, n), *want = output(WANT, n);
    const float *residual = random_bits() % 2 ? random_floats(RESIDUAL, n, USUAL) : NULL;
    const tile_args args = {.panel = panel,
                            .panel_bytes = bytes,
                            .k = k,
                            .x = takes_q8(layout) ? quantized(tested, TILE_GOT, x, k, columns) : x,
                            .table = table,
                            .grid = grid_of(layout),
                            .out = got,
                            .stride = stride,
                            .residual = residual};
    (panels == 2 ? tested->pairs[layout] : tested->tiles[layout][columns - 1])(&args);
    for (int i = 0; i < columns * panels; i++) {
        const int j = i / panels, p = i % panels;
        const int64_t at = j * stride + p * PANEL_ROWS;
        tile_args one = args;
        one.panel = panel + p * bytes;
        one.x = takes_q8(layout) ? quantized(plain, TILE_WANT, x + j * k, k, 1)
                                 : (const void *)(x + j * k);
        one.out = want + at;
        one.residual = residual == NULL ? NULL : residual + at;
        plain->tiles[layout][0](&one);
    }
    same_outputs(got, want, n);
}

static void test_layout(int32_t layout, int32_t table) {
    static const int of_floats[] = {1, 2, 15, 33, 64}, of_groups[] = {32, 64, 96, 288},
                     of_supers[] = {256, 512};
    const layout_info *l = &layout_table[layout];
    const bool supers = l->front_bytes > 0; /* the others may have a block that is not full */
    const int *widths = l->block == 1 ? of_floats : supers ? of_supers : of_groups;
    const int n = l->block == 1 ? SIZE(of_floats) : supers ? SIZE(of_supers) : SIZE(of_groups);
    for (int i = 0; i < n; i++) {
        for (int columns = 1; columns <= tested->tile; columns++) {
            for (int kind = 0; kind < N_KINDS; kind++) {
                compare_tile(layout, table, widths[i], 1, columns, kind);
            }
        }
        for (int kind = 0; kind < N_KINDS && tested->pairs[layout] != NULL; kind++) {
            compare_tile(layout, table, widths[i], 2, tested->tile, kind);
        }
    }
}

static void test_matmuls(void) {
    for (int32_t layout = 0; layout < EDGE_N_LAYOUTS; layout++) {
        for (int32_t table = 0; table < EDGE_N_TABLES; table++) {
            if (layout_table[layout].tables >> table & 1) {
                test_layout(layout, table);
            }
        }
    }
}

/* ---- vectors ----------------------------------------------------------------------------- */

static void test_vectors(void) {
    static const int sizes[] = {1, 7, 16, 31, 33, 160};
    for (int i = 0; i < SIZE(sizes) * N_KINDS; i++) {
        const int64_t n = sizes[i / N_KINDS];
        const data_kind kind = i % N_KINDS;
        begin("vectors of %d, %s", (int)n, kind_names[kind]);
        const float *x = random_floats(X, n, kind), *y = random_floats(WEIGHT, n, USUAL);
        float *got = output(GOT, n), *want = output(WANT, n);
#define COMPARE(call)                                                                              \
    do {                                                                                           \
        begin(#call " of %d, %s", (int)n, kind_names[kind]);                                       \
        const edge_kernels *t = tested;                                                            \
        float *out = got;                                                                          \
        t->call;                                                                                   \
        t = plain, out = want;                                                                     \
        t->call;                                                                                   \
        same_outputs(got, want, n);                                                                \
    } while (0)
        for (int j = 0; j < 6; j++) { /* weight, bias, mean or not */
            const norm_args args = {j < 4 ? y : NULL, j < 2 ? x : NULL, 1e-5f, j % 2 == 1};
            COMPARE(norm(x, &args, n, out));
            memcpy(got, x, (size_t)n * 4);
            memcpy(want, x, (size_t)n * 4);
            COMPARE(norm(out, &args, n, out));
        }
        for (edge_activation activation = 0; activation < EDGE_N_ACTIVATIONS; activation++) {
            COMPARE(gated(x, y, activation, n, out));
            COMPARE(gated(y, x, activation, n, out));
            COMPARE(gated(x, NULL, activation, n, out));
        }
        const xielu_args xielu = {0.8f, 0.7f, 0.5f, -1e-6f};
        COMPARE(xielu(x, &xielu, n, out));
        COMPARE(softcap(x, 30.0f, n, out));
        COMPARE(softcap(x, 1e-3f, n, out));
        COMPARE(add(x, y, n, out));
        COMPARE(multiply(x, y, n, out));
        COMPARE(scale(x, 0.3f, n, out));
        COMPARE(softmax(x, n, out));
        COMPARE(log_softmax(x, n, out));
#undef COMPARE
    }
}

static void test_mix(void) {
    enum { N_EXPERTS = 4, N_USED = 3, N_COLUMNS = 6 };
    static const int sizes[] = {1, 15, 16, 33, 160};
    static const int32_t columns[N_USED] = {4, 0, 2}, experts[N_COLUMNS] = {0, 0, 1, 1, 3, 3};
    for (int i = 0; i < SIZE(sizes) * N_KINDS; i++) {
        const int64_t n = sizes[i / N_KINDS];
        const data_kind kind = i % N_KINDS;
        begin("mix of %d, %s", (int)n, kind_names[kind]);
        const mix_args args = {.x = random_floats(X, N_COLUMNS * n, kind),
                               .columns = columns,
                               .experts = experts,
                               .weights = random_floats(WEIGHT, N_USED, USUAL),
                               .n_used = N_USED,
                               .bias = i % 2 ? random_floats(RESIDUAL, N_EXPERTS * n, kind) : NULL};
        float *got = output(GOT, n), *want = output(WANT, n);
        tested->mix(&args, n, got);
        plain->mix(&args, n, want);
        same_outputs(got, want, n);
    }
}

static void test_finite(void) {
    static const float others[] = {NAN, INFINITY, -INFINITY};
    for (int n = 1; n < 40; n++) {
        begin("all_finite of %d", n);
        float *x = random_floats(X, n, LARGE);
        const int32_t finite = tested->all_finite(x, n);
        x[below(n)] = others[n % 3];
        const int32_t not_finite = tested->all_finite(x, n);
        if (!finite || not_finite) {
            differ(0, (uint32_t)finite, (uint32_t)not_finite);
        }
    }
}

static void test_rotate(void) {
    static const int shapes[][3] = {{16, 16, 0}, {32, 20, 1}, {80, 80, 1}, {128, 96, 0}};
    for (int i = 0; i < SIZE(shapes); i++) {
        const int head_dim = shapes[i][0], n_rot = shapes[i][1], rows = 3, heads = 2;
        begin("rotate %d of %d", n_rot, head_dim);
        const int64_t stride = (int64_t)heads * head_dim + 3, n = rows * stride;
        const float *angles = random_floats(WEIGHT, (int64_t)rows * n_rot, USUAL);
        float *got = output(GOT, n), *want = output(WANT, n);
        rotate_args args = {got, stride, angles, n_rot, shapes[i][2], heads, head_dim};
        tested->rotate(&args, 1);
        args.x = want;
        plain->rotate(&args, 1);
        same_outputs(got, want, n);
    }
}

/* ---- the KV cache ------------------------------------------------------------------------ */

typedef struct {
    int32_t type, head_dim, group;
    int32_t n;                        /* positions */
    int32_t window;                   /* of attention */
    int32_t sink_pages, window_pages; /* of the cache */
} cache_case;

/* Positions 0 .. n - 1 of the second of two key heads; pages: n / 64 + 1 from this place on. */
static void store_all(const edge_kernels *kernels, const cache_case *c, int place,
                      const float *heads, void **pages) {
    const edge_kv_shape shape = {c->type, 1, 2, c->head_dim};
    const int64_t head_bytes = kv_head_bytes(c->type, c->head_dim);
    const int64_t row = (int64_t)(c->group + 2) * c->head_dim;
    for (int32_t i = 0; i < c->n; i++) {
        const int32_t page = i / PAGE_POSITIONS;
        if (i % PAGE_POSITIONS == 0) {
            pages[page] = array(place + page, 2 * head_bytes, 64);
            memset(pages[page], 0, (size_t)(2 * head_bytes));
        }
        const float *q = heads + i * row, *k = q + c->group * c->head_dim;
        const store_args args = {.shape = &shape,
                                 .q = q,
                                 .k = k,
                                 .v = k + c->head_dim,
                                 .group = c->group,
                                 .slot = i % PAGE_POSITIONS,
                                 .place = (uint8_t *)pages[page] + head_bytes,
                                 .before = page > 0 ? (const uint8_t *)pages[page - 1] + head_bytes
                                                    : NULL};
        kernels->store(&args);
    }
}

/* Attends from the last rows. extras: with sinks and a cap of the scores. */
static void attend_as_scalar(const cache_case *c, const edge_kv_group *cache, int32_t rows,
                             data_kind kind, bool extras) {
    begin("%s attention, head_dim %d, %d queries a key, %d rows of %d, window %d, %s%s",
          kv_type_table[c->type].name, (int)c->head_dim, (int)c->group, (int)rows, (int)c->n,
          (int)c->window, kind_names[kind], extras ? ", sinks and a cap" : "");
    const int64_t stride = (int64_t)2 * c->group * c->head_dim, n = rows * stride;
    attention_args args = {.x = random_floats(RESIDUAL, n, kind),
                           .x_stride = stride,
                           .out = output(GOT, n),
                           .out_stride = stride,
                           .start = c->n - rows,
                           .group = c->group,
                           .head_dim = c->head_dim,
                           .window = c->window,
                           .softcap = extras ? 3.0f : 0.0f,
                           .sinks = extras ? random_floats(WEIGHT, 2 * c->group, USUAL) : NULL,
                           .i_kv_head = 1,
                           .kv = cache,
                           .kv_offset = kv_head_bytes(c->type, c->head_dim)};
    float *got = args.out, *want = output(WANT, n);
    tested->attention(&args, 0, rows);
    args.out = want;
    plain->attention(&args, 0, rows);
    same_outputs(got, want, n);
}

/* Stores, and attends from the last rows, 1 to 9 of them. */
static void test_cache(const cache_case *c, data_kind kind) {
    begin("%s store, head_dim %d, %s", kv_type_table[c->type].name, (int)c->head_dim,
          kind_names[kind]);
    const int64_t row = (int64_t)(c->group + 2) * c->head_dim;
    const float *heads = random_floats(X, c->n * row, kind);
    void *got_pages[4], *want_pages[4];
    store_all(tested, c, PAGES, heads, got_pages);
    store_all(plain, c, PAGES + 4, heads, want_pages);
    for (int32_t i = 0; i <= (c->n - 1) / PAGE_POSITIONS; i++) {
        same_bytes(got_pages[i], want_pages[i], 2 * kv_head_bytes(c->type, c->head_dim));
    }
    const edge_kv_group cache = {{c->type, 1, 2, c->head_dim},
                                 (c->n - 1) / PAGE_POSITIONS + 1,
                                 c->sink_pages,
                                 c->window_pages,
                                 got_pages};
    for (int32_t rows = 1; rows <= 9 && rows <= c->n; rows += rows < 3 ? 1 : 3) {
        attend_as_scalar(c, &cache, rows, kind, false);
        attend_as_scalar(c, &cache, rows, kind, true);
    }
}

static void test_caches(void) {
    static const cache_case cases[] = {
        {EDGE_KV_F16, 16, 1, 1, 0, 0, 0},     {EDGE_KV_F16, 80, 3, 70, 0, 0, 0},
        {EDGE_KV_F16, 128, 2, 131, 20, 0, 0}, {EDGE_KV_F16, 32, 4, 200, 0, 1, 2},
        {EDGE_KV_Q8, 32, 1, 17, 0, 0, 0},     {EDGE_KV_Q8, 96, 3, 131, 70, 0, 0},
        {EDGE_KV_Q8, 64, 4, 200, 0, 1, 2},    {EDGE_KV_Q4, 32, 1, 17, 0, 0, 0},
        {EDGE_KV_Q4, 96, 3, 131, 0, 0, 0},    {EDGE_KV_Q4, 128, 2, 70, 20, 0, 0},
        {EDGE_KV_Q4, 64, 4, 200, 0, 1, 2},    {EDGE_KV_F16, 512, 2, 70, 0, 0, 0},
        {EDGE_KV_Q8, 512, 2, 70, 0, 0, 0},    {EDGE_KV_Q4, 512, 2, 70, 0, 0, 0},
    };
    for (int i = 0; i < SIZE(cases); i++) {
        test_cache(&cases[i], USUAL);
        test_cache(&cases[i], HALVES);
        if (cases[i].n < 100) {
            test_cache(&cases[i], TINY);
            test_cache(&cases[i], LARGE);
        }
    }
}

/* ---- disk formats ------------------------------------------------------------------------ */

/* What is stored of a decoded block is decoded as the same. */
static void test_stores(const format_info *formats) {
    for (const format_info *f = formats; f->block != 0; f++) {
        for (int i = 0; i < 1000; i++) {
            begin("store of type %d", (int)f->type);
            uint8_t *disk = array(GOT, f->block_bytes, 1), *again = array(WANT, f->block_bytes, 1);
            for (int j = 0; j < f->block_bytes; j++) {
                disk[j] = (uint8_t)random_bits();
            }
            decoded_block block = {0}, block_again = {0};
            decoded_grid grid = {0}, grid_again = {0};
            if (f->store != NULL) {
                f->decode(disk, &block);
                f->store(&block, again);
                f->decode(again, &block_again);
                same_bytes(&block_again, &block, sizeof block);
            } else if (f->store_grid != NULL) {
                f->decode_grid(disk, &grid);
                f->store_grid(&grid, again);
                f->decode_grid(again, &grid_again);
                same_bytes(&grid_again, &grid, sizeof grid);
            }
        }
    }
}

static void test_formats(void) {
    tested = plain;
    test_stores(formats_legacy);
    test_stores(formats_k);
    test_stores(formats_iq);
    test_stores(formats_ternary);
}

/* ---- the program ------------------------------------------------------------------------- */

static void test_table(const edge_kernels *kernels) {
    tested = kernels;
    n_cases = 0;
    test_matmuls();
    test_quantize();
    test_vectors();
    test_mix();
    test_finite();
    test_rotate();
    test_caches();
    printf("%s: %ld cases equal scalar\n", kernels->name, n_cases);
    fflush(stdout);
}

int main(int n_args, char **args) {
    const bool usable = n_args == 2 && strcmp(args[1], "--usable") == 0;
    const char *forced = n_args == 3 && strcmp(args[1], "--force") == 0 ? args[2] : NULL;
    if (n_args > 1 && !usable && forced == NULL) {
        fprintf(stderr, "usage: selftest [--usable | --force ISA]\n");
        return 2;
    }
    map_places();
    cpu_float_mode();
    bool found = false;
    for (int32_t i = 0; cpu_kernels(i) != NULL; i++) {
        const char *name = cpu_kernels(i)->name;
        if (forced != NULL ? strcmp(name, forced) != 0 : !cpu_usable(i)) {
            continue;
        }
        found = true;
        if (usable) {
            puts(name);
        } else {
            test_formats();
            test_table(cpu_kernels(i));
        }
    }
    if (!found) {
        fprintf(stderr, "selftest: there is no %s\n", forced);
    }
    return found ? 0 : 2;
}
