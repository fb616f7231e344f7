/* The checks of a plan. They run once, so that the ops need no checks when they run. */
#include "check.h"

#include <stddef.h>

#include "cpu.h"
#include "error.h"
#include "layouts.h"

enum { MAX_TOKENS = 1 << 16, MAX_COUNT = 1 << 20 };

int64_t edge_buffer_bytes(int32_t kind, int32_t dim, int32_t rows) {
    if (dim < 1 || dim > MAX_DIM || rows < 0 || rows > MAX_TOKENS) {
        return -1;
    }
    switch (kind) {
    case EDGE_BUFFER_F32: return (int64_t)dim * rows * 4;
    case EDGE_BUFFER_Q8:
    case EDGE_BUFFER_Q8X2:
        return dim % GROUP == 0
                   ? (int64_t)(dim / GROUP) * Q8_COLUMN_BYTES * buffer_columns(kind, rows)
                   : -1;
    case EDGE_BUFFER_LOGITS: return 0;
    default: return -1;
    }
}

/* Each check_* function returns the first condition that does not hold, or NULL. */
#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            return #condition;                                                                     \
        }                                                                                          \
    } while (0)

typedef struct {
    const edge_plan_spec *spec;
    const edge_op *op;
    const edge_buffer *in, *in2, *out; /* NULL when there is none */
    const edge_op *columns;            /* the last EXPERT_COLUMNS before the op */
} checked;

static bool is_quantized(const edge_buffer *b) {
    return b->kind == EDGE_BUFFER_Q8 || b->kind == EDGE_BUFFER_Q8X2;
}

static const edge_weight *weight_of(const checked *c, int i) {
    return c->op->w[i] >= 0 ? &c->spec->weights[c->op->w[i]] : NULL;
}

static const char *check_no_overlap(const checked *c, const edge_buffer *a, const edge_buffer *b) {
    if (a->kind == EDGE_BUFFER_LOGITS || b->kind == EDGE_BUFFER_LOGITS) {
        return NULL;
    }
    const int64_t a_end = a->offset + edge_buffer_bytes(a->kind, a->dim, c->spec->max_tokens);
    const int64_t b_end = b->offset + edge_buffer_bytes(b->kind, b->dim, c->spec->max_tokens);
    REQUIRE(a_end <= b->offset || b_end <= a->offset);
    return NULL;
}

/* a and b are the same buffer, as elementwise ops allow, or do not overlap. */
static const char *check_same_or_apart(const checked *c, const edge_buffer *a,
                                       const edge_buffer *b) {
    return a->kind == b->kind && a->offset == b->offset ? NULL : check_no_overlap(c, a, b);
}

static const char *check_embed(const checked *c) {
    const edge_weight *w = weight_of(c, 0);
    REQUIRE(c->out->kind == EDGE_BUFFER_F32 && !c->out->is_logit_rows);
    REQUIRE(w != NULL && w->layout != EDGE_LAYOUT_VECTOR && w->k == c->out->dim);
    return NULL;
}

static const char *check_angles(const checked *c) {
    const edge_op *op = c->op;
    const edge_weight *w = weight_of(c, 0);
    REQUIRE(c->out->kind == EDGE_BUFFER_F32 && !c->out->is_logit_rows);
    REQUIRE(op->n_rot > 0 && op->n_rot % 2 == 0 && c->out->dim == op->n_rot);
    REQUIRE(op->base > 1.0f && op->base < 1e12f);
    REQUIRE(op->scale > 0.0f && op->scale <= 1e4f && op->magnitude > 0.0f && op->magnitude < 1e4f);
    REQUIRE(op->has_ramp == 0 || op->has_ramp == 1);
    REQUIRE(op->ramp_low >= -1e6f && op->ramp_low <= 1e6f);
    REQUIRE(op->ramp_high >= -1e6f && op->ramp_high <= 1e6f);
    if (w != NULL) {
        REQUIRE(w->layout == EDGE_LAYOUT_VECTOR && w->k == op->n_rot / 2);
        const float *factors = w->data;
        for (int64_t i = 0; i < w->k; i++) {
            REQUIRE(factors[i] >= 1e-3f && factors[i] <= 1e31f);
        }
    }
    return NULL;
}

