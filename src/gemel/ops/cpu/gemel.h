/* The C interface of the CPU kernels: what Python binds (native.py), and nothing that depends on a version of Python, NumPy or torch. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GEMEL_API __attribute__((visibility("default")))

/* How numbers are stored: matrices of weights, and pages of keys and values. */
enum gemel_format { GEMEL_F32 = 0, GEMEL_BF16 = 1, GEMEL_I8 = 2, GEMEL_I4 = 3 };

/* What happens to a product x W^T + bias. */
enum gemel_epilogue {
    GEMEL_STORE = 0,
    GEMEL_ADD = 1,    /* added to what is there: the residual stream */
    GEMEL_SWIGLU = 2, /* silu(first half) * second half; the weight must be `paired` */
    GEMEL_GELU = 3    /* the tanh approximation */
};

/* A matrix W [n, k] in packed form, made by gemel_pack.
 *
 *   I8   w = scale * q,            q in [-127, 127], one scale per row (group 0) or per `group` = 32 elements along k
 *   I4   w = scale * q + minimum,  q in [0, 15], per group of 32, 64 or 128 along k; without minima: w = scale * (q - 8)
 *
 * k must be a multiple of 2 (BF16), of 32 (I8), of `group` (I4). */
typedef struct {
    int32_t format;
    int32_t n, k;
    int32_t group;
    int32_t minima;   /* I4: whether groups have one */
    int32_t quantize; /* I8, I4: activations are rounded to int8 with one scale per 32 along k; 0 leaves them as they are */
    int32_t paired;   /* columns j and n/2 + j belong together (gate and up) and lie side by side */
    int32_t reserved;
    const float* bias;  /* [n] or null */
    const void* packed; /* 64-byte aligned */
} gemel_weight;

/* Threads that work together; one call at a time. */
typedef struct gemel_team gemel_team;
GEMEL_API gemel_team* gemel_team_new(int32_t threads);
GEMEL_API void gemel_team_free(gemel_team* team);

/* Packing, by a team or, where it is null, by the caller alone. `values`: fp32, bf16 or int8 [n, k], or two 4-bit numbers per byte
 * [n, k/2], the lower half first. `scales` and `minima`: fp32, [n] or [n, k/group]; those of groups are kept as fp16. */
GEMEL_API int64_t gemel_packed_bytes(const gemel_weight* weight);
GEMEL_API void gemel_pack(gemel_team* team, const gemel_weight* weight, const void* values, const float* scales, const float* minima,
                          void* packed);
GEMEL_API void gemel_unpack(const gemel_weight* weight, float* values); /* what the products compute with, [n, k] */

/* One product by itself, y = epilogue(x W^T + bias), for tests and benchmarks. x [t, k] and y [t, n] (SWIGLU: [t, n/2]) row-major. */
GEMEL_API void gemel_matmul(gemel_team* team, const gemel_weight* weight, const float* x, int32_t t, float* y, int32_t epilogue);

/* Keys and values of all layers: [layer, block, kv head, (keys, values)], a block of `block_tokens` (a multiple of 16) in tiles of 16. */
typedef struct {
    int32_t format; /* F32, BF16 or I8 */
    int32_t layers, heads, width, block_tokens, reserved;
    int64_t blocks;
    void* data;
} gemel_pages;

GEMEL_API int64_t gemel_pages_bytes(const gemel_pages* pages);
GEMEL_API void gemel_pages_copy(const gemel_pages* pages, int32_t count, const int32_t* from, const int32_t* to);

/* One sequence's part of the flat run of a step: rows row..row+count, at positions start..start+count, in the blocks of its table. */
typedef struct {
    int32_t row, start, count, reserved;
    const int32_t* blocks;
} gemel_stretch;

/* What one layer does between its qkv product and its output product. qkv [t, ld]: heads of queries, of keys, of values. */
typedef struct {
    int32_t layer, num_heads, window; /* window: positions seen, itself included; 0 sees all */
    float eps;                        /* of the norms of queries and keys */
    const float* q_norm;              /* [width] or null */
    const float* k_norm;
    const float* rotation; /* [positions, 2 width]: cosines, then sines of which the first half is negated; or null */
    const float* slopes;   /* ALiBi, [num_heads], or null */
} gemel_attention;

/* One layer's attention by itself, for tests: writes keys and values of all rows, then out [t, num_heads * width]. */
GEMEL_API void gemel_attend(gemel_team* team, const gemel_attention* attention, const gemel_pages* pages, int32_t num_stretches,
                            const gemel_stretch* stretches, float* qkv, int32_t t, float* out);

