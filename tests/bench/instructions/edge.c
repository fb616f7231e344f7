/* Runs a plan by libedge, between marks for plugin.c: edge PLAN PROMPT DECODE.
 *
 * PLAN is what instructions.py writes: an edge_plan_spec and all that it points to, pointers as
 * offsets into the file. One thread, the best instruction set that the CPU has. Prints its name
 * and where the library lies. Marks: 0 begins, 1 a prompt of PROMPT tokens has run, 2 DECODE
 * tokens behind it.
 */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge.h"

enum { MARK = 4242, VOCABULARY = 256, MOST_TOKENS = 2048 };

struct session {
    edge_plan *plan;
    edge_threads *threads;
    edge_kv kv;
    edge_kv_group group;
    float *logits;
};

static void fail(const char *what) {
    fprintf(stderr, "edge: %s\n", what);
    exit(1);
}

static void check(int32_t status, const edge_error *error) {
    if (status != EDGE_OK) fail(error->text);
}

static void *aligned(int64_t n_bytes) {
    void *block = NULL;
    if (posix_memalign(&block, 64, (size_t)n_bytes) != 0) fail("no memory");
    return memset(block, 0, (size_t)n_bytes);
}

/* The plan of a file, which stays mapped. */
static edge_plan_spec *read_spec(const char *path) {
    int file = open(path, O_RDONLY);
    struct stat size;
    if (file < 0 || fstat(file, &size) != 0) fail("PLAN does not open");
    char *base = mmap(NULL, (size_t)size.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (base == MAP_FAILED) fail("PLAN cannot be mapped");
    edge_plan_spec *spec = (edge_plan_spec *)base;
    edge_weight *weights = (edge_weight *)(base + (uintptr_t)spec->weights);
    for (int i = 0; i < spec->n_weights; i++) weights[i].data = base + (uintptr_t)weights[i].data;
    spec->weights = weights;
    spec->kv = (const edge_kv_shape *)(base + (uintptr_t)spec->kv);
    spec->ops = (const edge_op *)(base + (uintptr_t)spec->ops);
    spec->buffers = (const edge_buffer *)(base + (uintptr_t)spec->buffers);
    spec->arena = aligned(spec->arena_bytes);
    return spec;
}

static void step(struct session *s, const int32_t *tokens, int n, int start) {
    edge_step step = {.tokens = tokens, .n_tokens = n, .start = start, .n_logits = 1, .n_ops = -1};
    edge_error error;
    step.logits = s->logits;
    check(edge_run(s->plan, s->threads, &s->kv, &step, &error), &error);
}

static void run(struct session *s, int n_prompt, int n_decode) {
    int32_t tokens[MOST_TOKENS];
    for (int i = 0; i < n_prompt + n_decode; i++) tokens[i] = (7 + 13 * i) % VOCABULARY;
    syscall(MARK, 0);
    step(s, tokens, n_prompt, 0);
    syscall(MARK, 1);
    for (int i = 0; i < n_decode; i++) step(s, tokens + n_prompt + i, 1, n_prompt + i);
    syscall(MARK, 2);
}

/* The session's memory, as the plan wants it. */
static void set_up(struct session *s, const edge_plan_spec *spec, int n_tokens) {
    static void *pages[MOST_TOKENS];
    edge_error error;
    check(edge_threads_new(1, NULL, 0, &s->threads, &error), &error);
    check(edge_plan_new(spec, &s->plan, &error), &error);
    if (spec->n_kv_groups != 1) fail("PLAN has several layer groups");
    s->group.shape = spec->kv[0];
    s->group.n_pages = (n_tokens - 1) / edge_page_positions() + 1;
    s->group.pages = pages;
    s->kv.n_groups = 1;
    s->kv.groups = &s->group;
    for (int i = 0; i < s->group.n_pages; i++) pages[i] = aligned(edge_page_bytes(spec->kv));
    for (int i = 0; i < spec->n_buffers; i++)
        if (spec->buffers[i].kind == EDGE_BUFFER_LOGITS)
            s->logits = aligned(spec->buffers[i].dim * (int64_t)sizeof(float));
}

int main(int argc, char **argv) {
    if (argc != 4) fail("edge PLAN PROMPT DECODE");
    int n_prompt = atoi(argv[2]), n_decode = atoi(argv[3]);
    if (n_prompt < 1 || n_decode < 1 || n_prompt + n_decode > MOST_TOKENS)
        fail("PROMPT and DECODE are out of range");
    edge_plan_spec *spec = read_spec(argv[1]);
    for (int i = 0; edge_isa_name(i) != NULL; i++)
        if (edge_isa_usable(i)) spec->isa = i;
    struct session s = {0};
    set_up(&s, spec, n_prompt + n_decode);
    Dl_info library;
    if (dladdr((void *)edge_version, &library) == 0) fail("the library is not to be found");
    printf("%s %lx\n", edge_isa_name(spec->isa), (unsigned long)library.dli_fbase);
    fflush(stdout);
    run(&s, n_prompt, n_decode);
    return 0;
}
