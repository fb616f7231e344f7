/* One step of a plan.
 *
 * Each op is split into chunks over rows, panels or heads; threads.c hands them out. What a
 * chunk computes does not depend on the number of chunks or threads. */
#include <math.h>
#include <string.h>

#include "clock.h"
#include "error.h"
#include "kv.h"
#include "layouts.h"
#include "numbers.h"
#include "plan.h"
#include "threads.h"

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
static void *buffer_data(const run *r, int32_t i) {
    const edge_buffer *b = &r->plan->buffers[i];
    return b->kind == EDGE_BUFFER_LOGITS ? (void *)r->step->logits
                                         : (uint8_t *)r->plan->spec.arena + b->offset;
}

/* Row `row` of a buffer of floats. */
static float *row_of(const run *r, int32_t i, int64_t row) {
    return (float *)buffer_data(r, i) + row * r->plan->buffers[i].dim;
}

/* How many rows an op has: one per token, or per token whose logits are wanted. */
static int64_t rows_of(const run *r, const edge_op *op) {
    return r->plan->buffers[op->out].is_logit_rows ? r->step->n_logits : r->step->n_tokens;
}

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A tile of columns of a buffer. */
typedef struct {
    void *data;
    int32_t columns; /* 1..kernels->tile */
} column_tile;

