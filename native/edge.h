/* The whole C API. cffi reads this file as it is: declarations only, no macros, no #if.
 *
 * Sizes: m tokens, n output rows, k shared dimension, in elements; _bytes in bytes.
 * Functions that can fail return an edge_status and fill *error when it is not NULL.
 * Nothing here keeps a pointer longer than it says. Nothing prints or exits, except what
 * edge_exit_on_bus_error sets up.
 */

typedef enum {
    EDGE_OK = 0,
    EDGE_BAD_ARGUMENT = 1, /* the caller's mistake: a null pointer, a size out of range */
    EDGE_BAD_PLAN = 2,     /* the plan contradicts itself; error->op says where */
    EDGE_BAD_DATA = 3,     /* a weight holds NaN or infinity; error->row, error->column */
    EDGE_NO_MEMORY = 4,
    EDGE_CANCELLED = 5,
    EDGE_NOT_FINITE = 6, /* the logits came out NaN or infinite */
    EDGE_BAD_TOKEN = 7,  /* a token id outside the vocabulary; error->row is its index */
    EDGE_NO_THREADS = 8  /* the system refuses another thread */
} edge_status;

typedef struct {
    int32_t code;   /* edge_status */
    int32_t op;     /* index into the plan, -1: none */
    int64_t row;    /* -1: none */
    int64_t column; /* -1: none */
    char text[160]; /* what is wrong, one line */
} edge_error;

/* The version of this library; it must equal the Python package's. */
const char *edge_version(void);

/* From now on a bus error writes text, at most 256 bytes of it, to stderr and ends the process with
 * code 1. A bus error means that a mapped file was cut short, or that its disk fails. For programs,
 * not for libraries. Does nothing on Windows, where mapped files cannot be cut short. */
void edge_exit_on_bus_error(const char *text);

/* ---- instruction sets -------------------------------------------------------------------- */

/* The name of the i-th instruction set compiled in, from the plainest up; NULL past the end. */
const char *edge_isa_name(int32_t i);
/* 1 when this CPU and operating system can run it, else 0. */
int32_t edge_isa_usable(int32_t i);

/* 1 when the i-th is usable and has an instruction for bfloat16 dot products, else 0. */
int32_t edge_isa_has_bf16(int32_t i);

/* ---- threads ----------------------------------------------------------------------------- */

typedef struct edge_threads edge_threads;

/* n_threads: threads that work in a run, the caller's own included; 1..256.
 * cpus: n_cpus numbers from 0 to 1023, as the system counts them. The threads run on these CPUs
 * alone, the caller's only while a run lasts. n_cpus 0: on any CPU. When the system refuses, runs
 * go on anywhere, and edge_threads_refused says so. */
int32_t edge_threads_new(int32_t n_threads, const int32_t *cpus, int32_t n_cpus,
                         edge_threads **threads, edge_error *error);
/* The errno of the system's last refusal to keep the threads on their CPUs; 0: none. */
int32_t edge_threads_refused(const edge_threads *threads);
void edge_threads_free(edge_threads *threads);

/* ---- weights ----------------------------------------------------------------------------- */

/* Panels of 16 rows, drawn in layouts.h; VECTOR: k floats as they are (norm weights, rotary
 * factors), n = 1. c<bits>[m]<scale kind><group>; g<index bits>x<weights>: indices into a grid. */
