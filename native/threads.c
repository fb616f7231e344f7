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
#include "threads.h"

enum { SPINS = 3000, MAX_THREADS = 256 };

struct edge_threads {
    int32_t n_threads;
    int32_t n_started;
    pthread_t *handles;
    bool is_kept; /* on `cpus` */
    cpu_mask cpus;
    int32_t refused; /* the last errno of keeping them there, 0: none */
    const threads_job *job;
    uint32_t base; /* epoch of the job's first stage */
    _Atomic uint64_t ticket;
    _Atomic uint32_t unfinished; /* chunks of this stage that are not done */
    _Atomic int32_t sleepers;
    _Atomic int32_t closing;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pid_t owner; /* a forked child has this but no threads */
};

static void publish(edge_threads *threads, uint64_t ticket) {
    atomic_store(&threads->ticket, ticket);
    if (atomic_load(&threads->sleepers) > 0) {
        pthread_mutex_lock(&threads->mutex);
        pthread_cond_broadcast(&threads->changed);
        pthread_mutex_unlock(&threads->mutex);
    }
}

/* Opens the first stage at or after `stage` that has several chunks; past the last, the job is
 * over. A stage of one chunk is run here and now: handing it out would only cost the time that a
 * word needs to travel between cores, and most stages of a decoded token are such. */
static void open_stage(edge_threads *threads, uint32_t stage) {
    const threads_job *job = threads->job;
    uint32_t n = 0;
    for (; stage < job->n_stages && (n = job->chunks(job->context, stage)) <= 1; stage++) {
        if (n == 1) {
            job->run(job->context, stage, 0);
        }
    }
    n = stage < job->n_stages ? n : 0;
    atomic_store_explicit(&threads->unfinished, n, memory_order_relaxed);
    publish(threads, (uint64_t)(threads->base + stage) << 32 | n);
}

/* Takes and runs one chunk; 0 when there was none to take in the epoch of `seen`. */
static int take(edge_threads *threads, uint64_t seen) {
    while ((uint32_t)seen > 0) {
        if (!atomic_compare_exchange_weak(&threads->ticket, &seen, seen - 1)) {
            continue;
        }
        /* The chunk is ours, so the job cannot end before we are done with it. */
        uint32_t stage = (uint32_t)(seen >> 32) - threads->base;
        threads->job->run(threads->job->context, stage, (uint32_t)seen - 1);
        if (atomic_fetch_sub(&threads->unfinished, 1) == 1) {
            open_stage(threads, stage + 1);
        }
        return 1;
    }
    return 0;
}

/* Waits until the ticket is no longer `seen`: spins for a while, then sleeps. */
static void await_change(edge_threads *threads, uint64_t seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&threads->ticket, memory_order_acquire) != seen) {
            return;
        }
        cpu_pause();
    }
    pthread_mutex_lock(&threads->mutex);
    atomic_fetch_add(&threads->sleepers, 1);
    while (atomic_load(&threads->ticket) == seen && !atomic_load(&threads->closing)) {
        pthread_cond_wait(&threads->changed, &threads->mutex);
    }
    atomic_fetch_sub(&threads->sleepers, 1);
    pthread_mutex_unlock(&threads->mutex);
}

static void *work(void *argument) {
    edge_threads *threads = argument;
    cpu_float_mode();
    while (!atomic_load(&threads->closing)) {
        uint64_t seen = atomic_load(&threads->ticket);
        if (!take(threads, seen)) {
            await_change(threads, seen);
        }
    }
    return NULL;
}

/* Moves the calling thread onto `cpus`; false: there is nothing to undo. */
static bool enter_cpus(edge_threads *threads, cpu_mask *was) {
    if (!threads->is_kept) {
        return false;
    }
    int32_t status = affinity_get(was);
    status = status != 0 ? status : affinity_set(&threads->cpus);
    threads->refused = status != 0 ? status : threads->refused;
    return status == 0;
}