/* Column tile `t` of a buffer of `rows` rows; only the last one may be narrower than the others. */
static column_tile tile_of(const run *r, int32_t buffer, int64_t t, int64_t rows) {
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
static int64_t tile_count(const run *r, const edge_op *op) {
    const int64_t columns = buffer_columns(r->plan->buffers[op->in].kind, rows_of(r, op));
    return divide_up(columns, r->plan->kernels->tile);
}

/* The place of a row's first column in a quantised buffer. */
static q8_place place_of(const run *r, int32_t buffer, int64_t row, int64_t rows) {
    const int32_t width = r->plan->kernels->tile;
    const int32_t kind = r->plan->buffers[buffer].kind;
    const int64_t column = buffer_columns(kind, row);
    const column_tile tile = tile_of(r, buffer, column / width, rows);
    return (q8_place){.tile = tile.data,
                      .column = (int32_t)(column % width),
                      .columns = tile.columns,
                      .twice = kind == EDGE_BUFFER_Q8X2};
}

/* ---- ops over rows ----------------------------------------------------------------------- */

enum { ROWS_PER_CHUNK = 8 };

/* The least that the weights of experts are divided by. */
static const float LEAST_SUM = 1e-12f;

/* out: (n_rot / 2, 2), cos and sin of the row's position. */
static void run_angles(const run *r, const edge_op *op, int64_t row) {
    const double *frequencies = r->plan->frequencies[op - r->plan->ops];
    float *out = row_of(r, op->out, row);
    const double position = (double)(r->step->start + row);
    for (int32_t i = 0; i < op->n_rot / 2; i++) {
        double sine, cosine;
        number_sincos(position * frequencies[i], &sine, &cosine);
        out[2 * i] = (float)cosine * op->magnitude;
        out[2 * i + 1] = (float)sine * op->magnitude;
    }
}

/* The elements of weight i of an op; NULL: there is none. */
static const float *vector_of(const run *r, const edge_op *op, int i) {
    return op->w[i] >= 0 ? r->plan->weights[op->w[i]].data : NULL;
}

/* Row `row` of `rows`; quantised if the output buffer is. */
static void run_norm(const run *r, const edge_op *op, int64_t row, int64_t rows) {
    const edge_kernels *kernels = r->plan->kernels;
    const norm_args args = {vector_of(r, op, 0), vector_of(r, op, 1), op->eps, op->centred != 0};
    const float *x = row_of(r, op->in, row);
    const edge_buffer *out = &r->plan->buffers[op->out];
    if (out->kind == EDGE_BUFFER_F32) {
        kernels->norm(x, &args, out->dim, row_of(r, op->out, row));
    } else {
        kernels->norm_quantize(x, &args, out->dim, place_of(r, op->out, row, rows));
    }
}

/* The row of in, copied to out where the op does not run in place. */
static float *copied_row(const run *r, const edge_op *op, int64_t row) {
    const float *x = row_of(r, op->in, row);
    float *out = row_of(r, op->out, row);
    if (out != x) {
        memcpy(out, x, (size_t)r->plan->buffers[op->out].dim * 4);
    }
    return out;
}

static void run_head_norm(const run *r, const edge_op *op, int64_t row) {
    const edge_weight *w = op->w[0] >= 0 ? &r->plan->weights[op->w[0]] : NULL;
    const bool each = w != NULL && w->layout != EDGE_LAYOUT_VECTOR; /* a weight for each head */
    float own[MAX_HEAD_DIM];
    const norm_args args = {each ? own : vector_of(r, op, 0), NULL, op->eps, op->centred != 0};
    float *x = copied_row(r, op, row) + op->column;
    for (int32_t head = 0; head < op->n_heads; head++, x += op->head_dim) {
        if (each) {
            edge_weight_unpack(w, head, 1, own);
        }
        r->plan->kernels->norm(x, &args, op->head_dim, x);
    }
}

static void run_bias(const run *r, const edge_op *op, int64_t row) {
    float *x = copied_row(r, op, row) + op->column;
    for (int i = 0; i < 3 && op->w[i] >= 0; i++) {
        const int64_t n = r->plan->weights[op->w[i]].k;
        r->plan->kernels->add(x, vector_of(r, op, i), n, x);
        x += n;
    }
}

/* A range of elements times the weight. */
static void run_gain(const run *r, const edge_op *op, int64_t row) {
    const edge_kernels *kernels = r->plan->kernels;
    float *x = copied_row(r, op, row) + op->column;
    const float *weight = vector_of(r, op, 0);
    if (r->plan->weights[op->w[0]].k == op->n) {
        kernels->multiply(x, weight, op->n, x);
    } else {
        kernels->scale(x, *weight, op->n, x);
    }
}

/* x times y, of as many elements as x or of one. */
static void run_product(const run *r, const edge_op *op, int64_t row, const float *y, int64_t n) {
    const edge_kernels *kernels = r->plan->kernels;
    const int64_t dim = r->plan->buffers[op->out].dim;
    const float *x = row_of(r, op->in, row);
    if (n == dim) {
        kernels->multiply(x, y, dim, row_of(r, op->out, row));
    } else {
        kernels->scale(x, *y, dim, row_of(r, op->out, row));
    }
}

/* A function of each element. In blocks: the op may run in place, the kernels may not. */
static void run_function(const run *r, const edge_op *op, int64_t row) {
    enum { BLOCK = 256 };
    const edge_kernels *kernels = r->plan->kernels;
    const int64_t dim = r->plan->buffers[op->out].dim;
    const xielu_args xielu = {op->alpha_p, op->alpha_n, op->beta, op->eps};
    for (int64_t i = 0; i < dim; i += BLOCK) {
        const int64_t n = dim - i < BLOCK ? dim - i : BLOCK;
        const float *x = row_of(r, op->in, row) + i;
        float y[BLOCK];
        if (op->kind == EDGE_OP_ACTIVATE) {
            kernels->gated(x, NULL, op->activation, n, y);
        } else if (op->kind == EDGE_OP_XIELU) {
            kernels->xielu(x, &xielu, n, y);
        } else {
            kernels->softcap(x, op->softcap, n, y);
        }
        memcpy(row_of(r, op->out, row) + i, y, (size_t)n * 4);
    }
}

/* Rotate the first heads of a row in place. */
static void run_rotate(const run *r, const edge_op *op, int64_t row) {
    const rotate_args heads = {row_of(r, op->in, 0),  r->plan->buffers[op->in].dim,
                               row_of(r, op->in2, 0), op->n_rot,
                               op->interleaved,       op->n_heads,
                               op->head_dim};
    r->plan->kernels->rotate(&heads, row);
}

/* Multiply the first elements of a row in place, by a factor that grows with its position. */
static void run_temperature(const run *r, const edge_op *op, int64_t row) {
    const int64_t times = (r->step->start + row) / op->length;
    const float factor = (float)(1.0 + (double)op->beta * number_log(1.0 + (double)times));
    float *x = row_of(r, op->in, row);
    for (int32_t i = 0; i < op->n; i++) {
        x[i] *= factor;
    }
}

/* The experts of a token, the highest score first, equal scores by index, and their weights. NaN is
 * the lowest score; with any NaN among the scores all weights are NaN, so that the run fails. */
static void run_route(const run *r, const edge_op *op, int64_t row) {
    const edge_kernels *kernels = r->plan->kernels;
    const float *x = row_of(r, op->in, row);
    const float *bias = op->w[0] >= 0 ? r->plan->weights[op->w[0]].data : NULL;
    float scores[MAX_EXPERTS], ranks[MAX_EXPERTS];
    bool is_taken[MAX_EXPERTS] = {false}, has_nan = false;
    if (op->score == EDGE_SCORE_SOFTMAX) {
        kernels->softmax(x, op->n_experts, scores);
    } else {
        memcpy(scores, x, (size_t)op->n_experts * 4);
    }
    for (int32_t i = 0; i < op->n_experts; i++) {
        ranks[i] = bias != NULL ? scores[i] + bias[i] : scores[i];
        if (ranks[i] != ranks[i]) {
            ranks[i] = -INFINITY;
            has_nan = true;
        }
    }
    float *experts = row_of(r, op->out, row), *weights = experts + op->n_used;
    float chosen[MAX_EXPERTS_USED];
    for (int32_t j = 0; j < op->n_used; j++) {
        int32_t best = -1;
        for (int32_t i = 0; i < op->n_experts; i++) {
            if (!is_taken[i] && (best < 0 || ranks[i] > ranks[best])) {
                best = i;
            }
        }
        is_taken[best] = true;
        experts[j] = (float)best;
        chosen[j] = scores[best];
    }
    if (op->score == EDGE_SCORE_SOFTMAX_OF_CHOSEN) {
        kernels->softmax(chosen, op->n_used, weights);
    } else {
        memcpy(weights, chosen, (size_t)op->n_used * 4);
    }
    float sum = 0.0f;
    for (int32_t j = 0; j < op->n_used; j++) {
        sum += weights[j];
    }
    const float divisor = op->is_normed == 0 ? 1.0f : sum > LEAST_SUM ? sum : LEAST_SUM;
    for (int32_t j = 0; j < op->n_used; j++) {
        weights[j] = has_nan ? NAN : weights[j] / divisor * op->expert_scale;
    }
}

static void run_expert_sum(const run *r, const edge_op *op, int64_t row) {
    const expert_order *order = r->plan->order;
    const mix_args args = {.x = buffer_data(r, op->in),
                           .columns = order->column + row * op->n_used,
                           .experts = order->expert,
                           .weights = row_of(r, op->in2, row) + op->n_used,
                           .n_used = op->n_used,
                           .bias = op->w[0] >= 0 ? r->plan->weights[op->w[0]].data : NULL};
    r->plan->kernels->mix(&args, r->plan->buffers[op->out].dim, row_of(r, op->out, row));
}

/* One row of an op whose rows are independent. */
static void run_row(const run *r, const edge_op *op, int64_t row, int64_t rows) {
    const edge_kernels *kernels = r->plan->kernels;
    const int64_t dim = r->plan->buffers[op->out].dim;
    switch ((edge_op_kind)op->kind) { /* no default: the compiler names an op that is missing */
    case EDGE_OP_EMBED:
        edge_weight_unpack(&r->plan->weights[op->w[0]], r->step->tokens[row], 1,
                           row_of(r, op->out, row));
        break;
    case EDGE_OP_ANGLES: run_angles(r, op, row); break;
    case EDGE_OP_NORM: run_norm(r, op, row, rows); break;
    case EDGE_OP_QUANTIZE:
        kernels->quantize(row_of(r, op->in, row), dim, place_of(r, op->out, row, rows));
        break;
    case EDGE_OP_GATED: {
        const float *x = row_of(r, op->in, row);
        kernels->gated(x, x + dim, op->activation, dim, row_of(r, op->out, row));
        break;
    }
    case EDGE_OP_ADD:
        kernels->add(row_of(r, op->in, row), row_of(r, op->in2, row), dim, row_of(r, op->out, row));
        break;
    case EDGE_OP_GATHER: /* the last n_logits rows */
        memcpy(row_of(r, op->out, row),
               row_of(r, op->in, r->step->n_tokens - r->step->n_logits + row), (size_t)dim * 4);
        break;
    case EDGE_OP_ROTATE: run_rotate(r, op, row); break;
    case EDGE_OP_TEMPERATURE: run_temperature(r, op, row); break;
    case EDGE_OP_SPARSIFY: {
        const float *x = row_of(r, op->in, row);
        float *out = copied_row(r, op, row);
        kernels->sparsify(x, op->scale, op->n, out);
        break;
    }
    case EDGE_OP_RESCALE:
        kernels->rescale(row_of(r, op->in, row), row_of(r, op->in2, row), op->eps, dim,
                         row_of(r, op->out, row));
        break;
    case EDGE_OP_HEAD_NORM: run_head_norm(r, op, row); break;
    case EDGE_OP_BIAS: run_bias(r, op, row); break;
    case EDGE_OP_GAIN: run_gain(r, op, row); break;
    case EDGE_OP_SCALE: run_product(r, op, row, &op->scale, 1); break;
    case EDGE_OP_MULTIPLY:
        run_product(r, op, row, row_of(r, op->in2, row), r->plan->buffers[op->in2].dim);
        break;
    case EDGE_OP_ACTIVATE:
    case EDGE_OP_XIELU:
    case EDGE_OP_SOFTCAP: run_function(r, op, row); break;
    case EDGE_OP_SLICE:
        memcpy(row_of(r, op->out, row), row_of(r, op->in, row) + op->column, (size_t)dim * 4);
        break;
    case EDGE_OP_ROUTE: run_route(r, op, row); break;
    case EDGE_OP_EXPERT_SUM: run_expert_sum(r, op, row); break;
    case EDGE_OP_MATMUL: /* not row by row: see run_chunk */
    case EDGE_OP_GATED_MATMUL:
    case EDGE_OP_EXPERT_COLUMNS:
    case EDGE_OP_EXPERT_MATMUL:
    case EDGE_OP_EXPERT_GAIN:
    case EDGE_OP_EXPERT_GATED:
    case EDGE_OP_STORE:
    case EDGE_OP_ATTENTION:
    case EDGE_N_OPS: break;
    }
}

/* ---- matmuls ----------------------------------------------------------------------------- */

/* Where the rows of a panel go, in a tile of columns. */
typedef struct {
    float *out; /* column j, row r at out[j * stride + r] */
    int64_t stride;
    const float *residual; /* of the same shape; NULL: none */
} tile_target;

/* `panels` panels from i_panel on, 1 or 2, times a tile of columns. */
static void run_tile(const edge_plan *plan, const edge_weight *w, int64_t i_panel, int panels,
                     column_tile x, tile_target to) {
    const packed_weight *packed = &plan->packed[w - plan->weights];
    const tile_args args = {(const uint8_t *)w->data + i_panel * packed->panel_bytes,
                            packed->panel_bytes,
                            w->k,
                            x.data,
                            w->table,
                            packed->grid,
                            to.out,
                            to.stride,
                            to.residual};
    if (panels == 2) {
        plan->kernels->pairs[w->layout](&args);
    } else if (plan->spec.native_bf16 && w->layout == EDGE_LAYOUT_BF16) {
        plan->kernels->native_bf16[x.columns - 1](&args);
    } else {
        plan->kernels->tiles[w->layout][x.columns - 1](&args);
    }
}

/* How many panels to run at once, from panel i of a weight on: 1 or 2 of the `left` ones. */
static int panels_at_once(const edge_plan *plan, const edge_weight *w, int64_t i, int64_t left,
                          int32_t columns) {
    return left > 1 && columns == plan->kernels->tile && (i + 2) * PANEL_ROWS <= w->n &&
                   plan->kernels->pairs[w->layout] != NULL
               ? 2
               : 1;
}

/* One of the weights of a MATMUL: its rows go to out from first_row on. */
typedef struct {
    const edge_weight *w;
    int64_t first_row;
} matmul_part;

/* Multiply panels from i_panel on with column tile t into out. Returns how many of the `left`
 * panels are done: 1 or 2.
 *
 * x: (k, columns), with Q8X2 two columns per token; out, residual: (tokens, dim). */
static int matmul_tile(const run *r, const edge_op *op, matmul_part part, int64_t i_panel,
                       int64_t left, int64_t t) {
    const edge_kernels *kernels = r->plan->kernels;
    const edge_weight *w = part.w;
    const int64_t stride = r->plan->buffers[op->out].dim, row = i_panel * PANEL_ROWS;
    const int32_t step = r->plan->buffers[op->in].kind == EDGE_BUFFER_Q8X2 ? 2 : 1;
    const column_tile x = tile_of(r, op->in, t, rows_of(r, op));
    const int64_t at = t * kernels->tile / step * stride + part.first_row + row;
    float *out = (float *)buffer_data(r, op->out) + at;
    const float *residual = op->in2 >= 0 ? (const float *)buffer_data(r, op->in2) + at : NULL;
    if (step == 1 && row + PANEL_ROWS <= w->n) {
        const int panels = panels_at_once(r->plan, w, i_panel, left, x.columns);
        run_tile(r->plan, w, i_panel, panels, x, (tile_target){out, stride, residual});
        return panels;
    }
    /* use a separate tile, (columns, 16): two columns per token must be added, or the last panel
     * is not full */
    float tile[MAX_TILE * PANEL_ROWS];
    run_tile(r->plan, w, i_panel, 1, x, (tile_target){tile, PANEL_ROWS, NULL});
    const int64_t n = w->n - row < PANEL_ROWS ? w->n - row : PANEL_ROWS;
    for (int32_t j = 0; j < x.columns; j += step) {
        float *sum = tile + PANEL_ROWS * j;
        if (step == 2) {
            kernels->add(sum, sum + PANEL_ROWS, PANEL_ROWS, sum);
        }
        if (residual != NULL) {
            kernels->add(sum, residual + j / step * stride, n, out + j / step * stride);
        } else {
            memcpy(out + j / step * stride, sum, (size_t)n * 4);
        }
    }
    return 1;
}

/* Panels of out, counted over the weights of the op one after the other. */
static int64_t matmul_panels(const run *r, const edge_op *op) {
    if (op->kind == EDGE_OP_GATED_MATMUL) {
        return panel_count(r->plan->buffers[op->out].dim);
    }
    int64_t n = 0;
    for (int i = 0; i < 3 && op->w[i] >= 0; i++) {
        n += panel_count(r->plan->weights[op->w[i]].n);
    }
    return n;
}

/* Chunks must be few enough that taking one costs little, and enough that a slow thread does not
 * delay the others. */
static int64_t panels_per_chunk(const run *r, const edge_op *op) {
    const int64_t share = matmul_panels(r, op) / (r->n_threads * 8);
    const int64_t most = rows_of(r, op) > 1 ? 8 : 64;
    return share < 1 ? 1 : share > most ? most : share > 1 ? share / 2 * 2 : 1; /* pairs */
}

/* Panels first_panel .. last_panel - 1 of the op, for all tokens. */
static void run_matmul(const run *r, const edge_op *op, int64_t first_panel, int64_t last_panel) {
    for (int64_t t = 0; t < tile_count(r, op); t++) {
        int64_t base = 0; /* the panel of the op at which weight s begins */
        matmul_part part = {.first_row = op->column};
        for (int s = 0; s < 3 && op->w[s] >= 0; s++) {
            part.w = &r->plan->weights[op->w[s]];
            const int64_t n = panel_count(part.w->n);
            const int64_t end = last_panel < base + n ? last_panel : base + n;
            int64_t i = first_panel > base ? first_panel : base;
            while (i < end) {
                i += matmul_tile(r, op, part, i - base, end - i, t);
            }
            base += n;
            part.first_row += part.w->n;
        }
    }
}

/* out = activation(gate in) * (up in), panels first_panel .. last_panel - 1 of gate and of up. If
 * gate and up are one weight, up begins at its panel up_panel. */
static void run_gated_matmul(const run *r, const edge_op *op, int64_t first_panel,
                             int64_t last_panel) {
    const edge_kernels *kernels = r->plan->kernels;
    const edge_weight *gate = &r->plan->weights[op->w[0]];
    const edge_weight *up = op->w[1] >= 0 ? &r->plan->weights[op->w[1]] : gate;
    const int64_t dim = r->plan->buffers[op->out].dim;
    const int64_t up_panel = op->w[1] >= 0 ? 0 : dim / PANEL_ROWS;
    for (int64_t t = 0; t < tile_count(r, op); t++) {
        const column_tile x = tile_of(r, op->in, t, rows_of(r, op));
        for (int64_t i = first_panel, panels; i < last_panel; i += panels) {
            /* g: gate in; u: up in; both: the result. Each: (columns, 16 or 32 rows) */
            float g[2 * MAX_TILE * PANEL_ROWS], u[2 * MAX_TILE * PANEL_ROWS];
            float both[2 * MAX_TILE * PANEL_ROWS];
            const int64_t left = last_panel - i, row = i * PANEL_ROWS;
            const int a = panels_at_once(r->plan, gate, i, left, x.columns);
            const int b = panels_at_once(r->plan, up, up_panel + i, left, x.columns);
            panels = a < b ? a : b;
            const int64_t rows = panels * PANEL_ROWS, n = dim - row < rows ? dim - row : rows;
            run_tile(r->plan, gate, i, (int)panels, x, (tile_target){g, rows, NULL});
            run_tile(r->plan, up, up_panel + i, (int)panels, x, (tile_target){u, rows, NULL});
            kernels->gated(g, u, op->activation, x.columns * rows, both);
            for (int32_t j = 0; j < x.columns; j++) {
                memcpy(row_of(r, op->out, t * kernels->tile + j) + row, both + rows * j,
                       (size_t)n * 4);
            }
        }
    }
}

/* ---- experts ----------------------------------------------------------------------------- */

/* Expert `slot` of a row that ROUTE made. */
static int32_t expert_at(const float *routes, int32_t slot, int32_t n_experts) {
    return routes[slot] >= 0.0f && routes[slot] < (float)n_experts ? (int32_t)routes[slot] : 0;
}

/* Order the pairs by expert, then by token: a counting sort. One thread does it. */
static void order_columns(const run *r, const edge_op *op, int64_t rows) {
    expert_order *order = r->plan->order;
    const float *routes = row_of(r, op->in2, 0);
    const int32_t n_used = op->n_used;
    memset(order->next, 0, (size_t)op->n_experts * sizeof *order->next);
    for (int64_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < n_used; j++) {
            order->next[expert_at(routes + 2 * n_used * i, j, op->n_experts)]++;
        }
    }
    int32_t column = 0;
    order->n_active = 0;
    for (int32_t e = 0; e < op->n_experts; e++) {
        const int32_t n = order->next[e];
        if (n > 0) {
            order->active[order->n_active++] = e;
        }
        order->first[e] = order->next[e] = column;
        column += n;
    }
    order->first[op->n_experts] = column;
    for (int64_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < n_used; j++) {
            const int32_t e = expert_at(routes + 2 * n_used * i, j, op->n_experts);
            const int32_t at = order->next[e]++;
            order->column[i * n_used + j] = at;
            order->row[at] = (int32_t)i;
            order->expert[at] = e;
        }
    }
    order->n_experts = op->n_experts;
    order->n_columns = column;
}

