/* Persistent threads that hand out chunks by one atomic word.
 *
 * A barrier that waits for every thread is at the mercy of the scheduler: one descheduled thread
 * stops all. Here a stage ends when its chunks are done, so that only a thread that holds a chunk
 * can delay the others, and whoever finishes the last chunk opens the next stage without waiting.
 *
 * ticket = epoch << 32 | chunks left to take. The epoch rises with every stage and never repeats
 * within 2^32 stages, so a late compare-and-swap cannot take a chunk of another stage.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "affinity.h"
#include "cpu.h"
#include "error.h"
#include "pool.h"

enum { SPINS = 3000, MAX_THREADS = 256 };

struct edge_pool {
    int32_t n_threads;
    int32_t n_started;
    pthread_t *threads;
    bool is_kept; /* on `cpus` */
    cpu_mask cpus;
    int32_t refused; /* the last errno of keeping them there, 0: none */
    const pool_job *job;
    uint32_t base; /* epoch of the job's first stage */
    _Atomic uint64_t ticket;
    _Atomic uint32_t unfinished; /* chunks of this stage that are not done */
    _Atomic int32_t sleepers;
    _Atomic int32_t closing;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pid_t owner; /* a forked child has the pool but not its threads */
};

static void publish(edge_pool *pool, uint64_t ticket) {
    atomic_store(&pool->ticket, ticket);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->changed);
        pthread_mutex_unlock(&pool->mutex);
    }
}

/* Opens the first stage at or after `stage` that has several chunks; past the last, the job is
 * over. A stage of one chunk is run here and now: handing it out would only cost the time that a
 * word needs to travel between cores, and most stages of a decoded token are such. */
static void open_stage(edge_pool *pool, uint32_t stage) {
    const pool_job *job = pool->job;
    uint32_t n = 0;
    for (; stage < job->n_stages && (n = job->chunks(job->context, stage)) <= 1; stage++) {
        if (n == 1) {
            job->run(job->context, stage, 0);
        }
    }
    n = stage < job->n_stages ? n : 0;
    atomic_store_explicit(&pool->unfinished, n, memory_order_relaxed);
    publish(pool, (uint64_t)(pool->base + stage) << 32 | n);
}

/* Takes and runs one chunk; 0 when there was none to take in the epoch of `seen`. */
static int take(edge_pool *pool, uint64_t seen) {
    while ((uint32_t)seen > 0) {
        if (!atomic_compare_exchange_weak(&pool->ticket, &seen, seen - 1)) {
            continue;
        }
        /* The chunk is ours, so the job cannot end before we are done with it. */
        uint32_t stage = (uint32_t)(seen >> 32) - pool->base;
        pool->job->run(pool->job->context, stage, (uint32_t)seen - 1);
        if (atomic_fetch_sub(&pool->unfinished, 1) == 1) {
            open_stage(pool, stage + 1);
        }
        return 1;
    }
    return 0;
}

/* Waits until the ticket is no longer `seen`: spins for a while, then sleeps. */
static void await_change(edge_pool *pool, uint64_t seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->ticket, memory_order_acquire) != seen) {
            return;
        }
        cpu_pause();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->ticket) == seen && !atomic_load(&pool->closing)) {
        pthread_cond_wait(&pool->changed, &pool->mutex);
    }
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *work(void *argument) {
    edge_pool *pool = argument;
    cpu_float_mode();
    while (!atomic_load(&pool->closing)) {
        uint64_t seen = atomic_load(&pool->ticket);
        if (!take(pool, seen)) {
            await_change(pool, seen);
        }
    }
    return NULL;
}

/* Moves the calling thread onto the pool's CPUs; false: there is nothing to undo. */
static bool enter_cpus(edge_pool *pool, cpu_mask *was) {
    if (!pool->is_kept) {
        return false;
    }
    int32_t status = affinity_get(was);
    status = status != 0 ? status : affinity_set(&pool->cpus);
    pool->refused = status != 0 ? status : pool->refused;
    return status == 0;
}

static void leave_cpus(edge_pool *pool, const cpu_mask *was) {
    const int32_t status = affinity_set(was);
    pool->refused = status != 0 ? status : pool->refused;
}

/* The caller's thread works like the others and must not do so on a slow core; it is the caller's,
 * so what it may run on is put back after each run. */
