// Norms, rotation and activation functions of single rows.
#pragma once

#include "simd.h"

namespace gemel {

void rms_norm(const float* x, const float* scale, float eps, int width, float* y);                      // y may be x
void layer_norm(const float* x, const float* scale, const float* shift, float eps, int width, float* y);  // y may be x

// In place: x * cos + (halves of x exchanged) * sin, the sines of the first half negated. rotation [2 width]: cosines, then sines.
void rotate(float* x, const float* rotation, int width);

f32 silu(f32 x);
f32 gelu(f32 x);  // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

}  // namespace gemel