/* Elements of one column of a buffer of pairs. */
static int64_t column_dim(const run *r, const edge_op *op, int32_t buffer) {
    return r->plan->buffers[buffer].dim / op->n_used;
}

/* Column i of a buffer of pairs of floats. */
static float *column_of(const run *r, const edge_op *op, int32_t buffer, int64_t i) {
    return (float *)buffer_data(r, buffer) + i * column_dim(r, op, buffer);
}

/* The tile of a buffer of pairs that begins at column `first` and ends before `end`. The tiles of
 * an expert are as wide as the kernels', the last one as wide as what is left; so columns need no
 * room but their own. */
static column_tile expert_tile(const run *r, const edge_op *op, int32_t buffer, int32_t first,
                               int32_t end) {
    const int32_t width = r->plan->kernels->tile;
    const int64_t dim = column_dim(r, op, buffer);
    const int64_t column_bytes =
        r->plan->buffers[buffer].kind == EDGE_BUFFER_F32 ? dim * 4 : dim / GROUP * Q8_COLUMN_BYTES;
    return (column_tile){(uint8_t *)buffer_data(r, buffer) + first * column_bytes,
                         end - first < width ? end - first : width};
}

/* The place of column i in a quantised buffer of pairs. */
static q8_place column_place(const run *r, const edge_op *op, int32_t buffer, int32_t i) {
    const expert_order *order = r->plan->order;
    const int32_t width = r->plan->kernels->tile, e = order->expert[i];
    const int32_t in_tile = (i - order->first[e]) % width;
    const column_tile tile = expert_tile(r, op, buffer, i - in_tile, order->first[e + 1]);
    return (q8_place){tile.data, in_tile, tile.columns, false};
}