void pool_run(edge_pool *pool, const pool_job *job) {
    cpu_mask was;
    const bool entered = enter_cpus(pool, &was);
    uint32_t mode = cpu_float_mode();
    pool->job = job;
    pool->base = (uint32_t)(atomic_load(&pool->ticket) >> 32) + 1;
    open_stage(pool, 0);
    for (;;) {
        uint64_t seen = atomic_load(&pool->ticket);
        if ((uint32_t)(seen >> 32) - pool->base >= job->n_stages) {
            break;
        }
        if (!take(pool, seen)) {
            await_change(pool, seen);
        }
    }
    cpu_float_restore(mode);
    if (entered) {
        leave_cpus(pool, &was);
    }
}

int32_t pool_threads(const edge_pool *pool) { return pool->n_threads; }

/* A new thread may run where the one that starts it may: so all of them are started from the
 * pool's CPUs, and whether that is allowed is known at once. */
static int32_t start_threads(edge_pool *pool) {
    cpu_mask was;
    const bool entered = enter_cpus(pool, &was);
    for (int32_t i = 1; i < pool->n_threads; i++) {
        if (pthread_create(&pool->threads[i], NULL, work, pool) != 0) {
            break;
        }
        pool->n_started++;
    }
    if (entered) {
        leave_cpus(pool, &was);
    }
    return pool->n_started + 1;
}

static int32_t check_pool(int32_t n_threads, const int32_t *cpus, int32_t n_cpus,
                          edge_error *error) {
    if (n_threads < 1 || n_threads > MAX_THREADS) {
        return fail(error, EDGE_BAD_ARGUMENT, "%d threads: from 1 to %d", n_threads, MAX_THREADS);
    }
    if (n_cpus < 0 || (n_cpus > 0 && cpus == NULL)) {
        return fail(error, EDGE_BAD_ARGUMENT, "a list of %d CPUs", n_cpus);
    }
    for (int32_t i = 0; i < n_cpus; i++) {
        if (cpus[i] < 0 || cpus[i] >= MAX_CPUS) {
            return fail(error, EDGE_BAD_ARGUMENT, "CPU %d: from 0 to %d", cpus[i], MAX_CPUS - 1);
        }
    }
    return EDGE_OK;
}

int32_t edge_pool_new(int32_t n_threads, const int32_t *cpus, int32_t n_cpus, edge_pool **out,
                      edge_error *error) {
    const int32_t status = check_pool(n_threads, cpus, n_cpus, error);
    if (status != EDGE_OK || out == NULL) {
        return status != EDGE_OK ? status : fail(error, EDGE_BAD_ARGUMENT, "a null pointer");
    }
    edge_pool *pool = calloc(1, sizeof *pool);
    pthread_t *threads = calloc((size_t)n_threads, sizeof *threads);
    if (pool == NULL || threads == NULL) {
        free(pool);
        free(threads);
        return fail(error, EDGE_NO_MEMORY, "no memory for %d threads", n_threads);
    }
    pool->n_threads = n_threads;
    pool->threads = threads;
    pool->is_kept = n_cpus > 0;
    for (int32_t i = 0; i < n_cpus; i++) {
        mask_add(&pool->cpus, cpus[i]);
    }
    pool->owner = getpid();
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->changed, NULL);
    const int32_t n = start_threads(pool);
    if (n < n_threads) {
        edge_pool_free(pool);
        return fail(error, EDGE_NO_THREADS, "the system refused thread %d of %d", n + 1, n_threads);
    }
    *out = pool;
    return EDGE_OK;
}

int32_t edge_pool_refused(const edge_pool *pool) { return pool == NULL ? 0 : pool->refused; }

void edge_pool_free(edge_pool *pool) {
    if (pool == NULL) {
        return;
    }
    if (pool->owner == getpid()) {
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->closing, 1);
        pthread_cond_broadcast(&pool->changed);
        pthread_mutex_unlock(&pool->mutex);
        for (int32_t i = 1; i <= pool->n_started; i++) {
            pthread_join(pool->threads[i], NULL);
        }
        pthread_cond_destroy(&pool->changed);
        pthread_mutex_destroy(&pool->mutex);
    }
    free(pool->threads);
    free(pool);
}
