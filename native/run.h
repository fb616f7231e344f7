/* What the files of a run share: its state, the places of rows and columns in buffers, and the ops
 * on the pairs of a token and one of its experts. */
#ifndef EDGE_RUN_H
#define EDGE_RUN_H

#include "kv.h"
#include "layouts.h"
#include "plan.h"

/* How many rows a chunk of an op over rows takes. */
enum { ROWS_PER_CHUNK = 8 };

/* The state of one edge_run. */
typedef struct {
    const edge_plan *plan;
    const edge_kv *kv;
    const edge_step *step;
    int32_t n_threads;
    int32_t n_ops;   /* how many first ops of the plan run */
    int64_t last_ns; /* when the current op began */
} run;

/* ---- places in buffers ------------------------------------------------------------------- */

/* Where buffer i begins. */
static inline void *buffer_data(const run *r, int32_t i) {
    const edge_buffer *b = &r->plan->buffers[i];
    return b->kind == EDGE_BUFFER_LOGITS ? (void *)r->step->logits
                                         : (uint8_t *)r->plan->spec.arena + b->offset;
}

/* Row `row` of a buffer of floats. */
static inline float *row_of(const run *r, int32_t i, int64_t row) {
    return (float *)buffer_data(r, i) + row * r->plan->buffers[i].dim;
}

/* How many rows an op has: one per token, or per token whose logits are wanted. */
static inline int64_t rows_of(const run *r, const edge_op *op) {
    return r->plan->buffers[op->out].is_logit_rows ? r->step->n_logits : r->step->n_tokens;
}

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A tile of columns of a buffer. */
typedef struct {
    void *data;
    int32_t columns; /* 1..kernels->tile */
} column_tile;

/* Column tile `t` of a buffer of `rows` rows; only the last one may be narrower than the others. */
static inline column_tile tile_of(const run *r, int32_t buffer, int64_t t, int64_t rows) {
    const int32_t width = r->plan->kernels->tile;
    const edge_buffer *b = &r->plan->buffers[buffer];
    const int64_t left = buffer_columns(b->kind, rows) - t * width;
    const int64_t column_bytes = b->kind == EDGE_BUFFER_F32
                                     ? (int64_t)b->dim * 4
                                     : (int64_t)b->dim / GROUP * Q8_COLUMN_BYTES;
    return (column_tile){(uint8_t *)buffer_data(r, buffer) + t * width * column_bytes,
                         (int32_t)(left < width ? left : width)};
}

/* Column tiles of the input of an op. */
static inline int64_t tile_count(const run *r, const edge_op *op) {
    const int64_t columns = buffer_columns(r->plan->buffers[op->in].kind, rows_of(r, op));
    return divide_up(columns, r->plan->kernels->tile);
}

/* The place of a row's first column in a quantised buffer. */
static inline q8_place place_of(const run *r, int32_t buffer, int64_t row, int64_t rows) {
    const int32_t width = r->plan->kernels->tile;
    const int32_t kind = r->plan->buffers[buffer].kind;
    const int64_t column = buffer_columns(kind, row);
    const column_tile tile = tile_of(r, buffer, column / width, rows);
    return (q8_place){.tile = tile.data,
                      .column = (int32_t)(column % width),
                      .columns = tile.columns,
                      .twice = kind == EDGE_BUFFER_Q8X2};
}

/* ---- panels ------------------------------------------------------------------------------ */

/* Where the rows of a panel go, in a tile of columns. */
typedef struct {
    float *out; /* column j, row r at out[j * stride + r] */
    int64_t stride;
    const float *residual; /* of the same shape; NULL: none */
} tile_target;

/* `panels` panels from i_panel on, 1 or 2, times a tile of columns. */
void run_tile(const edge_plan *plan, const edge_weight *w, int64_t i_panel, int panels,
              column_tile x, tile_target to);

/* How many panels to run at once, from panel i of a weight on: 1 or 2 of the `left` ones. */
int panels_at_once(const edge_plan *plan, const edge_weight *w, int64_t i, int64_t left,
                   int32_t columns);

/* ---- experts.c --------------------------------------------------------------------------- */

/* The experts of a token, the highest score first, equal scores by index, and their weights. NaN is
 * the lowest score; with any NaN among the scores all weights are NaN, so that the run fails. */
void run_route(const run *r, const edge_op *op, int64_t row);

/* The weighted sum of a token's columns. */
void run_expert_sum(const run *r, const edge_op *op, int64_t row);

/* Chunks of an op on pairs. Pairs that another op ordered can only be there after a cancelled run:
 * nothing is done with them. */
uint32_t expert_chunks(const run *r, const edge_op *op, int64_t rows);

/* A chunk of EXPERT_MATMUL: some panels of an expert, for all its columns. */
void run_expert_matmul(const run *r, const edge_op *op, uint32_t chunk);

/* A chunk of EXPERT_COLUMNS, EXPERT_GAIN or EXPERT_GATED. */
void run_expert_pairs(const run *r, const edge_op *op, uint32_t chunk);

#endif
