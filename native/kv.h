/* The KV cache: pages of PAGE_POSITIONS positions, all layers and key heads of a position together.
 *
 * page = [n_layers][n_kv_heads] x one of
 *   f16   f16 keys[4][head_dim][16] | f16 values[64][head_dim]
 * Keys lie in panels of 16 positions so that a lane is a position: a score needs no horizontal
 * sum, as a matmul panel needs none. */
#ifndef EDGE_KV_H
#define EDGE_KV_H

#include "api.h"
#include "layouts.h"

/* Bytes of the keys of one layer and head in a page; its values lie behind them. */
static inline int64_t kv_key_bytes(int32_t head_dim) {
    return 2 * (int64_t)PAGE_POSITIONS * head_dim;
}

/* Bytes of one layer and head in a page. */
static inline int64_t kv_head_bytes(const edge_kv_shape *shape) {
    return 2 * kv_key_bytes(shape->head_dim);
}

/* The first page behind the sinks that a position in page i sees. */
static inline int32_t kv_first_page(const edge_kv *kv, int32_t i) {
    return kv->window_pages > 0 && i >= kv->window_pages ? i - kv->window_pages + 1 : 0;
}

#endif
