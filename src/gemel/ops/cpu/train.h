/* The C interface of the operations of training, beside that of serving (gemel.h): what training.py binds.
 *
 * Matrices are ordinary: rows follow one another at some distance, numbers of a row are contiguous, fp32 or bf16. */
#pragma once

#include <stdint.h>

#include "gemel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A team of threads and the memory that it works in. One call at a time. */
typedef struct gemel_workshop gemel_workshop;
GEMEL_API gemel_workshop* gemel_workshop_new(int32_t threads);
GEMEL_API void gemel_workshop_free(gemel_workshop* workshop);

/* One factor: element (i, j) at data[i * ld + j], or at data[j * ld + i] if `transposed`. */
typedef struct {
    const void* data;
    int64_t ld;
    int32_t format; /* F32 or BF16 */
    int32_t transposed;
} gemel_factor;

/* c [m, n] = a [m, k] b [k, n], summed in fp32 along k from first to last; added to what is there if `add` (c fp32). */
GEMEL_API void gemel_gemm(gemel_workshop* workshop, int32_t m, int32_t n, int32_t k, const gemel_factor* a, const gemel_factor* b, void* c,
                          int64_t ldc, int32_t format, int32_t add);

/* Sums over tokens of weight * (cross-entropy + z_loss * lse^2) and of the second term alone, of logits = hidden weight^T, and their
 * gradients. With label smoothing s the target is 1 - s of the one entry and s / vocab of each. */
typedef struct {
    int32_t num_tokens, vocab, width;
    int32_t format; /* of hidden, weight, d_hidden: F32 or BF16 */
    float z_loss, label_smoothing;
    int64_t ld_hidden, ld_weight;
    const void* hidden;     /* [num_tokens, width] */
    const void* weight;     /* [vocab, width] */
    const int32_t* targets; /* [num_tokens], each in [0, vocab) */
    const float* weights;   /* [num_tokens] */
    void* d_hidden;         /* [num_tokens, width], or null */
    float* d_weight;        /* [vocab, width], or null */
    double loss, z;         /* results */
} gemel_head_loss;
GEMEL_API void gemel_head_cross_entropy(gemel_workshop* workshop, gemel_head_loss* job);

/* Causal attention within documents that are packed end to end: document d is tokens starts[d] .. starts[d + 1]. Heads of a token follow one
 * another; tokens are `ld` apart. Gradients, like outputs, are [tokens, heads, width] without gaps. */
typedef struct {
    int32_t num_documents, num_heads, num_kv_heads, width;
    int32_t format; /* of all tensors but lse: F32 or BF16 */
    int32_t window; /* positions seen, itself included; 0 sees all */
    float scale;    /* of scores */
    int32_t reserved;
    const int32_t* starts;
    const float* slopes; /* ALiBi, [num_heads], or null */
    int64_t ld_q, ld_k, ld_v, ld_d_out;
    const void *q, *k, *v;
    void* out;  /* [tokens, num_heads, width] */
    float* lse; /* [num_heads, tokens]: log2 of the sums of softmax, written forward and read backward */
    const void* d_out;
    void *d_q, *d_k, *d_v;
} gemel_packed_attention;
GEMEL_API void gemel_packed_attention_forward(gemel_workshop* workshop, const gemel_packed_attention* job);
GEMEL_API void gemel_packed_attention_backward(gemel_workshop* workshop, const gemel_packed_attention* job);

/* Rows of numbers in groups: row i is at data + (i / group) * ld + (i % group) * width. */
typedef struct {
    const void* data; /* null: none, where that is allowed */
    int64_t ld;
} gemel_rows;

/* y = x factor scale, where factor = 1 / sqrt(mean(x^2) + eps) is kept for the gradient. Results follow one another without gaps. */
typedef struct {
    int32_t num_rows, group, width, format;
    float eps;
    int32_t reserved;
    gemel_rows x, d_y;
    const float* scale; /* [width] */
    float* factor;      /* [num_rows] */
    void *y, *d_x;
    float* d_scale; /* [width] */
} gemel_rms_norm;
GEMEL_API void gemel_rms_norm_forward(gemel_workshop* workshop, const gemel_rms_norm* job);
GEMEL_API void gemel_rms_norm_backward(gemel_workshop* workshop, const gemel_rms_norm* job);

/* y = x cos + (halves of x exchanged) sin, with the angles of row i at line i / group; or, back, what that makes of a gradient x. */
typedef struct {
    int32_t num_rows, group, width, format;
    int32_t back, reserved;
    gemel_rows x;
    const void *cosines, *sines; /* lines of [width], `ld_angles` apart, of the same format */
    int64_t ld_angles;
    void* y;
} gemel_rope;
GEMEL_API void gemel_rope_turn(gemel_workshop* workshop, const gemel_rope* job);

/* y = silu(first half of x) * second half; width is that of y. With d_y, the gradient of x into y, [num_rows, 2 width]. */
typedef struct {
    int32_t num_rows, width, format, reserved;
    gemel_rows x, d_y;
    void* y;
} gemel_swiglu;
GEMEL_API void gemel_swiglu_run(gemel_workshop* workshop, const gemel_swiglu* job);

/* Flat numbers as an optimizer stores them: fp32; bf16 with the lower halves of the fp32 numbers in `low`; or bf16 rounded at random. */
typedef struct {
    void* data;
    int16_t* low; /* or null */
    int32_t format, place;
    uint32_t mix[2]; /* number i is rounded with the upper half of (table[place + i] ^ mix[0]) * mix[1] */
} gemel_stored;

/* A stretch of one parameter, with the moments of its gradient. */
typedef struct {
    int64_t count;
    gemel_stored weight, first, second;
    const void* gradient;
    int32_t gradient_format, reserved;
} gemel_adamw_part;

/* weight = keep weight - step first / (sqrt(second) / root + eps), then up to `shrink` nearer to zero. */
typedef struct {
    float keep, rest1, beta2, rest2, root, eps, step, shrink; /* rest1 = 1 - beta1, rest2 = 1 - beta2 */
    const int32_t* table; /* as many as the farthest place of a part that is rounded at random */
} gemel_adamw;
GEMEL_API void gemel_adamw_step(gemel_workshop* workshop, const gemel_adamw* how, int32_t num_parts, const gemel_adamw_part* parts);

#ifdef __cplusplus
}
#endif
