#include "kv.h"

#include <stddef.h>

const char *edge_kv_type_name(int32_t type) {
    return type >= 0 && type < EDGE_N_KV_TYPES ? kv_type_table[type].name : NULL;
}

int32_t edge_page_positions(void) { return PAGE_POSITIONS; }

int64_t edge_page_bytes(const edge_kv_shape *shape) {
    const edge_kv_shape *s = shape;
    if (s == NULL || s->type < 0 || s->type >= EDGE_N_KV_TYPES || s->n_layers < 1 ||
        s->n_layers > 4096 || s->n_kv_heads < 1 || s->n_kv_heads > 4096 || s->head_dim < 16 ||
        s->head_dim > MAX_HEAD_DIM || s->head_dim % (s->type == EDGE_KV_F16 ? 16 : GROUP) != 0) {
        return -1;
    }
    return (int64_t)s->n_layers * s->n_kv_heads * kv_head_bytes(s->type, s->head_dim);
}
