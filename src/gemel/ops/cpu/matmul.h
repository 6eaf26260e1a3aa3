// Products of activations with packed weights, a rectangle at a time. No threads in here: the caller hands out rectangles.
#pragma once

#include "gemel.h"
#include "tile.h"

namespace gemel {

// How the activations of a product must be given.
enum class Form { f32, bf16, i8 };

Form form(const gemel_weight& weight);

// The rows of one matrix of activations in one form. Only what the form needs is set. Row strides keep rows of a tile off one another's
// cache lines, so they are larger than k: see `stride`.
struct Activations {
    const float* f32 = nullptr;  // [rows, ld]
    bf16* b16 = nullptr;         // [rows, ld]
    int8_t* q = nullptr;         // [rows, ld], rounded to whole numbers of `scale`
    int16_t* wide = nullptr;     // [rows, ld], the same in 16 bits, for 8-bit weights and where kernels want it
    float* scale = nullptr;      // [rows, k / 32]
    float* sum = nullptr;        // [rows, k / 32]: scale times the sum of the group's q
    int32_t* start = nullptr;    // [rows, k / 32]: where whole sums begin, so that an offset of the weights cancels
    int64_t ld = 0;
};

int64_t stride(int k);                          // of fp32, bf16 and int8 rows alike, in elements
int64_t activation_bytes(Form form, int k, int rows);  // what `arrange` needs, 64-byte aligned; 0 for fp32
Activations arrange(Form form, int k, int rows, void* memory);

// Bring one row into the form of this weight (and of no other). x [k]. Nothing to do for fp32.
void prepare_row(const gemel_weight& weight, const float* x, const Activations& into, int row);

constexpr int kBlockRows = 96;  // what `multiply` takes at once; callers that cut rows do it in multiples

int num_panels(const gemel_weight& weight);  // of NR columns each (paired: W pairs), the last one perhaps partly empty

// Rows [row0, row1) times panels [panel0, panel1), through the epilogue, into y [rows, ldy]. `x` holds all rows.
void multiply(const gemel_weight& weight, const Activations& x, int row0, int row1, int panel0, int panel1, int epilogue, float* y,
              int64_t ldy);

}  // namespace gemel
