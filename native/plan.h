/* The plan as edge_run holds it. */
#ifndef EDGE_PLAN_H
#define EDGE_PLAN_H

#include "kernels/kernels.h"

/* What every tile needs of a weight, worked out once. */
typedef struct {
    int64_t panel_bytes;
    const struct grid_info *grid; /* NULL: none */
} packed_weight;

/* The pairs of a token and an expert, ordered by expert, then by token: what the last
 * EXPERT_COLUMNS made, for the ops behind it. */
typedef struct {
    int32_t n_experts, n_columns, n_active;
    int32_t *active;  /* (n_active), the experts that have columns, in ascending order */
    int32_t *first;   /* (n_experts + 1), the first column of each expert */
    int32_t *next;    /* (n_experts), while the order is made */
    int32_t *column;  /* (rows, n_used), of each pair */
    int32_t *row;     /* of each column: its token */
    int32_t *expert;  /* of each column */
    int32_t *numbers; /* all of the above in one block */
} expert_order;

struct edge_plan {
    edge_plan_spec spec; /* its arrays are our copies */
    const edge_kernels *kernels;
    edge_op *ops;
    edge_buffer *buffers;
    edge_weight *weights;
    packed_weight *packed; /* per weight */
    edge_kv_shape *kv;     /* per layer group */
    int32_t *windows;      /* per layer group: the largest of its ops, 0: one sees all */
    expert_order *order;   /* NULL: the plan has no experts */
    double **frequencies;  /* per op: n_rot / 2 radians per position for ANGLES, else NULL */
};

#endif
