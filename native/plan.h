/* The plan as edge_run holds it. */
#ifndef EDGE_PLAN_H
#define EDGE_PLAN_H

#include "kernels/kernels.h"

/* What every tile needs of a weight, worked out once. */
typedef struct {
    int64_t panel_bytes;
    const struct grid_info *grid; /* NULL: none */
} packed_weight;

struct edge_plan {
    edge_plan_spec spec; /* its arrays are our copies */
    const edge_kernels *kernels;
    edge_op *ops;
    edge_buffer *buffers;
    edge_weight *weights;
    packed_weight *packed; /* per weight */
    edge_kv_shape *kv;     /* per layer group */
    int32_t *windows;      /* per layer group: the largest of its ops, 0: one sees all */
    double **frequencies;  /* per op: n_rot / 2 radians per position for ANGLES, else NULL */
};

#endif
