/* Runs a model by llama.cpp, between marks for plugin.c: llama FOLDER MODEL PROMPT DECODE.
 *
 * FOLDER holds llama.cpp's libraries. One thread; all else by default: flash attention where it
 * can, keys and values in f16. Its log says which library it took for the CPU. Marks: 0 begins,
 * 1 a prompt of PROMPT tokens has run, 2 DECODE tokens behind it.
 *
 * Declared by hand, of llama.cpp 0.5, as far as they are set: structs of that size travel by
 * reference, so `rest` may be longer than what is there.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MARK = 4242, VOCABULARY = 256, MOST_TOKENS = 512 };

struct model_params {
    uint64_t rest[64];
};
struct context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch;
    int32_t ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
    uint64_t rest[64];
};
struct batch {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos, *n_seq_id, **seq_id;
    int8_t *logits;
};

const char *llama_version(void);
void llama_backend_init(void);
void ggml_backend_load_all_from_path(const char *folder);
struct model_params llama_model_default_params(void);
struct context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, struct model_params params);
void *llama_init_from_model(void *model, struct context_params params);
struct batch llama_batch_get_one(int32_t *tokens, int32_t n);
int32_t llama_decode(void *context, struct batch batch);

static void fail(const char *what) {
    fprintf(stderr, "llama: %s\n", what);
    exit(1);
}

static void run(void *context, int n_prompt, int n_decode) {
    int32_t tokens[MOST_TOKENS];
    for (int i = 0; i < n_prompt + n_decode; i++) tokens[i] = (7 + 13 * i) % VOCABULARY;
    syscall(MARK, 0);
    if (llama_decode(context, llama_batch_get_one(tokens, n_prompt)) != 0)
        fail("the prompt did not run");
    syscall(MARK, 1);
    for (int i = 0; i < n_decode; i++)
        if (llama_decode(context, llama_batch_get_one(tokens + n_prompt + i, 1)) != 0)
            fail("decoding did not run");
    syscall(MARK, 2);
}

int main(int argc, char **argv) {
    if (argc != 5) fail("llama FOLDER MODEL PROMPT DECODE");
    int n_prompt = atoi(argv[3]), n_decode = atoi(argv[4]);
    if (n_prompt < 1 || n_decode < 1 || n_prompt + n_decode > MOST_TOKENS)
        fail("PROMPT and DECODE are out of range");
    if (strncmp(llama_version(), "0.5.", 4) != 0) fail(llama_version());
    ggml_backend_load_all_from_path(argv[1]);
    llama_backend_init();
    void *model = llama_model_load_from_file(argv[2], llama_model_default_params());
    if (model == NULL) fail("the model does not load");
    struct context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = MOST_TOKENS;
    params.n_threads = params.n_threads_batch = 1;
    void *context = llama_init_from_model(model, params);
    if (context == NULL) fail("no context");
    run(context, n_prompt, n_decode);
    return 0;
}
