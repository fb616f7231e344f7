/* The table of functions that each instruction set has. They allocate nothing, start no threads and
 * keep no state. Every table gives the same bits. */
#ifndef EDGE_KERNELS_H
#define EDGE_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "api.h"

enum { MAX_TILE = 8 };

/* A panel, or the first of two, and a tile of columns. x: for layouts that take Q8 one tile of
 * columns, else rows of float [k] with stride k. */
typedef struct {
    const void *panel;
    int64_t panel_bytes; /* from one panel to the next */
    int64_t k;
    const void *x;
    int32_t table;
    const struct grid_info *grid; /* of layouts that have one */
    float *out;                   /* column j, row r at out[j * stride + r] */
    int64_t stride;
    const float *residual; /* of the same shape, added; may be NULL */
} tile_args;

/* out = 16 rows of a weight times c columns, 1 <= c <= tile; of a pair 32 rows times a full tile.
 */
typedef void (*tile_function)(const tile_args *args);

/* A column of a tile of quantised activations. twice: the next column takes what rounding took from
 * this one. */
typedef struct {
    void *tile;
    int32_t column, columns;
    bool twice;
} q8_place;

typedef struct {
    const float *x; /* (m, [q | k | v] heads) */
    int64_t x_stride;
    float *out; /* (m, n_heads * head_dim) */
    int64_t out_stride;
    int32_t start; /* position of row 0 */
    int32_t group; /* query heads per key head */
    int32_t head_dim;
    int32_t window;     /* last positions that a query sees, 0: all */
    float scale;        /* of scores, 0: 1 / sqrt(head_dim) */
    float softcap;      /* scores become softcap * tanh(score / softcap); 0: they stay */
    const float *sinks; /* (n_heads): one more score for each head, without a value; NULL: none */
    int32_t i_kv_head;
    const edge_kv_group *kv;
    int64_t kv_offset; /* of this layer and key head in a page, see kv.h */
} attention_args;

typedef struct {
    float *x; /* (m, x_stride), the first n_heads heads are rotated in place */
    int64_t x_stride;
    const float *angles; /* (m, n_rot / 2, 2): cos, sin */
    int32_t n_rot, interleaved;
    int32_t n_heads, head_dim;
} rotate_args;

/* One position of one layer and key head. */
typedef struct {
    const edge_kv_shape *shape;
    const float *q, *k, *v; /* heads; q: those that share the key */
    int32_t group;          /* of q */
    int32_t slot;           /* position in the page */
    uint8_t *place;         /* of this layer and head in the page, see kv.h */
    const uint8_t *before;  /* the same in the page before, whole; NULL in the first */
} store_args;

/* (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias. */
typedef struct {
    const float *weight, *bias; /* NULL: none; a bias comes with a weight */
    float eps;
    bool centred; /* false: mean is 0 */
} norm_args;

/* Of XIELU, see edge/graph/ops.py. */
typedef struct {
    float alpha_p, alpha_n, beta, eps;
} xielu_args;

/* The outputs of a token's experts, and their weights. */
typedef struct {
    const float *x;         /* (columns, n) */
    const int32_t *columns; /* (n_used), of this token */
    const int32_t *experts; /* of each column */
    const float *weights;   /* (n_used) */
    int32_t n_used;
    const float *bias; /* (experts, n), added to the columns first; NULL: none */
} mix_args;

struct edge_kernels {
    const char *name;
    int32_t tile; /* columns per tile of Q8 activations and of matmuls, at most MAX_TILE */
    const tile_function (*tiles)[MAX_TILE]; /* [layout][c - 1] */
    const tile_function *pairs; /* [layout]; NULL where one panel at a time is as good */
    /* For bf16 by the CPU's own instruction, with other bits; NULL where there is none. */
    const tile_function *native_bf16;

    /* x (k) to out, which may be x. */
    void (*norm)(const float *x, const norm_args *args, int64_t k, float *out);
    /* x (k) into its place; k is a multiple of 32. */
    void (*quantize)(const float *x, int64_t k, q8_place place);
    /* norm, then quantize, without writing the floats to memory between. */
    void (*norm_quantize)(const float *x, const norm_args *args, int64_t k, q8_place place);
    /* out = activation(gate) * up, n elements; activation(gate) when up is NULL. */
    void (*gated)(const float *gate, const float *up, edge_activation activation, int64_t n,
                  float *out);
    /* out = softcap * tanh(x / softcap). */
    void (*softcap)(const float *x, float softcap, int64_t n, float *out);
    void (*xielu)(const float *x, const xielu_args *args, int64_t n, float *out);
    /* Of these three out may be x. */
    /* out = max(0, x - mean - factor * std), k elements; out is not x. */
    void (*sparsify)(const float *x, float factor, int64_t k, float *out);
    /* out = x * sqrt(mean(y^2)) / sqrt(max(mean(x^2), least)), k elements; out is not x. */
    void (*rescale)(const float *x, const float *y, float least, int64_t k, float *out);
    void (*add)(const float *x, const float *y, int64_t n, float *out);
    void (*multiply)(const float *x, const float *y, int64_t n, float *out);
    void (*scale)(const float *x, float factor, int64_t n, float *out);
    /* out[n] = sum of weight * (column + bias), in the order of the columns. */
    void (*mix)(const mix_args *args, int64_t n, float *out);
    /* Rotates heads of row i. */
    void (*rotate)(const rotate_args *args, int64_t i);
    /* Writes to the page. Positions of a page come in order. */
    void (*store)(const store_args *args);
    /* Rows row0 .. row1 - 1. */
    void (*attention)(const attention_args *args, int64_t row0, int64_t row1);
    /* Sampler. */
    void (*softmax)(const float *x, int64_t n, float *out);
    void (*log_softmax)(const float *x, int64_t n, float *out);
    /* 1 when every element is finite. */
    int32_t (*all_finite)(const float *x, int64_t n);
    /* Int8 dot products of numbers in registers, their sums to out (16); returns how many
     * multiply-adds were done. */
    int64_t (*dots)(int64_t n_rounds, int32_t *out);
};
typedef struct edge_kernels edge_kernels;

extern const edge_kernels kernels_scalar, kernels_avx2, kernels_avxvnni, kernels_avx512vnni,
    kernels_avx512vbmi, kernels_neon, kernels_dotprod, kernels_i8mm, kernels_neon32;

#endif
