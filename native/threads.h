/* Threads that work on one job at a time, and whose finished work is counted. */
#ifndef EDGE_THREADS_H
#define EDGE_THREADS_H

#include <stdint.h>

#include "api.h"

/* A job is a row of stages, each split into chunks that any thread may take. A stage starts when
 * every chunk of the one before is done. chunks() is called by one thread between stages. */
typedef struct {
    uint32_t n_stages;
    uint32_t (*chunks)(void *context, uint32_t stage);
    void (*run)(void *context, uint32_t stage, uint32_t chunk);
    void *context;
} threads_job;

/* Runs the job on these threads and the caller's; returns when all stages are done. */
void threads_run(edge_threads *threads, const threads_job *job);
int32_t threads_count(const edge_threads *threads);

#endif