static void run_expert_columns(const run *r, const edge_op *op, int32_t i) {
    const float *x = row_of(r, op->in, r->plan->order->row[i]);
    const int64_t k = r->plan->buffers[op->in].dim;
    if (r->plan->buffers[op->out].kind == EDGE_BUFFER_F32) {
        memcpy(column_of(r, op, op->out, i), x, (size_t)k * 4);
    } else {
        r->plan->kernels->quantize(x, k, column_place(r, op, op->out, i));
    }
}

static void run_expert_gain(const run *r, const edge_op *op, int32_t i) {
    const float *gains = r->plan->weights[op->w[0]].data;
    float *x = column_of(r, op, op->out, i) + op->column;
    r->plan->kernels->scale(x, gains[r->plan->order->expert[i]], op->n, x);
}

/* n floats at p, plus those of the bias where there is one; sum: room for n. */
static const float *biased(const run *r, const float *p, const float *bias, int64_t n, float *sum) {
    if (bias == NULL) {
        return p;
    }
    r->plan->kernels->add(p, bias, n, sum);
    return sum;
}

static void run_expert_gated(const run *r, const edge_op *op, int32_t i) {
    enum { PIECE = 32 * GROUP };
    const edge_kernels *kernels = r->plan->kernels;
    const bool is_float = r->plan->buffers[op->out].kind == EDGE_BUFFER_F32;
    const int64_t dim = column_dim(r, op, op->out);
    const int64_t at = r->plan->order->expert[i] * dim;
    const float *gate = column_of(r, op, op->in, i), *up = gate + dim, *bias[2] = {NULL, NULL};
    for (int j = 0; j < 2; j++) {
        if (op->w[j] >= 0) {
            bias[j] = (const float *)r->plan->weights[op->w[j]].data + at;
        }
    }
    q8_place place = {NULL, 0, 0, false};
    if (!is_float) {
        place = column_place(r, op, op->out, i);
    }
    for (int64_t first = 0; first < dim; first += PIECE) {
        float g[PIECE], u[PIECE], both[PIECE];
        const int64_t n = dim - first < PIECE ? dim - first : PIECE;
        const float *a = biased(r, gate + first, bias[0] ? bias[0] + first : NULL, n, g);
        const float *b = biased(r, up + first, bias[1] ? bias[1] + first : NULL, n, u);
        float *out = is_float ? column_of(r, op, op->out, i) + first : both;
        kernels->gated(a, b, op->activation, n, out);
        if (!is_float) {
            kernels->quantize(both, n, place);
            place.tile = (uint8_t *)place.tile + PIECE / GROUP * Q8_COLUMN_BYTES * place.columns;
        }
    }
}

