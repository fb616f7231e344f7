/* The plan: made once, then run by one call per step, see run.c. */
#include "plan.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "cpu.h"
#include "error.h"
#include "formats/formats.h"
#include "layouts.h"
#include "numbers.h"

static void *copy(const void *src, int32_t n, size_t size) {
    void *p = malloc((size_t)n * size);
    if (p != NULL) {
        memcpy(p, src, (size_t)n * size);
    }
    return p;
}

/* How pair i of a rotary embedding scales positions. */
static double scale_of(const edge_op *op, int32_t i) {
    const double scale = (double)op->scale;
    if (!op->has_ramp) {
        return scale;
    }
    const double width = (double)op->ramp_high - (double)op->ramp_low;
    const double along = (i - (double)op->ramp_low) / (width > 0.001 ? width : 0.001);
    const double kept = 1.0 - (along < 0.0 ? 0.0 : along > 1.0 ? 1.0 : along);
    return kept + (1.0 - kept) * scale;
}

/* Radians per position: scale / factor * base^(-2 i / n_rot). */
static double *frequencies_of(const edge_plan *plan, const edge_op *op) {
    const uint32_t mode = cpu_float_mode();
    double *out = malloc((size_t)op->n_rot / 2 * sizeof *out);
    const float *factors = op->w[0] >= 0 ? plan->weights[op->w[0]].data : NULL;
    for (int32_t i = 0; out != NULL && i < op->n_rot / 2; i++) {
        const double power = number_exp(-2.0 * i / op->n_rot * number_log((double)op->base));
        out[i] = power * scale_of(op, i) / (factors != NULL ? (double)factors[i] : 1.0);
    }
    cpu_float_restore(mode);
    return out;
}

/* How many last positions the attention ops of each layer group see; 0: all. */
static int32_t *windows_of(const edge_plan_spec *spec) {
    int32_t *out = malloc((size_t)spec->n_kv_groups * sizeof *out);
    for (int32_t i = 0; out != NULL && i < spec->n_kv_groups; i++) {
        out[i] = 1; /* a position sees itself */
    }
    for (int32_t i = 0; out != NULL && i < spec->n_ops; i++) {
        const edge_op *op = &spec->ops[i];
        if (op->kind == EDGE_OP_ATTENTION && out[op->group] != 0 &&
            (op->window == 0 || op->window > out[op->group])) {
            out[op->group] = op->window;
        }
    }
    return out;
}

static bool has_experts(const edge_plan_spec *spec) {
    for (int32_t i = 0; i < spec->n_ops; i++) {
        if (spec->ops[i].kind == EDGE_OP_EXPERT_COLUMNS) {
            return true;
        }
    }
    return false;
}

/* Room for the order of any op of the plan; NULL: no memory. */
static expert_order *new_order(const edge_plan_spec *spec) {
    int64_t n_experts = 0, n_used = 0;
    for (int32_t i = 0; i < spec->n_ops; i++) {
        const edge_op *op = &spec->ops[i];
        if (op->kind == EDGE_OP_EXPERT_COLUMNS) {
            n_experts = op->n_experts > n_experts ? op->n_experts : n_experts;
            n_used = op->n_used > n_used ? op->n_used : n_used;
        }
    }
    const int64_t pairs = n_used * spec->max_tokens;
    expert_order *order = calloc(1, sizeof *order);
    int32_t *p = calloc((size_t)(3 * n_experts + 1 + 3 * pairs), sizeof *p);
    if (order == NULL || p == NULL) {
        free(order);
        free(p);
        return NULL;
    }
    order->numbers = p;
    order->active = p;
    order->next = order->active + n_experts;
    order->first = order->next + n_experts;
    order->column = order->first + n_experts + 1;
    order->row = order->column + pairs;
    order->expert = order->row + pairs;
    return order;
}

int32_t edge_plan_new(const edge_plan_spec *spec, edge_plan **out, edge_error *error) {
    if (spec == NULL || out == NULL) {
        return fail(error, EDGE_BAD_ARGUMENT, "a null pointer");
    }
    const int32_t status = plan_check(spec, error);
    if (status != EDGE_OK) {
        return status;
    }
    edge_plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) {
        return fail(error, EDGE_NO_MEMORY, "no memory for a plan");
    }
    plan->spec = *spec;
    plan->kernels = cpu_kernels(spec->isa);
    plan->kv = copy(spec->kv, spec->n_kv_groups, sizeof *spec->kv);
    plan->windows = windows_of(spec);
    plan->ops = copy(spec->ops, spec->n_ops, sizeof *spec->ops);
    plan->buffers = copy(spec->buffers, spec->n_buffers, sizeof *spec->buffers);
    plan->weights = copy(spec->weights, spec->n_weights, sizeof *spec->weights);
    plan->frequencies = calloc((size_t)spec->n_ops, sizeof *plan->frequencies);
    plan->packed = calloc((size_t)spec->n_weights, sizeof *plan->packed);
    plan->order = has_experts(spec) ? new_order(spec) : NULL;
    plan->spec.kv = plan->kv;
    plan->spec.ops = plan->ops;
    plan->spec.buffers = plan->buffers;
    plan->spec.weights = plan->weights;
    bool ok = plan->kv != NULL && plan->windows != NULL && plan->ops != NULL &&
              plan->buffers != NULL && plan->weights != NULL && plan->frequencies != NULL &&
              plan->packed != NULL && (plan->order != NULL || !has_experts(spec));
    for (int32_t i = 0; ok && i < spec->n_weights; i++) {
        const edge_weight *w = &plan->weights[i];
        if (w->layout != EDGE_LAYOUT_VECTOR) {
            plan->packed[i] = (packed_weight){panel_bytes(w->layout, w->k), grid_of(w->layout)};
        }
    }
    for (int32_t i = 0; ok && i < spec->n_ops; i++) {
        if (plan->ops[i].kind == EDGE_OP_ANGLES) {
            plan->frequencies[i] = frequencies_of(plan, &plan->ops[i]);
            ok = plan->frequencies[i] != NULL;
        }
    }
    if (!ok) {
        edge_plan_free(plan);
        return fail(error, EDGE_NO_MEMORY, "no memory for a plan of %d ops", spec->n_ops);
    }
    *out = plan;
    return EDGE_OK;
}

void edge_plan_free(edge_plan *plan) {
    if (plan == NULL) {
        return;
    }
    for (int32_t i = 0; plan->frequencies != NULL && i < plan->spec.n_ops; i++) {
        free(plan->frequencies[i]);
    }
    free(plan->frequencies);
    if (plan->order != NULL) {
        free(plan->order->numbers);
        free(plan->order);
    }
    free(plan->kv);
    free(plan->windows);
    free(plan->ops);
    free(plan->buffers);
    free(plan->weights);
    free(plan->packed);
    free(plan);
}

int32_t edge_plan_read(const edge_plan *plan, int32_t buffer, int32_t rows, float *dst) {
    if (plan == NULL || dst == NULL || buffer < 0 || buffer >= plan->spec.n_buffers ||
        plan->buffers[buffer].kind != EDGE_BUFFER_F32 || rows < 0 || rows > plan->spec.max_tokens) {
        return EDGE_BAD_ARGUMENT;
    }
    const edge_buffer *b = &plan->buffers[buffer];
    memcpy(dst, (uint8_t *)plan->spec.arena + b->offset, (size_t)rows * (size_t)b->dim * 4);
    return EDGE_OK;
}