typedef enum {
    EDGE_LAYOUT_VECTOR = -1,
    EDGE_LAYOUT_F32 = 0,
    EDGE_LAYOUT_F16,
    EDGE_LAYOUT_BF16,
    EDGE_LAYOUT_C4H32,
    EDGE_LAYOUT_C4MH32,
    EDGE_LAYOUT_C5H32,
    EDGE_LAYOUT_C5MH32,
    EDGE_LAYOUT_C8H32,
    EDGE_LAYOUT_C4E32,
    EDGE_LAYOUT_C2B32,
    EDGE_LAYOUT_C2MB16,
    EDGE_LAYOUT_C3B32,
    EDGE_LAYOUT_C3B16,
    EDGE_LAYOUT_C4B32,
    EDGE_LAYOUT_C4MB32,
    EDGE_LAYOUT_C5MB32,
    EDGE_LAYOUT_C6B16,
    EDGE_LAYOUT_G8X4B32,
    EDGE_LAYOUT_G9X4B32,
    EDGE_LAYOUT_G8X8B32,
    EDGE_LAYOUT_G9X8B16,
    EDGE_LAYOUT_G10X8B16,
    EDGE_LAYOUT_C1H128,
    EDGE_LAYOUT_C2H64,
    EDGE_LAYOUT_C2H128,
    EDGE_LAYOUT_C4U16,
    EDGE_N_LAYOUTS
} edge_layout;

/* What a code stands for. */
typedef enum {
    EDGE_TABLE_NONE = 0, /* itself: with a minimum, or 8 bits with a sign */
    EDGE_TABLE_MINUS_1,  /* code - 1 */
    EDGE_TABLE_MINUS_4,
    EDGE_TABLE_MINUS_8,
    EDGE_TABLE_MINUS_16,
    EDGE_TABLE_MINUS_32,
    EDGE_TABLE_IQ4_NL, /* one of 16, or 8, signed values */
    EDGE_TABLE_IQ3_S,
    EDGE_TABLE_IQ3_XXS,
    EDGE_TABLE_IQ2,
    EDGE_TABLE_IQ1,
    EDGE_TABLE_MXFP4,
    EDGE_TABLE_SIGN, /* 2 code - 1 */
    EDGE_N_TABLES
} edge_table;

/* Types with a grid have two forms; for the others both are the same. */
typedef enum {
    EDGE_FORM_FAST = 0,   /* codes, decoded by a shuffle */
    EDGE_FORM_COMPACT = 1 /* the indices of the file, looked up in the kernel */
} edge_form;

/* One packed (n, k) matrix: ceil(n / 16) panels. data is 64-byte aligned and outlives the plan. */
typedef struct {
    int32_t layout;
    int32_t table;
    int64_t n, k;
    const void *data;
    int64_t n_bytes;
} edge_weight;

/* The name of a layout, as in "c4h32"; NULL past the end. */
const char *edge_layout_name(int32_t layout);

/* 1 when matmuls with this layout take Q8 or Q8X2 activations, 0 when they take F32. */
int32_t edge_layout_takes_q8(int32_t layout);

/* Rows of a panel. */
int32_t edge_panel_rows(void);

/* Bytes that the addresses of weights, pages and arenas, and offsets into an arena, are multiples
 * of: 64. */
int32_t edge_alignment(void);

/* How many weights of a row share a scale (and minimum): 16, 32, 64 or 128. 0: it holds floats. */
int32_t edge_layout_group(int32_t layout);

/* Rises whenever packed bytes change their meaning: files of packed weights carry it. */
int32_t edge_layout_version(void);

/* How a tensor of GGUF type number `type` is packed: fills layout, table, n, k and n_bytes, sets
 * data to NULL. EDGE_BAD_ARGUMENT for a type that has no layout, or k no multiple of its block. */
int32_t edge_weight_describe(int32_t type, int32_t form, int64_t n, int64_t k, edge_weight *weight,
                             edge_error *error);

/* Packs the disk blocks src, n rows of k, into weight->data, which has room for n_bytes. weight was
 * filled by edge_weight_describe with this type. EDGE_BAD_DATA for a scale or value that is NaN or
 * infinite: error->row is its row, error->column the first element of its block. */
int32_t edge_weight_pack(edge_threads *threads, int32_t type, edge_weight *weight, const void *src,
                         int64_t src_bytes, edge_error *error);

/* Rows row..row + n_rows - 1 as float32, dst of shape (n_rows, k): the values that the format's
 * reference dequantisation gives, bit for bit. */
