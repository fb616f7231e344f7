/* The ops of models with experts: which experts a token uses, and the ops on the pairs of a token
 * and one of its experts. Columns of pairs are ordered by expert, so that each weight is read once.
 */
#include <math.h>
#include <string.h>

#include "run.h"

/* The least that the weights of experts are divided by. */
static const float LEAST_SUM = 1e-12f;

void run_route(const run *r, const edge_op *op, int64_t row) {
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

void run_expert_sum(const run *r, const edge_op *op, int64_t row) {
    const expert_order *order = r->plan->order;
    const mix_args args = {.x = buffer_data(r, op->in),
                           .columns = order->column + row * op->n_used,
                           .experts = order->expert,
                           .weights = row_of(r, op->in2, row) + op->n_used,
                           .n_used = op->n_used,
                           .bias = op->w[0] >= 0 ? r->plan->weights[op->w[0]].data : NULL};
    r->plan->kernels->mix(&args, r->plan->buffers[op->out].dim, row_of(r, op->out, row));
}

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

void run_expert_matmul(const run *r, const edge_op *op, uint32_t chunk) {
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

uint32_t expert_chunks(const run *r, const edge_op *op, int64_t rows) {
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

void run_expert_pairs(const run *r, const edge_op *op, uint32_t chunk) {
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
