/* A thread pool that counts finished work, not arrived threads. */
#ifndef EDGE_POOL_H
#define EDGE_POOL_H

#include <stdint.h>

#include "api.h"

/* A job is a row of stages, each split into chunks that any thread may take. A stage starts when
 * every chunk of the one before is done. chunks() is called by one thread between stages. */
typedef struct {
    uint32_t n_stages;
    uint32_t (*chunks)(void *context, uint32_t stage);
    void (*run)(void *context, uint32_t stage, uint32_t chunk);
    void *context;
} pool_job;

/* Runs the job on the pool's threads and the caller's; returns when all stages are done. */
void pool_run(edge_pool *pool, const pool_job *job);
int32_t pool_threads(const edge_pool *pool);

#endif