int32_t edge_weight_unpack(const edge_weight *weight, int64_t row, int64_t n_rows, float *dst);

/* The same rows as integers: weight = scale * code + min, each operation rounded to float32, has
 * the bits that edge_weight_unpack gives. codes of shape (n_rows, k), scales and mins of shape
 * (n_rows, k / edge_layout_group); mins are -0 where the type has none. EDGE_BAD_ARGUMENT for
 * layouts of floats. */
int32_t edge_weight_codes(const edge_weight *weight, int64_t row, int64_t n_rows, int8_t *codes,
                          float *scales, float *mins);

/* All values that the codes of this weight can have, into values (256), some maybe twice. has_min:
 * 1 when the weight has minima, else 0. The weight may be described only, without data. Returns how
 * many values there are; 0 for layouts of floats. */
int32_t edge_weight_values(const edge_weight *weight, int8_t *values, int32_t *has_min);

/* A checksum of n_bytes into sum (2): the same for any number of threads and on every machine. It
 * finds damage, but whoever wants can make data with the same checksum. */
int32_t edge_checksum(edge_threads *threads, const void *data, int64_t n_bytes, uint64_t *sum);

/* The disk blocks src, n rows of k, as float32, dst of shape (n, k): the values of
 * edge_weight_unpack. EDGE_BAD_DATA as in edge_weight_pack. */
int32_t edge_decode(edge_threads *threads, int32_t type, const void *src, int64_t src_bytes,
                    int64_t n, int64_t k, float *dst, edge_error *error);

/* ---- encoding weights -------------------------------------------------------------------- */

/* Rounds float32 weights to blocks of one type. */
typedef struct edge_encoder edge_encoder;

/* 1 when GGUF type number `type` can be encoded, else 0. */
int32_t edge_can_encode(int32_t type);
/* 1 when it is encoded with an importance alone, else 0. */
int32_t edge_needs_importance(int32_t type);

/* An encoder of blocks of GGUF type number `type`, with the tables that its search needs.
 * EDGE_BAD_ARGUMENT for a type that cannot be encoded. */
int32_t edge_encoder_new(int32_t type, edge_encoder **encoder, edge_error *error);
void edge_encoder_free(edge_encoder *encoder);

/* Encodes x, (n, k), into dst, n rows of k weights in blocks. importance, (k): what the square of
 * an error counts in each column, at least 0; NULL: all count the same, or what the type's
 * reference takes instead. The bits are those of ggml's quantisers. EDGE_BAD_DATA for an x that is
 * NaN, infinite or beyond the range of the type, and an importance that is NaN, negative or 2^48 or
 * more: error->row (-1: of the importance), error->column, or the first of its block. */
int32_t edge_encode(edge_threads *threads, const edge_encoder *encoder, const float *x, int64_t n,
                    int64_t k, const float *importance, void *dst, int64_t dst_bytes,
                    edge_error *error);

/* Some columns of a weight, to be rounded with error feedback: see feedback.c. */
typedef struct {
    int64_t n;            /* rows */
    int32_t width;        /* columns: whole blocks of the type, at most 256 */
    const float *weights; /* (n, width) */
    /* (n, width). In: the weights, with the feedback from the columns on the left. Out: the errors,
     * weights - what the blocks stand for. */
    float *x;
    const float *shares; /* (width, width): [j, i], i < j: what column j takes of the error of i */
    const float *costs;  /* (width): what the square of an error that is left over costs */
    const float *importance;  /* (width): for the first choice of scales, as in edge_encode */
    const float *row_squares; /* (n): mean squares of the rows of the whole weight */
} edge_feedback;

/* Rounds these columns into dst, n rows of blocks. EDGE_BAD_DATA for weights that are NaN, infinite
 * or beyond the range of the type: error->row, error->column. */
int32_t edge_encode_feedback(edge_threads *threads, const edge_encoder *encoder,
                             const edge_feedback *columns, void *dst, int64_t dst_bytes,
                             edge_error *error);

/* ---- the KV cache ------------------------------------------------------------------------ */