/* --- whole steps --------------------------------------------------------------------------------------------------------------------
 *
 * A program is a list of operations over slots, each a matrix of fp32 with one row per token of the step, or one per sampled row. */
enum gemel_kind {
    GEMEL_EMBED = 0,  /* to = table[token] (+ positions[position]) */
    GEMEL_NORM = 1,   /* to = norm(from) */
    GEMEL_LINEAR = 2, /* to = epilogue(from W^T + bias) */
    GEMEL_ATTEND = 3, /* to = attention(from), from holding queries, keys and values */
    GEMEL_SELECT = 4, /* to = the sampled rows of from */
    GEMEL_LOGITS = 5  /* the step's logits = from W^T + bias, with the largest of each row and where it is */
};

typedef struct {
    int32_t rows;  /* 0: all tokens of the step, 1: the sampled ones */
    int32_t width;
} gemel_slot;

typedef struct {
    int32_t kind, from, to;
    int32_t label;     /* under which its time is counted */
    int32_t epilogue;  /* LINEAR */
    int32_t format;    /* EMBED: F32 or BF16, of both tables */
    float eps;         /* NORM */
    int32_t reserved;
    const void* table; /* EMBED: [vocabulary, width] */
    const void* positions; /* EMBED: [positions, width] or null */
    const float* scale;    /* NORM: [width] */
    const float* shift;    /* NORM: [width]; null: a root mean square norm, without mean and shift */
    gemel_weight weight;
    gemel_attention attention;
} gemel_op;

typedef struct {
    int32_t num_tokens, num_stretches, num_sampled, reserved;
    const int32_t* tokens;    /* [num_tokens] */
    const int32_t* positions; /* [num_tokens] */
    const int32_t* sampled;   /* [num_sampled] rows that yield logits */
    const gemel_stretch* stretches;
    float* logits;   /* [num_sampled, vocabulary] */
    float* largest;  /* [num_sampled]; NaN when any logit of the row is not finite */
    int32_t* argmax; /* [num_sampled]; the lowest id among equals */
} gemel_step;

typedef struct gemel_program gemel_program;
GEMEL_API gemel_program* gemel_program_new(int32_t threads, int32_t num_slots, const gemel_slot* slots, int32_t num_ops,
                                           const gemel_op* ops, const gemel_pages* pages);
GEMEL_API void gemel_program_free(gemel_program* program);
GEMEL_API void gemel_program_run(gemel_program* program, const gemel_step* step);
GEMEL_API gemel_team* gemel_program_team(gemel_program* program); /* its threads, to be used between two steps */
/* Seconds since the last call, per label, [num_labels]. */
GEMEL_API void gemel_program_profile(gemel_program* program, int32_t num_labels, double* seconds);

/* --- choosing tokens ----------------------------------------------------------------------------------------------------------------
 *
 * How one token is drawn from a row of logits: bias, penalties and bans, then temperature, top-k, top-p, min-p. */
typedef struct {
    int32_t row;           /* of the logits; several draws may share one */
    int32_t likeliest;     /* of the row as it is: its token, and its logit, which is finite */
    float largest;
    float temperature;     /* 0: the likeliest is taken */
    int32_t top_k;         /* 0: all */
    int32_t logprobs;      /* -1: none; n: of the token and of the n likeliest */
    float repetition, presence, frequency;
    int32_t num_marked, num_banned, reserved;
    double top_p, min_p;
    uint64_t seed, stream, counter; /* the random number is a function of these */
    const int32_t* marked; /* [num_marked] tokens whose logit changes, each once */
    const int32_t* counts; /* [num_marked] how often each is in the output; -1: neither there nor in the prompt */
    const float* bias;     /* [num_marked] added to the logit */
    const int32_t* banned; /* [num_banned] impossible tokens */
} gemel_draw;

/* Memory for drawing from rows of `vocabulary` logits, with the threads of a team that must outlive it. */
typedef struct gemel_sampler gemel_sampler;
GEMEL_API gemel_sampler* gemel_sampler_new(gemel_team* team, int32_t vocabulary);
GEMEL_API void gemel_sampler_free(gemel_sampler* sampler);
/* tokens [num_draws], -1 where nothing can be drawn, with their log-probabilities under the row as it is; and, best first, the likeliest of
 * that row [num_draws, most], of which each draw fills as many as its `logprobs`. */
GEMEL_API void gemel_sampler_run(gemel_sampler* sampler, const float* logits, int32_t num_draws, const gemel_draw* draws, int32_t* tokens,
                                 float* logprobs, int32_t most, int32_t* likeliest, float* likeliest_logprobs);

GEMEL_API const char* gemel_variant(void); /* the instruction set that this library was compiled for */

#ifdef __cplusplus
}
#endif
