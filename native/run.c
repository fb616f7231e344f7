/* One step of a plan.
 *
 * Each op is split into chunks over rows, panels or heads; threads.c hands them out. What a
 * chunk computes does not depend on the number of chunks or threads. */
#include <string.h>

#include "clock.h"
#include "error.h"
#include "numbers.h"
#include "run.h"
#include "threads.h"

/* ---- ops over rows ----------------------------------------------------------------------- */

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

void run_tile(const edge_plan *plan, const edge_weight *w, int64_t i_panel, int panels,
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

int panels_at_once(const edge_plan *plan, const edge_weight *w, int64_t i, int64_t left,
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
        run_expert_pairs(r, op, chunk);
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