/* How keys and values are kept, drawn in kv.h. */
typedef enum { EDGE_KV_F16 = 0, EDGE_KV_Q8, EDGE_KV_Q4, EDGE_N_KV_TYPES } edge_kv_type;

/* A page holds the keys and values of edge_page_positions() positions, of the layers of one group
 * and all their key heads. Layers of a group see the same positions and have the same shape. */
typedef struct {
    int32_t type; /* edge_kv_type */
    int32_t n_layers, n_kv_heads, head_dim;
} edge_kv_shape;

/* The name of a type, as in "f16"; NULL past the end. */
const char *edge_kv_type_name(int32_t type);
/* Positions of a page, of every type. */
int32_t edge_page_positions(void);
/* Bytes of a page, a multiple of 64; -1: a number is out of range, or the type cannot keep heads of
 * this size. */
int64_t edge_page_bytes(const edge_kv_shape *shape);

/* A group's pages of one session: position p lies in pages[p / edge_page_positions()].
 * A position in page i sees the pages below sink_pages and those above i - window_pages; with
 * window_pages 0 it sees all pages up to its own; of either what the op's window lets it. */
typedef struct {
    edge_kv_shape shape;
    int32_t n_pages; /* of the table */
    int32_t sink_pages, window_pages;
    void *const *pages; /* (n_pages), 64-byte aligned; NULL: no position of a run sees the page */
} edge_kv_group;

/* The cache of one session. */
typedef struct {
    int32_t n_groups; /* those of the plan */
    const edge_kv_group *groups;
} edge_kv;

/* ---- the plan ---------------------------------------------------------------------------- */

typedef enum {
    EDGE_BUFFER_F32 = 0,   /* float [rows][dim] in the arena */
    EDGE_BUFFER_Q8 = 1,    /* dim quantised per group of 32, columns in tiles: see layouts.h */
    EDGE_BUFFER_Q8X2 = 2,  /* the same, and a second column for what rounding took from the first */
    EDGE_BUFFER_LOGITS = 3 /* float [rows][dim], edge_step's; all have the same dim, n_vocab */
} edge_buffer_kind;

typedef struct {
    int32_t kind;
    int32_t dim;
    int32_t is_logit_rows; /* 1: rows are the tokens whose logits are wanted; 0: all tokens */
    int64_t offset;        /* into the arena, multiple of 64 */
} edge_buffer;

/* in, in2, out: buffers; w: weights. GATED_MATMUL takes two weights, gate and up, or one weight
 * that holds the rows of gate and then those of up. HEAD_NORM takes a vector of head_dim, for all
 * heads, or a matrix with a row for each head. */