static const char *check_norm(const checked *c) {
    const edge_weight *w = weight_of(c, 0);
    REQUIRE(c->in != NULL && c->in->kind == EDGE_BUFFER_F32);
    REQUIRE(c->out->kind != EDGE_BUFFER_LOGITS && c->in->dim == c->out->dim);
    REQUIRE(c->in->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(w != NULL && w->layout == EDGE_LAYOUT_VECTOR && w->k == c->in->dim);
    REQUIRE(c->op->eps >= 0.0f && c->op->eps < 1.0f);
    const edge_weight *bias = weight_of(c, 1);
    REQUIRE(bias == NULL || (bias->layout == EDGE_LAYOUT_VECTOR && bias->k == c->in->dim));
    return check_no_overlap(c, c->in, c->out);
}

static const char *check_quantize(const checked *c) {
    REQUIRE(c->in != NULL && c->in->kind == EDGE_BUFFER_F32 && is_quantized(c->out));
    REQUIRE(c->in->dim == c->out->dim && c->in->is_logit_rows == c->out->is_logit_rows);
    return check_no_overlap(c, c->in, c->out);
}

/* Every weight is a matrix with k = in->dim, and its layout takes the form of in. */
static const char *check_matrices(const checked *c) {
    REQUIRE(c->in != NULL && c->in->kind != EDGE_BUFFER_LOGITS && c->op->w[0] >= 0);
    REQUIRE(c->in->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(!is_quantized(c->out));
    for (int i = 0; i < 3; i++) {
        const edge_weight *w = weight_of(c, i);
        if (w != NULL) {
            REQUIRE(w->layout != EDGE_LAYOUT_VECTOR && w->k == c->in->dim);
            REQUIRE(takes_q8(w->layout) == is_quantized(c->in));
        }
    }
    return check_no_overlap(c, c->in, c->out);
}

static int64_t weight_rows(const edge_plan_spec *spec, const edge_op *op) {
    int64_t n = 0;
    for (int i = 0; i < 3; i++) {
        n += op->w[i] >= 0 ? spec->weights[op->w[i]].n : 0;
    }
    return n;
}

static const char *check_matmul(const checked *c) {
    REQUIRE(c->op->column >= 0);
    REQUIRE(c->op->column + weight_rows(c->spec, c->op) <= c->out->dim);
    const char *wrong = c->in2 != NULL ? check_same_or_apart(c, c->in2, c->out) : NULL;
    if (wrong != NULL) {
        return wrong;
    }
    if (c->in2 != NULL) {
        REQUIRE(c->in2->kind == EDGE_BUFFER_F32 || c->in2 == c->out); /* logits, too */
        REQUIRE(c->in2->dim == c->out->dim);
        REQUIRE(c->in2->is_logit_rows == c->out->is_logit_rows);
    }
    return check_matrices(c);
}

static const char *check_gated_matmul(const checked *c) {
    const edge_weight *gate = weight_of(c, 0), *up = weight_of(c, 1);
    REQUIRE(gate != NULL && c->op->w[2] < 0 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in == NULL || c->in->kind != EDGE_BUFFER_Q8X2);
    REQUIRE(c->op->activation >= 0 && c->op->activation < EDGE_N_ACTIVATIONS);
    if (up == NULL) {
        REQUIRE(gate->n == 2 * (int64_t)c->out->dim && c->out->dim % PANEL_ROWS == 0);
    } else {
        REQUIRE(gate->n == c->out->dim && up->n == c->out->dim);
    }
    return check_matrices(c);
}

static const char *check_gated(const checked *c) {
    REQUIRE(c->in != NULL && c->in->kind == EDGE_BUFFER_F32 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in->dim == 2 * c->out->dim && c->in->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(c->op->activation >= 0 && c->op->activation < EDGE_N_ACTIVATIONS);
    return check_no_overlap(c, c->in, c->out);
}

static const char *check_add(const checked *c) {
    REQUIRE(c->in != NULL && c->in2 != NULL);
    REQUIRE(c->in->kind == EDGE_BUFFER_F32 && c->in2->kind == EDGE_BUFFER_F32);
    REQUIRE(c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in->dim == c->out->dim && c->in2->dim == c->out->dim);
    REQUIRE(c->in->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(c->in2->is_logit_rows == c->out->is_logit_rows);
    const char *wrong = check_same_or_apart(c, c->in, c->out);
    return wrong != NULL ? wrong : check_same_or_apart(c, c->in2, c->out);
}

/* in is overwritten. */
static const char *check_in_place(const checked *c) {
    REQUIRE(c->in != NULL && c->in == c->out);
    REQUIRE(c->in->kind == EDGE_BUFFER_F32 && !c->in->is_logit_rows);
    return NULL;
}

/* in2 holds angles, by which heads of in are rotated. */
static const char *check_rotation(const checked *c) {
    REQUIRE(c->in2 != NULL && c->in2->kind == EDGE_BUFFER_F32 && !c->in2->is_logit_rows);
    REQUIRE(c->op->n_rot > 0 && c->op->n_rot % 2 == 0 && c->op->n_rot <= c->op->head_dim);
    REQUIRE(c->in2->dim == c->op->n_rot);
    return check_no_overlap(c, c->in, c->in2);
}

static const char *check_rotate(const checked *c) {
    const edge_op *op = c->op;
    const char *wrong = check_in_place(c);
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(op->head_dim > 0 && op->head_dim <= MAX_DIM && op->n_heads > 0);
    REQUIRE(op->n_heads <= c->in->dim / op->head_dim);
    return check_rotation(c);
}

static const char *check_temperature(const checked *c) {
    REQUIRE(c->op->n > 0 && c->op->length > 0);
    REQUIRE(c->op->beta > -1e4f && c->op->beta < 1e4f);
    const char *wrong = check_in_place(c);
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->op->n <= c->in->dim);
    return NULL;
}

/* Floats of one shape, in place or apart. */
static const char *check_elementwise(const checked *c) {
    REQUIRE(c->in != NULL && c->in->kind == c->out->kind && !is_quantized(c->out));
    REQUIRE(c->in->dim == c->out->dim && c->in->is_logit_rows == c->out->is_logit_rows);
    return check_same_or_apart(c, c->in, c->out);
}

static const char *check_head_norm(const checked *c) {
    const edge_op *op = c->op;
    const edge_weight *w = weight_of(c, 0);
    REQUIRE(op->column >= 0 && op->n_heads > 0 && op->head_dim > 0);
    REQUIRE((int64_t)op->n_heads * op->head_dim <= c->out->dim - op->column);
    REQUIRE(w == NULL || w->k == op->head_dim);
    if (w != NULL && w->layout != EDGE_LAYOUT_VECTOR) {
        REQUIRE(w->n == op->n_heads && w->k <= MAX_HEAD_DIM);
    }
    REQUIRE(op->eps >= 0.0f && op->eps < 1.0f);
    return check_elementwise(c);
}

static const char *check_bias(const checked *c) {
    int64_t n = c->op->column;
    REQUIRE(n >= 0 && c->op->w[0] >= 0);
    for (int i = 0; i < 3; i++) {
        const edge_weight *w = weight_of(c, i);
        REQUIRE(w == NULL || w->layout == EDGE_LAYOUT_VECTOR);
        n += w == NULL ? 0 : w->k;
    }
    REQUIRE(n <= c->out->dim);
    return check_elementwise(c);
}

static const char *check_gain(const checked *c) {
    const edge_weight *w = weight_of(c, 0);
    REQUIRE(w != NULL && w->layout == EDGE_LAYOUT_VECTOR && (w->k == c->op->n || w->k == 1));
    REQUIRE(c->op->column >= 0 && c->op->n > 0 && c->op->n <= c->out->dim - c->op->column);
    return check_elementwise(c);
}

static const char *check_scale(const checked *c) {
    REQUIRE(c->op->scale > -1e9f && c->op->scale < 1e9f);
    return check_elementwise(c);
}

static const char *check_activate(const checked *c) {
    REQUIRE(c->op->activation >= 0 && c->op->activation < EDGE_N_ACTIVATIONS);
    REQUIRE(c->op->activation != EDGE_ACTIVATION_SWIGLU_OAI);
    return check_elementwise(c);
}

static const char *check_xielu(const checked *c) {
    const edge_op *op = c->op;
    REQUIRE(op->alpha_p > -1e4f && op->alpha_p < 1e4f && op->alpha_n > -1e4f && op->alpha_n < 1e4f);
    REQUIRE(op->beta > -1e4f && op->beta < 1e4f && op->eps > -1.0f && op->eps < 1.0f);
    return check_elementwise(c);
}

static const char *check_softcap(const checked *c) {
    REQUIRE(c->op->softcap > 0.0f && c->op->softcap < 1e9f);
    return check_elementwise(c);
}

static const char *check_multiply(const checked *c) {
    REQUIRE(c->in2 != NULL && c->in2->kind == EDGE_BUFFER_F32 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in2->dim == c->out->dim || c->in2->dim == 1);
    REQUIRE(c->in2->is_logit_rows == c->out->is_logit_rows);
    const char *wrong = c->in2->dim == c->out->dim ? check_same_or_apart(c, c->in2, c->out)
                                                   : check_no_overlap(c, c->in2, c->out);
    return wrong != NULL ? wrong : check_elementwise(c);
}

static const char *check_sparsify(const checked *c) {
    REQUIRE(c->in != NULL && c->in->kind == EDGE_BUFFER_F32 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->op->scale > -1e4f && c->op->scale < 1e4f);
    REQUIRE(c->op->n > 0 && c->op->n <= c->out->dim && c->in->dim == c->out->dim);
    REQUIRE(c->in->is_logit_rows == c->out->is_logit_rows);
    return check_no_overlap(c, c->in, c->out);
}

static const char *check_rescale(const checked *c) {
    REQUIRE(c->in != NULL && c->in2 != NULL);
    REQUIRE(c->in->kind == EDGE_BUFFER_F32 && c->in2->kind == EDGE_BUFFER_F32);
    REQUIRE(c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in->dim == c->out->dim && c->in2->dim == c->out->dim);
    REQUIRE(c->in->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(c->in2->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(c->op->eps >= 0.0f && c->op->eps < 1.0f);
    const char *wrong = check_no_overlap(c, c->in, c->out);
    return wrong != NULL ? wrong : check_no_overlap(c, c->in2, c->out);
}

static const char *check_slice(const checked *c) {
    REQUIRE(c->in != NULL && c->in->kind == EDGE_BUFFER_F32 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->op->column >= 0 && c->op->column <= c->in->dim - c->out->dim);
    REQUIRE(c->in->is_logit_rows == c->out->is_logit_rows);
    return check_no_overlap(c, c->in, c->out);
}

/* in holds heads that fit the cache: [q | k | v], or q alone. */
static const char *check_heads(const checked *c) {
    const edge_op *op = c->op;
    const edge_plan_spec *s = c->spec;
    REQUIRE(c->in != NULL && c->in->kind == EDGE_BUFFER_F32 && !c->in->is_logit_rows);
    REQUIRE(op->group >= 0 && op->group < s->n_kv_groups);
    const edge_kv_shape *kv = &s->kv[op->group];
    REQUIRE(op->layer >= 0 && op->layer < kv->n_layers);
    REQUIRE(op->head_dim == kv->head_dim && op->n_kv_heads == kv->n_kv_heads);
    REQUIRE(op->n_heads > 0 && op->n_heads <= 4096 && op->n_heads % op->n_kv_heads == 0);
    return NULL;
}

/* Elements of [q | k | v]. check_heads bounds the numbers. */
static int32_t heads_dim(const edge_op *op) {
    return (op->n_heads + 2 * op->n_kv_heads) * op->head_dim;
}

static const char *check_store(const checked *c) {
    REQUIRE(c->in == c->out);
    const char *wrong = check_heads(c);
    if (wrong == NULL && c->in2 != NULL) {
        wrong = check_rotation(c);
    }
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->in->dim == heads_dim(c->op));
    return NULL;
}

static const char *check_attention(const checked *c) {
    const char *wrong = check_heads(c); /* bounds the products below */
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->out->kind == EDGE_BUFFER_F32 && !c->out->is_logit_rows);
    REQUIRE(c->out->dim == c->op->n_heads * c->op->head_dim);
    REQUIRE(c->in->dim == heads_dim(c->op) || c->in->dim == c->out->dim);
    const edge_weight *sinks = weight_of(c, 0);
    if (sinks != NULL) {
        REQUIRE(sinks->layout == EDGE_LAYOUT_VECTOR && sinks->k == c->op->n_heads);
    }
    REQUIRE(c->op->window >= 0 && c->op->softcap >= 0.0f && c->op->softcap < 1e6f);
    REQUIRE(c->op->attention_scale >= 0.0f && c->op->attention_scale < 1e4f);
    return check_no_overlap(c, c->in, c->out);
}

static const char *check_gather(const checked *c) {
    REQUIRE(c->in != NULL && c->in->kind == EDGE_BUFFER_F32 && !c->in->is_logit_rows);
    REQUIRE(c->out->kind == EDGE_BUFFER_F32 && c->out->is_logit_rows);
    REQUIRE(c->in->dim == c->out->dim);
    return check_no_overlap(c, c->in, c->out);
}

/* The numbers of experts are in range, and all buffers have the rows of out. */
static const char *check_experts(const checked *c) {
    const edge_op *op = c->op;
    REQUIRE(op->n_experts > 0 && op->n_experts <= MAX_EXPERTS);
    REQUIRE(op->n_used > 0 && op->n_used <= MAX_EXPERTS_USED && op->n_used <= op->n_experts);
    REQUIRE(c->in != NULL && c->in->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(c->in2 == NULL || c->in2->is_logit_rows == c->out->is_logit_rows);
    REQUIRE(c->out->dim % op->n_used == 0 || op->kind == EDGE_OP_EXPERT_SUM);
    if (op->kind == EDGE_OP_EXPERT_GAIN) {
        REQUIRE(c->in == c->out);
        return NULL;
    }
    return check_no_overlap(c, c->in, c->out);
}

static const char *check_route(const checked *c) {
    const edge_op *op = c->op;
    const edge_weight *bias = weight_of(c, 0);
    const char *wrong = check_experts(c); /* bounds the numbers below */
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->in->kind == EDGE_BUFFER_F32 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in->dim == op->n_experts && c->out->dim == 2 * op->n_used);
    REQUIRE(op->score >= EDGE_SCORE_GIVEN && op->score <= EDGE_SCORE_SOFTMAX_OF_CHOSEN);
    REQUIRE(op->is_normed == 0 || op->is_normed == 1);
    REQUIRE(op->expert_scale > 0.0f && op->expert_scale < 1e4f);
    REQUIRE(bias == NULL || (bias->layout == EDGE_LAYOUT_VECTOR && bias->k == op->n_experts));
    return NULL;
}

/* in2 holds what ROUTE made. */
static const char *check_routes(const checked *c) {
    REQUIRE(c->in2 != NULL && c->in2->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in2->dim == 2 * c->op->n_used);
    return check_no_overlap(c, c->in2, c->out);
}

/* A buffer holds columns that matmuls take, of k elements. */
static const char *check_columns(const edge_buffer *b, int64_t k) {
    REQUIRE(b->kind == EDGE_BUFFER_F32 || (b->kind == EDGE_BUFFER_Q8 && k % GROUP == 0));
    return NULL;
}

static const char *check_expert_columns(const checked *c) {
    const char *wrong = check_experts(c); /* bounds the numbers below */
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->in->kind == EDGE_BUFFER_F32);
    REQUIRE((int64_t)c->in->dim * c->op->n_used == c->out->dim);
    wrong = check_columns(c->out, c->in->dim);
    return wrong != NULL ? wrong : check_routes(c);
}

/* The op works on the pairs that the last EXPERT_COLUMNS ordered. */
static const char *check_ordered(const checked *c) {
    REQUIRE(c->columns != NULL);
    REQUIRE(c->columns->n_experts == c->op->n_experts && c->columns->n_used == c->op->n_used);
    REQUIRE(c->spec->buffers[c->columns->out].is_logit_rows == c->out->is_logit_rows);
    return check_experts(c);
}

static const char *check_expert_matmul(const checked *c) {
    const edge_op *op = c->op;
    const char *wrong = check_ordered(c);
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(op->w[0] >= 0 && op->w[2] < 0 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in->dim % op->n_used == 0);
    const int64_t k = c->in->dim / op->n_used;
    int64_t rows = 0;
    for (int i = 0; i < 2; i++) {
        const edge_weight *w = weight_of(c, i);
        if (w != NULL) {
            REQUIRE(w->layout != EDGE_LAYOUT_VECTOR && w->k == k);
            REQUIRE(w->n % ((int64_t)PANEL_ROWS * op->n_experts) == 0);
            REQUIRE(takes_q8(w->layout) == is_quantized(c->in));
            rows += w->n / op->n_experts;
        }
    }
    REQUIRE(op->column >= 0 && op->column + rows <= c->out->dim / op->n_used);
    return check_columns(c->in, k);
}

static const char *check_expert_gain(const checked *c) {
    const edge_op *op = c->op;
    const edge_weight *gains = weight_of(c, 0);
    const char *wrong = check_ordered(c);
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(gains != NULL && gains->layout == EDGE_LAYOUT_VECTOR && gains->k == op->n_experts);
    REQUIRE(op->column >= 0 && op->n > 0 && op->n <= c->out->dim / op->n_used - op->column);
    return NULL;
}

/* Biases: a vector for each expert, or none. */
static const char *check_expert_bias(const checked *c, int i, int64_t n) {
    const edge_weight *bias = weight_of(c, i);
    REQUIRE(bias == NULL ||
            (bias->layout == EDGE_LAYOUT_VECTOR && bias->k == n * c->op->n_experts));
    return NULL;
}

static const char *check_expert_gated(const checked *c) {
    const edge_op *op = c->op;
    const char *wrong = check_ordered(c);
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->in->kind == EDGE_BUFFER_F32 && c->in->dim == 2 * (int64_t)c->out->dim);
    REQUIRE(op->activation >= 0 && op->activation < EDGE_N_ACTIVATIONS);
    const int64_t n = c->out->dim / op->n_used;
    wrong = check_columns(c->out, n);
    for (int i = 0; i < 2 && wrong == NULL; i++) {
        wrong = check_expert_bias(c, i, n);
    }
    return wrong;
}

static const char *check_expert_sum(const checked *c) {
    const char *wrong = check_ordered(c);
    if (wrong == NULL) {
        wrong = check_routes(c);
    }
    if (wrong != NULL) {
        return wrong;
    }
    REQUIRE(c->in->kind == EDGE_BUFFER_F32 && c->out->kind == EDGE_BUFFER_F32);
    REQUIRE(c->in->dim == (int64_t)c->op->n_used * c->out->dim);
    return check_expert_bias(c, 0, c->out->dim);
}

static const char *check_op(const checked *c) {
    switch ((edge_op_kind)c->op->kind) { /* no default: the compiler names an op that is missing */
    case EDGE_OP_EMBED: return check_embed(c);
    case EDGE_OP_ANGLES: return check_angles(c);
    case EDGE_OP_NORM: return check_norm(c);
    case EDGE_OP_QUANTIZE: return check_quantize(c);
    case EDGE_OP_MATMUL: return check_matmul(c);
    case EDGE_OP_GATED_MATMUL: return check_gated_matmul(c);
    case EDGE_OP_GATED: return check_gated(c);
    case EDGE_OP_ADD: return check_add(c);
    case EDGE_OP_STORE: return check_store(c);
    case EDGE_OP_ATTENTION: return check_attention(c);
    case EDGE_OP_GATHER: return check_gather(c);
    case EDGE_OP_ROTATE: return check_rotate(c);
    case EDGE_OP_TEMPERATURE: return check_temperature(c);
    case EDGE_OP_SPARSIFY: return check_sparsify(c);
    case EDGE_OP_RESCALE: return check_rescale(c);
    case EDGE_OP_HEAD_NORM: return check_head_norm(c);
    case EDGE_OP_BIAS: return check_bias(c);
    case EDGE_OP_GAIN: return check_gain(c);
    case EDGE_OP_SCALE: return check_scale(c);
    case EDGE_OP_ACTIVATE: return check_activate(c);
    case EDGE_OP_XIELU: return check_xielu(c);
    case EDGE_OP_SOFTCAP: return check_softcap(c);
    case EDGE_OP_MULTIPLY: return check_multiply(c);
    case EDGE_OP_SLICE: return check_slice(c);
    case EDGE_OP_ROUTE: return check_route(c);
    case EDGE_OP_EXPERT_COLUMNS: return check_expert_columns(c);
    case EDGE_OP_EXPERT_MATMUL: return check_expert_matmul(c);
    case EDGE_OP_EXPERT_GAIN: return check_expert_gain(c);
    case EDGE_OP_EXPERT_GATED: return check_expert_gated(c);
    case EDGE_OP_EXPERT_SUM: return check_expert_sum(c);
    case EDGE_N_OPS: break;
    }
    return "an op kind that exists";
}

/* The dim of the first buffer of logits; at least one exists. All must have the same dim, since
 * edge_step holds rows of one length. */
static int32_t logits_dim(const edge_plan_spec *s) {
    int32_t i = 0;
    while (s->buffers[i].kind != EDGE_BUFFER_LOGITS) {
        i++;
    }
    return s->buffers[i].dim;
}

static const char *check_buffer(const edge_plan_spec *s, const edge_buffer *b) {
    const int64_t bytes = edge_buffer_bytes(b->kind, b->dim, s->max_tokens);
    REQUIRE(bytes >= 0 && (b->is_logit_rows == 0 || b->is_logit_rows == 1));
    REQUIRE(b->kind == EDGE_BUFFER_LOGITS ? b->is_logit_rows == 1 : b->offset % ALIGNMENT == 0);
    REQUIRE(b->kind != EDGE_BUFFER_LOGITS || b->dim == logits_dim(s));
    REQUIRE(b->offset >= 0 && b->offset <= s->arena_bytes - bytes);
    return NULL;
}

static const char *check_weight(const edge_weight *w) {
    REQUIRE(w->data != NULL && (uintptr_t)w->data % ALIGNMENT == 0);
    REQUIRE(w->n > 0 && w->k > 0 && w->n <= INT32_MAX && w->k <= MAX_DIM);
    if (w->layout == EDGE_LAYOUT_VECTOR) {
        REQUIRE(w->n == 1 && w->n_bytes == 4 * w->k);
        return NULL;
    }
    REQUIRE(w->layout >= 0 && w->layout < EDGE_N_LAYOUTS);
    REQUIRE(!takes_q8(w->layout) ||
            (w->k % GROUP == 0 && w->k % layout_table[w->layout].group == 0));
    REQUIRE(w->table >= 0 && w->table < 32 && layout_table[w->layout].tables >> w->table & 1);
    REQUIRE(layout_table[w->layout].front_bytes == 0 || w->k % SUPER == 0);
    REQUIRE(w->n_bytes == panel_count(w->n) * panel_bytes(w->layout, w->k));
    return NULL;
}

static const char *check_spec(const edge_plan_spec *s) {
    REQUIRE(s->ops != NULL && s->buffers != NULL && s->weights != NULL);
    REQUIRE(s->n_ops > 0 && s->n_ops < MAX_COUNT && s->n_buffers > 0 && s->n_buffers < MAX_COUNT);
    REQUIRE(s->n_weights > 0 && s->n_weights < MAX_COUNT);
    REQUIRE(s->max_tokens > 0 && s->max_tokens <= MAX_TOKENS);
    REQUIRE(s->arena_bytes > 0 && s->arena_bytes < (int64_t)1 << 46);
    REQUIRE(s->arena != NULL && (uintptr_t)s->arena % ALIGNMENT == 0);
    REQUIRE(s->kv != NULL && s->n_kv_groups > 0 && s->n_kv_groups < MAX_COUNT);
    for (int32_t i = 0; i < s->n_kv_groups; i++) {
        REQUIRE(edge_page_bytes(&s->kv[i]) > 0);
    }
    return NULL;
}

/* Runs before check_op, which uses the indices. */
static const char *check_indices(const edge_plan_spec *s, const edge_op *op) {
    REQUIRE(op->out >= 0 && op->out < s->n_buffers);
    REQUIRE(op->in >= -1 && op->in < s->n_buffers && op->in2 >= -1 && op->in2 < s->n_buffers);
    for (int i = 0; i < 3; i++) {
        REQUIRE(op->w[i] >= -1 && op->w[i] < s->n_weights);
    }
    return NULL;
}

int32_t plan_check(const edge_plan_spec *s, edge_error *error) {
    if (!cpu_usable(s->isa)) {
        return fail(error, EDGE_BAD_ARGUMENT, "this CPU cannot run instruction set %d", s->isa);
    }
    if (s->native_bf16 != 0 && !cpu_has_bf16(s->isa)) {
        return fail(error, EDGE_BAD_ARGUMENT, "this CPU has no bfloat16 dot products");
    }
    const char *wrong = check_spec(s);
    for (int32_t i = 0; wrong == NULL && i < s->n_buffers; i++) {
        wrong = check_buffer(s, &s->buffers[i]);
    }
    for (int32_t i = 0; wrong == NULL && i < s->n_weights; i++) {
        wrong = check_weight(&s->weights[i]);
    }
    if (wrong != NULL) {
        return fail(error, EDGE_BAD_PLAN, "needs %s", wrong);
    }
    const edge_op *columns = NULL;
    for (int32_t i = 0; i < s->n_ops; i++) {
        const edge_op *op = &s->ops[i];
        wrong = check_indices(s, op);
        if (wrong == NULL) {
            const checked c = {s,
                               op,
                               op->in >= 0 ? &s->buffers[op->in] : NULL,
                               op->in2 >= 0 ? &s->buffers[op->in2] : NULL,
                               &s->buffers[op->out],
                               columns};
            wrong = check_op(&c);
        }
        if (wrong != NULL) {
            fail(error, EDGE_BAD_PLAN, "op %d (kind %d) needs %s", i, op->kind, wrong);
            if (error != NULL) {
                error->op = i;
            }
            return EDGE_BAD_PLAN;
        }
        columns = op->kind == EDGE_OP_EXPERT_COLUMNS ? op : columns;
    }
    return EDGE_OK;
}
