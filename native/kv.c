#include "kv.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

/* float16 numbers that one page keeps for one layer and head. */
static int64_t head_halves(int32_t head_dim) { return 2 * (int64_t)PAGE_POSITIONS * head_dim; }

static int64_t page_bytes(int32_t n_layers, int32_t n_kv_heads, int32_t head_dim) {
    return (int64_t)n_layers * n_kv_heads * head_halves(head_dim) * 2;
}

static int32_t pages_for(int32_t n_positions) {
    return n_positions / PAGE_POSITIONS + (n_positions % PAGE_POSITIONS != 0);
}

int64_t edge_cache_bytes(int32_t n_layers, int32_t n_kv_heads, int32_t head_dim,
                         int32_t n_positions) {
    return pages_for(n_positions) * page_bytes(n_layers, n_kv_heads, head_dim);
}

int32_t edge_cache_new(int32_t n_layers, int32_t n_kv_heads, int32_t head_dim, int32_t n_positions,
                       edge_cache **out, edge_error *error) {
    if (out == NULL || n_layers < 1 || n_layers > 4096 || n_kv_heads < 1 || n_kv_heads > 4096 ||
        head_dim < 16 || head_dim > MAX_HEAD_DIM || head_dim % 16 != 0 || n_positions < 1) {
        return fail(error, EDGE_BAD_ARGUMENT, "a cache of %d layers, %d heads of %d, %d positions",
                    n_layers, n_kv_heads, head_dim, n_positions);
    }
    edge_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL) {
        return fail(error, EDGE_NO_MEMORY, "no memory for a cache");
    }
    cache->n_layers = n_layers;
    cache->n_kv_heads = n_kv_heads;
    cache->head_dim = head_dim;
    cache->n_positions = n_positions;
    cache->max_pages = pages_for(n_positions);
    cache->table = calloc((size_t)n_layers * (size_t)n_kv_heads * (size_t)cache->max_pages,
                          sizeof *cache->table);
    cache->pages = calloc((size_t)cache->max_pages, sizeof *cache->pages);
    if (cache->table == NULL || cache->pages == NULL) {
        edge_cache_free(cache);
        return fail(error, EDGE_NO_MEMORY, "no memory for the page tables of %d positions",
                    n_positions);
    }
    *out = cache;
    return EDGE_OK;
}

int32_t edge_cache_reserve(edge_cache *cache, int32_t n_positions, edge_error *error) {
    if (cache == NULL || n_positions < 0 || n_positions > cache->n_positions) {
        return fail(error, EDGE_BAD_ARGUMENT, "%d positions do not fit the cache", n_positions);
    }
    const int64_t bytes = page_bytes(cache->n_layers, cache->n_kv_heads, cache->head_dim);
    while (cache->n_pages < pages_for(n_positions)) {
        void *memory = NULL;
        if (posix_memalign(&memory, 64, (size_t)bytes) != 0) {
            return fail(error, EDGE_NO_MEMORY, "no memory for a cache page of %lld bytes",
                        (long long)bytes);
        }
        memset(memory, 0, (size_t)bytes);
        uint16_t *page = memory;
        cache->pages[cache->n_pages] = page;
        for (int64_t i = 0; i < (int64_t)cache->n_layers * cache->n_kv_heads; i++) {
            kv_page *entry = &cache->table[i * cache->max_pages + cache->n_pages];
            entry->keys = page + i * head_halves(cache->head_dim);
            entry->values = entry->keys + (int64_t)PAGE_POSITIONS * cache->head_dim;
        }
        cache->n_pages++;
    }
    return EDGE_OK;
}

void edge_cache_free(edge_cache *cache) {
    if (cache == NULL) {
        return;
    }
    for (int32_t i = 0; cache->pages != NULL && i < cache->n_pages; i++) {
        free(cache->pages[i]);
    }
    free(cache->pages);
    free(cache->table);
    free(cache);
}