typedef enum {
    EDGE_OP_EMBED = 0,        /* out = rows of w[0] by token */
    EDGE_OP_ANGLES = 1,       /* out = cos, sin [n_rot / 2][2] by position; w[0]: factors */
    EDGE_OP_NORM = 2,         /* out = norm(in) * w[0] (+ w[1]), quantised when out is Q8 or Q8X2 */
    EDGE_OP_QUANTIZE = 3,     /* out (Q8 or Q8X2) = in (F32) */
    EDGE_OP_MATMUL = 4,       /* out from `column` on = [w[0] in | w[1] in | w[2] in] (+ in2) */
    EDGE_OP_GATED_MATMUL = 5, /* out = activation(gate in) * (up in) */
    EDGE_OP_GATED = 6,        /* out = activation(gate) * up, in = [gate | up] */
    EDGE_OP_ADD = 7,          /* out = in + in2 */
    EDGE_OP_STORE = 8,        /* rotate q, k of in by in2 in place; k and v to the cache */
    EDGE_OP_ATTENTION = 9,    /* out = attention of q of in over the cache; w[0]: sinks */
    EDGE_OP_GATHER = 10,      /* out = the rows of in whose logits are wanted */
    EDGE_OP_ROTATE,           /* the first n_heads heads of in by in2, in place: out is in */
    EDGE_OP_TEMPERATURE,      /* the first n of in, times 1 + beta log(1 + position / length), in
                                 place: out is in */
    EDGE_OP_SPARSIFY,         /* out = in, but the first n elements max(0, x - mean - scale std) */
    EDGE_OP_RESCALE,          /* out = in, as large as in2; its mean square is at least eps */
    /* up to SOFTCAP out may be in, and both may be logits */
    EDGE_OP_HEAD_NORM, /* out = in, but norms of n_heads heads from `column` on (times w[0]) */
    EDGE_OP_BIAS,      /* out = in + [0 | w[0] | w[1] | w[2] | 0], w[0] from `column` on */
    EDGE_OP_GAIN,  /* out = in, but n elements from `column` on * w[0], of n elements or of one */
    EDGE_OP_SCALE, /* out = in * scale */
    EDGE_OP_ACTIVATE, /* out = activation(in) */
    EDGE_OP_XIELU,    /* out = xielu(in) with alpha_p, alpha_n, beta, eps */
    EDGE_OP_SOFTCAP,  /* out = softcap * tanh(in / softcap) */
    EDGE_OP_MULTIPLY, /* out = in * in2, of as many elements or of one */
    EDGE_OP_SLICE,    /* out = elements of in from `column` on */
    /* Experts. A pair is a token and one of its n_used experts; buffers of pairs have n_used times
     * the dim of one, and hold the pairs in columns ordered by expert, then by token. */
    EDGE_OP_ROUTE,          /* out = [n_used experts | their weights] by in, a score of each;
                               w[0]: added to the scores for the choice alone */
    EDGE_OP_EXPERT_COLUMNS, /* out = in for each pair, quantised when out is Q8; orders the pairs
                               by in2, which ROUTE made, for the ops that follow */
    EDGE_OP_EXPERT_MATMUL,  /* out from `column` on = [w[0] in | w[1] in] by each pair's expert */
    EDGE_OP_EXPERT_GAIN,    /* n elements from `column` on of each pair, times its expert's number
                               of w[0], in place: out is in */
    EDGE_OP_EXPERT_GATED,   /* out = activation(gate + w[0]) * (up + w[1]), in = [gate | up] */
    EDGE_OP_EXPERT_SUM,     /* out = sum of (in + w[0]) times the weights of in2, by token */
    EDGE_N_OPS
} edge_op_kind;

/* Formulas: edge/graph/ops.py. The last one is of GATED and GATED_MATMUL only. */
typedef enum {
    EDGE_ACTIVATION_SILU = 0,
    EDGE_ACTIVATION_GELU_TANH,
    EDGE_ACTIVATION_GELU_ERF,
    EDGE_ACTIVATION_RELU2,
    EDGE_ACTIVATION_SIGMOID,
    EDGE_ACTIVATION_TANH,
    EDGE_ACTIVATION_SWIGLU_OAI,
    EDGE_N_ACTIVATIONS
} edge_activation;

/* How the scores of experts become weights. */
typedef enum {
    EDGE_SCORE_GIVEN = 0,        /* as they are */
    EDGE_SCORE_SOFTMAX,          /* after a softmax over all experts */
    EDGE_SCORE_SOFTMAX_OF_CHOSEN /* after one over the chosen experts */
} edge_score;

