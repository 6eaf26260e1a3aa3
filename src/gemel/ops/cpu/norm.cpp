#include "norm.h"

#include <cmath>

namespace gemel {

void rms_norm(const float* x, const float* scale, float eps, int width, float* y) {
    f32 squares = zero();
    int i = 0;
    for (; i + W <= width; i += W) {
        const f32 v = load(x + i);
        squares = fma(v, v, squares);
    }
    float total = sum(squares);
    for (; i < width; i++) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    for (i = 0; i + W <= width; i += W) store(y + i, mul(mul(load(x + i), set1(factor)), load(scale + i)));
    for (; i < width; i++) y[i] = x[i] * factor * scale[i];
}

void layer_norm(const float* x, const float* scale, const float* shift, float eps, int width, float* y) {
    const float count = static_cast<float>(width);
    int i = 0;
    f32 total = zero();
    for (; i + W <= width; i += W) total = add(total, load(x + i));
    float mean = sum(total);
    for (; i < width; i++) mean += x[i];
    mean /= count;
    f32 squares = zero();
    for (i = 0; i + W <= width; i += W) {
        const f32 v = sub(load(x + i), set1(mean));
        squares = fma(v, v, squares);
    }
    float variance = sum(squares);
    for (; i < width; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / std::sqrt(variance / count + eps);
    for (i = 0; i + W <= width; i += W) {
        store(y + i, fma(mul(sub(load(x + i), set1(mean)), set1(factor)), load(scale + i), load(shift + i)));
    }
    for (; i < width; i++) y[i] = (x[i] - mean) * factor * scale[i] + shift[i];
}

void rotate(float* x, const float* rotation, int width) {
    const int half = width / 2;
    const float *cosine = rotation, *sine = rotation + width;
    int i = 0;
    for (; i + W <= half; i += W) {
        const f32 a = load(x + i), b = load(x + half + i);
        store(x + i, fma(b, load(sine + i), mul(a, load(cosine + i))));
        store(x + half + i, fma(a, load(sine + half + i), mul(b, load(cosine + half + i))));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] + b * sine[i];
        x[half + i] = b * cosine[half + i] + a * sine[half + i];
    }
}

f32 silu(f32 x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

f32 gelu(f32 x) {
    // 0.5 (1 + tanh u) = 1 / (1 + e^(-2u)), and u = sqrt(2/pi) (x + 0.044715 x^3)
    const f32 cubic = fma(mul(mul(x, x), x), set1(0.044715f), x);
    return div(x, add(set1(1.0f), exp(mul(cubic, set1(-1.5957691216f)))));
}

}  // namespace gemel