/* Panels of an expert, of the weights of the op one after the other. */
static int64_t expert_panels(const run *r, const edge_op *op) {
    int64_t n = 0;
    for (int i = 0; i < 2 && op->w[i] >= 0; i++) {
        n += r->plan->weights[op->w[i]].n / op->n_experts / PANEL_ROWS;
    }
    return n;
}

/* How many panels of an expert a chunk takes, see panels_per_chunk. */
static int64_t expert_share(const run *r, const edge_op *op) {
    const int64_t all = expert_panels(r, op);
    const int64_t share = all * r->plan->order->n_active / (r->n_threads * 8);
    const int64_t most = rows_of(r, op) > 1 ? 8 : 64;
    return share < 2 ? 1 : share > most ? most : share / 2 * 2; /* pairs */
}

/* A chunk: some panels of an expert, for all its columns. */
static void run_expert_matmul(const run *r, const edge_op *op, uint32_t chunk) {
    const expert_order *order = r->plan->order;
    const int64_t n = expert_share(r, op), all = expert_panels(r, op), parts = divide_up(all, n);
    const int32_t e = order->active[chunk / parts];
    const int64_t first_panel = chunk % parts * n;
    const int64_t last_panel = first_panel + n < all ? first_panel + n : all;
    const int64_t stride = column_dim(r, op, op->out);
    for (int32_t first = order->first[e], end = order->first[e + 1]; first < end;
         first += r->plan->kernels->tile) {
        const column_tile x = expert_tile(r, op, op->in, first, end);
        float *out = column_of(r, op, op->out, first) + op->column;
        int64_t base = 0; /* the panel of the expert at which weight s begins */
        for (int s = 0; s < 2 && op->w[s] >= 0; s++) {
            const edge_weight *w = &r->plan->weights[op->w[s]];
            const int64_t own = w->n / op->n_experts / PANEL_ROWS;
            const int64_t stop = last_panel < base + own ? last_panel : base + own;
            int64_t i = first_panel > base ? first_panel : base;
            while (i < stop) {
                const int64_t panel = e * own + i - base;
                const int panels = panels_at_once(r->plan, w, panel, stop - i, x.columns);
                run_tile(r->plan, w, panel, panels, x,
                         (tile_target){out + i * PANEL_ROWS, stride, NULL});
                i += panels;
            }
            base += own;
        }
    }
}