/* One op. in, in2, out, w: indices, -1: none. The rest is 0 where an op has no use for it. */
typedef struct {
    int32_t kind;
    int32_t in, in2, out;
    int32_t w[3];
    int32_t column;
    int32_t group, layer; /* of keys and values; layer: index in the group's pages */
    int32_t n_heads, n_kv_heads, head_dim, window;
    int32_t n_rot, interleaved;
    int32_t activation; /* edge_activation */
    float eps;
    int32_t centred;              /* 1: norms subtract the mean */
    float base, scale, magnitude; /* rotary: see edge/graph/ops.py */
    float attention_scale;        /* of scores; 0: 1 / sqrt(head_dim) */
    float softcap;                /* of SOFTCAP, and of an attention's scores; 0: none */
    float alpha_p, alpha_n, beta; /* of XIELU: see edge/graph/ops.py; beta of TEMPERATURE, too */
    int32_t n;                    /* how many elements the GAINs, TEMPERATURE, SPARSIFY change */
    int32_t length;               /* of TEMPERATURE */
    int32_t has_ramp;          /* 1: the rotary frequencies are scaled by a ramp over the pairs, */
    float ramp_low, ramp_high; /* see edge/graph/ops.py */
    int32_t n_experts, n_used;
    int32_t score;      /* edge_score */
    int32_t is_normed;  /* 1: the weights of a token's experts are divided by their sum */
    float expert_scale; /* of these weights */
} edge_op;

typedef struct {
    int32_t isa;         /* index for edge_isa_name */
    int32_t native_bf16; /* 1: bf16 weights by the CPU's own instruction, with other bits */
    int32_t max_tokens;
    int32_t n_kv_groups, n_ops, n_buffers, n_weights;
    const edge_kv_shape *kv; /* of the pages that runs will bring; the four arrays are copied */
    const edge_op *ops;
    const edge_buffer *buffers;
    const edge_weight *weights; /* the data of the weights is not copied */
    void *arena;                /* arena_bytes, 64-byte aligned; outlives the plan */
    int64_t arena_bytes;
} edge_plan_spec;

typedef struct edge_plan edge_plan;

/* Makes a plan, after a check of everything that a run relies on. */
int32_t edge_plan_new(const edge_plan_spec *spec, edge_plan **plan, edge_error *error);
void edge_plan_free(edge_plan *plan);

/* Arena bytes that a buffer takes for a number of rows; -1: out of range. */
int64_t edge_buffer_bytes(int32_t kind, int32_t dim, int32_t rows);

/* One run: n_tokens tokens at positions start, start + 1, ... of one cache. It writes to the pages
 * of these positions, which no other cache may share. */
typedef struct {
    const int32_t *tokens;
    int32_t n_tokens;      /* 1..max_tokens */
    int32_t start;         /* position of the first token; the cache has all positions before it */
    int32_t n_logits;      /* logits of the last n_logits tokens, 0..n_tokens */
    int32_t n_ops;         /* run only the first n_ops ops; -1: all */
    float *logits;         /* (n_logits, n_vocab), or NULL when n_logits is 0 */
    const int32_t *cancel; /* read before each chunk of work, non-zero stops the run; may be NULL */
    int64_t *op_ns;        /* (n_ops), nanoseconds of wall time of each; may be NULL */
} edge_step;

/* Runs a step. A plan, its threads and a cache each serve one run at a time. */
int32_t edge_run(edge_plan *plan, edge_threads *threads, const edge_kv *kv, const edge_step *step,
                 edge_error *error);

/* Copies `rows` rows of an F32 buffer out of the arena after edge_run: for tests and bisection. */
int32_t edge_plan_read(const edge_plan *plan, int32_t buffer, int32_t rows, float *dst);

/* ---- numbers for the sampler ------------------------------------------------------------- */

/* out = softmax(x), and out = log(softmax(x)), of n elements. isa: a usable instruction set. The
 * bits are the same on every machine. */
void edge_softmax(int32_t isa, const float *x, int64_t n, float *out);
void edge_log_softmax(int32_t isa, const float *x, int64_t n, float *out);

/* ---- what this machine can do ------------------------------------------------------------ */

/* Reads data once with all threads; *ns: nanoseconds of wall time. */
int32_t edge_measure_read(edge_threads *threads, const void *data, int64_t n_bytes, int64_t *ns);
/* Runs int8 dot products of numbers in registers on all threads; *ns: nanoseconds of
 * wall time, *macs: the multiply-adds done in it. */
int32_t edge_measure_dot(edge_threads *threads, int32_t isa, int64_t *macs, int64_t *ns);
