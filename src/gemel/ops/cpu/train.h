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

#ifdef __cplusplus
}
#endif