/* With fewer rows than this, a chunk is one column. */
enum { COLUMN_ROWS = 8, COLUMNS_PER_CHUNK = 8 };

static int32_t columns_per_chunk(const run *r, const edge_op *op) {
    return rows_of(r, op) < COLUMN_ROWS ? 1 : COLUMNS_PER_CHUNK;
}

/* Chunks of an op on pairs. Pairs that another op ordered can only be there after a cancelled run:
 * nothing is done with them. */
static uint32_t expert_chunks(const run *r, const edge_op *op, int64_t rows) {
    const expert_order *order = r->plan->order;
    if (op->kind == EDGE_OP_EXPERT_COLUMNS) {
        order_columns(r, op, rows);
    }
    if (order->n_experts != op->n_experts || order->n_columns != rows * op->n_used) {
        return 0;
    }
    switch (op->kind) {
    case EDGE_OP_EXPERT_MATMUL:
        return (uint32_t)(order->n_active * divide_up(expert_panels(r, op), expert_share(r, op)));
    case EDGE_OP_EXPERT_SUM: return (uint32_t)divide_up(rows, ROWS_PER_CHUNK);
    default: return (uint32_t)divide_up(order->n_columns, columns_per_chunk(r, op));
    }
}

/* A chunk of EXPERT_COLUMNS, EXPERT_GAIN or EXPERT_GATED. */
static void run_pairs(const run *r, const edge_op *op, uint32_t chunk) {
    const int32_t n = columns_per_chunk(r, op), first = (int32_t)chunk * n;
    const int32_t all = r->plan->order->n_columns, end = first + n < all ? first + n : all;
    for (int32_t i = first; i < end; i++) {
        switch (op->kind) {
        case EDGE_OP_EXPERT_COLUMNS: run_expert_columns(r, op, i); break;
        case EDGE_OP_EXPERT_GAIN: run_expert_gain(r, op, i); break;
        default: run_expert_gated(r, op, i);
        }
    }
}

/* ---- attention --------------------------------------------------------------------------- */

/* Where a layer and key head begin in a page, in bytes. */
static int64_t kv_offset(const run *r, const edge_op *op, int32_t head) {
    return ((int64_t)op->layer * op->n_kv_heads + head) *
           kv_head_bytes(r->kv->groups[op->group].shape.type, op->head_dim);
}

/* Store all rows of one key head, and rotate them and the query heads that share it. Rows run in
 * order, since what a page holds of a position may depend on earlier positions.
 * in: rows of [q heads | k heads | v heads]. */
static void run_store(const run *r, const edge_op *op, int32_t head) {
    const edge_kernels *kernels = r->plan->kernels;
    const edge_kv_group *kv = &r->kv->groups[op->group];
    const int64_t stride = r->plan->buffers[op->in].dim, offset = kv_offset(r, op, head);
    const int32_t group = op->n_heads / op->n_kv_heads, dim = op->head_dim;
    float *q = row_of(r, op->in, 0) + (int64_t)head * group * dim;
    float *k = row_of(r, op->in, 0) + (int64_t)(op->n_heads + head) * dim;
    const float *angles = op->in2 >= 0 ? row_of(r, op->in2, 0) : NULL;
    const rotate_args queries = {q, stride, angles, op->n_rot, op->interleaved, group, dim};
    const rotate_args keys = {k, stride, angles, op->n_rot, op->interleaved, 1, dim};
    for (int64_t row = 0; row < r->step->n_tokens; row++, q += stride, k += stride) {
        if (angles != NULL) {
            kernels->rotate(&queries, row);
            kernels->rotate(&keys, row);
        }
        const int32_t position = r->step->start + (int32_t)row, page = position / PAGE_POSITIONS;
        uint8_t *const before = page > 0 ? kv->pages[page - 1] : NULL;
        const store_args a = {.shape = &kv->shape,
                              .q = q,
                              .k = k,
                              .v = k + (int64_t)op->n_kv_heads * dim,
                              .group = group,
                              .slot = position % PAGE_POSITIONS,
                              .place = (uint8_t *)kv->pages[page] + offset,
                              .before = before != NULL ? before + offset : NULL};
        kernels->store(&a);
    }
}