static void leave_cpus(edge_threads *threads, const cpu_mask *was) {
    const int32_t status = affinity_set(was);
    threads->refused = status != 0 ? status : threads->refused;
}

/* The caller's thread works like the others and must not do so on a slow core; it is the caller's,
 * so what it may run on is put back after each run. */
void threads_run(edge_threads *threads, const threads_job *job) {
    cpu_mask was;
    const bool entered = enter_cpus(threads, &was);
    uint32_t mode = cpu_float_mode();
    threads->job = job;
    threads->base = (uint32_t)(atomic_load(&threads->ticket) >> 32) + 1;
    open_stage(threads, 0);
    for (;;) {
        uint64_t seen = atomic_load(&threads->ticket);
        if ((uint32_t)(seen >> 32) - threads->base >= job->n_stages) {
            break;
        }
        if (!take(threads, seen)) {
            await_change(threads, seen);
        }
    }
    cpu_float_restore(mode);
    if (entered) {
        leave_cpus(threads, &was);
    }
}

int32_t threads_count(const edge_threads *threads) { return threads->n_threads; }

/* A new thread may run where the one that starts it may: so all of them are started from
 * `cpus`, and whether that is allowed is known at once. */
static int32_t start_threads(edge_threads *threads) {
    cpu_mask was;
    const bool entered = enter_cpus(threads, &was);
    for (int32_t i = 1; i < threads->n_threads; i++) {
        if (pthread_create(&threads->handles[i], NULL, work, threads) != 0) {
            break;
        }
        threads->n_started++;
    }
    if (entered) {
        leave_cpus(threads, &was);
    }
    return threads->n_started + 1;
}

static int32_t check_threads(int32_t n_threads, const int32_t *cpus, int32_t n_cpus,
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

int32_t edge_threads_new(int32_t n_threads, const int32_t *cpus, int32_t n_cpus, edge_threads **out,
                         edge_error *error) {
    const int32_t status = check_threads(n_threads, cpus, n_cpus, error);
    if (status != EDGE_OK || out == NULL) {
        return status != EDGE_OK ? status : fail(error, EDGE_BAD_ARGUMENT, "a null pointer");
    }
    edge_threads *threads = calloc(1, sizeof *threads);
    pthread_t *handles = calloc((size_t)n_threads, sizeof *handles);
    if (threads == NULL || handles == NULL) {
        free(threads);
        free(handles);
        return fail(error, EDGE_NO_MEMORY, "no memory for %d threads", n_threads);
    }
    threads->n_threads = n_threads;
    threads->handles = handles;
    threads->is_kept = n_cpus > 0;
    for (int32_t i = 0; i < n_cpus; i++) {
        mask_add(&threads->cpus, cpus[i]);
    }
    threads->owner = getpid();
    pthread_mutex_init(&threads->mutex, NULL);
    pthread_cond_init(&threads->changed, NULL);
    const int32_t n = start_threads(threads);
    if (n < n_threads) {
        edge_threads_free(threads);
        return fail(error, EDGE_NO_THREADS, "the system refused thread %d of %d", n + 1, n_threads);
    }
    *out = threads;
    return EDGE_OK;
}

int32_t edge_threads_refused(const edge_threads *threads) {
    return threads == NULL ? 0 : threads->refused;
}

void edge_threads_free(edge_threads *threads) {
    if (threads == NULL) {
        return;
    }
    if (threads->owner == getpid()) {
        pthread_mutex_lock(&threads->mutex);
        atomic_store(&threads->closing, 1);
        pthread_cond_broadcast(&threads->changed);
        pthread_mutex_unlock(&threads->mutex);
        for (int32_t i = 1; i <= threads->n_started; i++) {
            pthread_join(threads->handles[i], NULL);
        }
        pthread_cond_destroy(&threads->changed);
        pthread_mutex_destroy(&threads->mutex);
    }
    free(threads->handles);
    free(threads);
}
