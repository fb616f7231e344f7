/* The KV cache: pages of PAGE_POSITIONS positions, all layers and heads of a position together.
 *
 * page = [n_layers][n_kv_heads] x { keys [4][head_dim][16] f16 | values [64][head_dim] f16 }
 * Keys lie in panels of 16 positions so that a lane is a position: a score needs no horizontal
 * sum, as a matmul panel needs none. */
#ifndef EDGE_KV_H
#define EDGE_KV_H

#include "kernels/kernels.h"
#include "layouts.h"

struct edge_cache {
    int32_t n_layers, n_kv_heads, head_dim;
    int32_t n_positions; /* limit */
    int32_t n_pages, max_pages;
    /* [n_layers][n_kv_heads][max_pages]: where each page keeps that layer and head. */
    kv_page *table;
    uint16_t **pages;
};

/* The pages of one layer and head, from position 0. */
static inline const kv_page *cache_pages(const edge_cache *cache, int32_t layer,
                                         int32_t i_kv_head) {
    return cache->table + ((int64_t)layer * cache->n_kv_heads + i_kv_head) * cache->max_pages;
}

#endif