enum { ATTENTION_ROWS = 16 };

/* A chunk: ATTENTION_ROWS rows of one key head and of the query heads that share it. */
static void run_attention(const run *r, const edge_op *op, uint32_t chunk) {
    const int32_t head = (int32_t)chunk % op->n_kv_heads;
    const int64_t row = (int64_t)(chunk / (uint32_t)op->n_kv_heads) * ATTENTION_ROWS;
    const int64_t end =
        row + ATTENTION_ROWS < r->step->n_tokens ? row + ATTENTION_ROWS : r->step->n_tokens;
    const attention_args a = {
        .x = row_of(r, op->in, 0),
        .x_stride = r->plan->buffers[op->in].dim,
        .out = row_of(r, op->out, 0),
        .out_stride = r->plan->buffers[op->out].dim,
        .start = r->step->start,
        .group = op->n_heads / op->n_kv_heads,
        .head_dim = op->head_dim,
        .window = op->window,
        .scale = op->attention_scale,
        .softcap = op->softcap,
        .sinks = op->w[0] >= 0 ? r->plan->weights[op->w[0]].data : NULL,
        .i_kv_head = head,
        .kv = &r->kv->groups[op->group],
        .kv_offset = kv_offset(r, op, head),
    };
    r->plan->kernels->attention(&a, row, end);
}

/* ---- chunks ------------------------------------------------------------------------------ */

/* With fewer rows than this, one chunk stores all heads. */
enum { STORE_ROWS = 8 };

static int cancelled(const run *r) {
    return r->step->cancel != NULL && __atomic_load_n(r->step->cancel, __ATOMIC_RELAXED) != 0;
}

/* How many chunks an op has; none after the run was cancelled. One thread calls this when the
 * previous op is done. */
static uint32_t run_chunks(void *context, uint32_t stage) {
    run *r = context;
    if (r->step->op_ns != NULL) {
        const int64_t now = now_ns();
        if (stage > 0) {
            r->step->op_ns[stage - 1] = now - r->last_ns;
        }
        r->last_ns = now;
    }
    if (cancelled(r)) {
        return 0;
    }
    const edge_op *op = &r->plan->ops[stage];
    const int64_t rows = rows_of(r, op);
    switch (op->kind) {
    case EDGE_OP_MATMUL:
    case EDGE_OP_GATED_MATMUL:
        return rows == 0 ? 0 : (uint32_t)divide_up(matmul_panels(r, op), panels_per_chunk(r, op));
    case EDGE_OP_EXPERT_COLUMNS:
    case EDGE_OP_EXPERT_MATMUL:
    case EDGE_OP_EXPERT_GAIN:
    case EDGE_OP_EXPERT_GATED:
    case EDGE_OP_EXPERT_SUM: return expert_chunks(r, op, rows);
    case EDGE_OP_STORE: return r->step->n_tokens < STORE_ROWS ? 1 : (uint32_t)op->n_kv_heads;
    case EDGE_OP_ATTENTION: return (uint32_t)(divide_up(rows, ATTENTION_ROWS) * op->n_kv_heads);
    default: return (uint32_t)divide_up(rows, ROWS_PER_CHUNK);
    }
}

/* Run one chunk of an op; any thread may call this. */
static void run_chunk(void *context, uint32_t stage, uint32_t chunk) {
    const run *r = context;
    if (cancelled(r)) {
        return;
    }
    const edge_op *op = &r->plan->ops[stage];
    if (op->kind == EDGE_OP_MATMUL || op->kind == EDGE_OP_GATED_MATMUL) {
        const int64_t n = panels_per_chunk(r, op), all = matmul_panels(r, op);
        const int64_t first = chunk * n, last = first + n < all ? first + n : all;
        (op->kind == EDGE_OP_MATMUL ? run_matmul : run_gated_matmul)(r, op, first, last);
    } else if (op->kind == EDGE_OP_EXPERT_MATMUL) {
        run_expert_matmul(r, op, chunk);
    } else if (op->kind == EDGE_OP_EXPERT_COLUMNS || op->kind == EDGE_OP_EXPERT_GAIN ||
               op->kind == EDGE_OP_EXPERT_GATED) {
        run_pairs(r, op, chunk);
    } else if (op->kind == EDGE_OP_ATTENTION) {
        run_attention(r, op, chunk);
    } else if (op->kind == EDGE_OP_STORE) {
        const bool alone = r->step->n_tokens < STORE_ROWS;
        for (int32_t head = (int32_t)chunk; head < op->n_kv_heads; head++) {
            run_store(r, op, head);
            if (!alone) {
                break;
            }
        }
    } else {
        const int64_t rows = rows_of(r, op), first = (int64_t)chunk * ROWS_PER_CHUNK;
        for (int64_t i = first; i < first + ROWS_PER_CHUNK && i < rows; i++) {
            run_row(r, op, i, rows);
        }
    }
}

/* ---- the checks of a step ---------------------------------------------------------------- */

static int32_t max(int32_t x, int32_t y) { return x > y ? x : y; }
static int32_t min(int32_t x, int32_t y) { return x < y ? x : y; }

/* Check that every page of a group that the step reads or writes exists. window: of the group's
 * ops; 0: none. */
static int32_t check_pages(const edge_kv_group *kv, int32_t window, const edge_step *s,
                           edge_error *error) {
    if (kv->n_pages < 0 || kv->n_pages > INT32_MAX / PAGE_POSITIONS || kv->sink_pages < 0 ||
        kv->window_pages < 0 || (kv->n_pages > 0 && kv->pages == NULL)) {
        return fail(error, EDGE_BAD_ARGUMENT, "a cache of %d pages", kv->n_pages);
    }
    if (s->start < 0 || s->start > kv->n_pages * PAGE_POSITIONS - s->n_tokens) {
        return fail(error, EDGE_BAD_ARGUMENT, "%d tokens at %d, the cache has room for %d",
                    s->n_tokens, s->start, kv->n_pages * PAGE_POSITIONS);
    }
    const int32_t page = s->start / PAGE_POSITIONS,
                  last = (s->start + s->n_tokens - 1) / PAGE_POSITIONS;
    const int32_t before = max(page - 1, 0); /* the base of a page comes from it */
    const int32_t sight = window > 0 ? max(s->start - window + 1, 0) / PAGE_POSITIONS : 0;
    const int32_t gap_end = min(kv_first_page(kv, page), before);
    for (int32_t i = min(sight, before); i <= last; i++) {
        if (i >= kv->sink_pages && i < gap_end) {
            i = gap_end;
        }
        if (kv->pages[i] == NULL || (uintptr_t)kv->pages[i] % ALIGNMENT != 0) {
            return fail(error, EDGE_BAD_ARGUMENT, "page %d is missing, or not aligned", i);
        }
    }
    return EDGE_OK;
}

static int32_t check_step(const edge_plan *p, const edge_kv *kv, const edge_step *s,
                          edge_error *error) {
    if (s->tokens == NULL || s->n_tokens < 1 || s->n_tokens > p->spec.max_tokens) {
        return fail(error, EDGE_BAD_ARGUMENT, "%d tokens: from 1 to %d", s->n_tokens,
                    p->spec.max_tokens);
    }
    if (kv->n_groups != p->spec.n_kv_groups || kv->groups == NULL) {
        return fail(error, EDGE_BAD_ARGUMENT, "the cache belongs to another model");
    }
    for (int32_t i = 0; i < kv->n_groups; i++) {
        if (memcmp(&kv->groups[i].shape, &p->kv[i], sizeof *p->kv) != 0) {
            return fail(error, EDGE_BAD_ARGUMENT, "the cache belongs to another model");
        }
        const int32_t status = check_pages(&kv->groups[i], p->windows[i], s, error);
        if (status != EDGE_OK) {
            return status;
        }
    }
    if (s->n_logits < 0 || s->n_logits > s->n_tokens || (s->n_logits > 0 && s->logits == NULL)) {
        return fail(error, EDGE_BAD_ARGUMENT, "logits of %d of %d tokens", s->n_logits,
                    s->n_tokens);
    }
    if (s->n_ops < -1 || s->n_ops > p->spec.n_ops) {
        return fail(error, EDGE_BAD_ARGUMENT, "%d ops of %d", s->n_ops, p->spec.n_ops);
    }
    for (int32_t i = 0; i < p->spec.n_ops; i++) {
        const edge_op *op = &p->ops[i];
        for (int32_t j = 0; op->kind == EDGE_OP_EMBED && j < s->n_tokens; j++) {
            const int64_t n_vocab = p->weights[op->w[0]].n;
            if (s->tokens[j] < 0 || s->tokens[j] >= n_vocab) {
                fail(error, EDGE_BAD_TOKEN, "token %d at index %d, the vocabulary has %lld",
                     s->tokens[j], j, (long long)n_vocab);
                if (error != NULL) {
                    error->row = j;
                }
                return EDGE_BAD_TOKEN;
            }
        }
    }
    return EDGE_OK;
}

/* ---- the run ----------------------------------------------------------------------------- */

int32_t edge_run(edge_plan *plan, edge_threads *threads, const edge_kv *kv, const edge_step *step,
                 edge_error *error) {
    if (plan == NULL || threads == NULL || kv == NULL || step == NULL) {
        return fail(error, EDGE_BAD_ARGUMENT, "a null pointer");
    }
    const int32_t status = check_step(plan, kv, step, error);
    if (status != EDGE_OK) {
        return status;
    }
    run r = {
        plan, kv, step, threads_count(threads), step->n_ops < 0 ? plan->spec.n_ops : step->n_ops,
        0};
    const threads_job job = {(uint32_t)r.n_ops, run_chunks, run_chunk, &r};
    threads_run(threads, &job);
    if (step->op_ns != NULL && r.n_ops > 0) {
        step->op_ns[r.n_ops - 1] = now_ns() - r.last_ns;
    }
    if (cancelled(&r)) {
        return fail(error, EDGE_CANCELLED, "cancelled");
    }
    const edge_op *last = &plan->ops[plan->spec.n_ops - 1];
    if (r.n_ops == plan->spec.n_ops && step->n_logits > 0 &&
        plan->buffers[last->out].kind == EDGE_BUFFER_LOGITS &&
        !plan->kernels->all_finite(step->logits,
                                   (int64_t)step->n_logits * plan->buffers[last->out].dim)) {
        return fail(error, EDGE_NOT_FINITE, "the logits are NaN or infinite");
    }
    return EDGE_OK;
}
