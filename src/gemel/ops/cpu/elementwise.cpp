// What stands between the matrix products of a decoder, forward and backward, each in one pass over memory: norms, rotation, SwiGLU.
//
// Arithmetic is fp32 whatever lies in memory; a result is rounded once. Sums over rows (the gradient of a norm's scale) are made of the same
// kRowsAtOnce rows whatever the number of threads, and folded in order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"
#include "norm.h"
#include "train.h"
#include "workshop.h"

namespace gemel {
namespace {

constexpr int kRowsAtOnce = 32;

int divide_up(int a, int b) { return (a + b - 1) / b; }

template <class T>
const T* row_of(const gemel_rows& rows, int row, int group, int width) {
    return static_cast<const T*>(rows.data) + row / group * rows.ld + int64_t{row % group} * width;
}

// work(first, end, rank) for runs of rows, by all threads.
template <class Work>
void by_rows(Workshop& shop, int num_rows, const Work& work) {
    shop.team.run(1, [&](int rank) {
        shop.team.share(rank, divide_up(num_rows, kRowsAtOnce), [&](int item, int me) {
            work(item * kRowsAtOnce, std::min(num_rows, (item + 1) * kRowsAtOnce), me);
        });
    });
}

// A vector of the numbers that are left of a row, the rest of it zero; and the way back.
template <class T>
f32 load_some(const T* from, int count) {
    if (count >= W) return load_as_f32(from);
    float lanes[W] = {};
    for (int i = 0; i < count; i++) lanes[i] = as_f32(from[i]);
    return load(lanes);
}
template <class T>
void store_some(T* to, f32 v, int count) {
    if (count >= W) return store_as(to, v);
    float lanes[W];
    store(lanes, v);
    for (int i = 0; i < count; i++) set_as(to + i, lanes[i]);
}

// --- norm ---------------------------------------------------------------------------------------------------------------------------

template <class T>
void norm_row(const gemel_rms_norm& job, int row) {
    const int width = job.width;
    const T* const x = row_of<T>(job.x, row, job.group, width);
    f32 squares = zero();
    for (int i = 0; i < width; i += W) {
        const f32 v = load_some(x + i, width - i);
        squares = fma(v, v, squares);
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + job.eps);
    job.factor[row] = factor;
    T* const y = static_cast<T*>(job.y) + int64_t{row} * width;
    for (int i = 0; i < width; i += W) {
        store_some(y + i, mul(mul(load_some(x + i, width - i), set1(factor)), load_some(job.scale + i, width - i)), width - i);
    }
}

// d_x = factor (d_y scale - n mean(d_y scale n)) with n = x factor; d_scale += d_y n.
template <class T>
void norm_row_back(const gemel_rms_norm& job, int row, float* d_scale) {
    const int width = job.width;
    const T *x = row_of<T>(job.x, row, job.group, width), *d_y = row_of<T>(job.d_y, row, job.group, width);
    const f32 factor = set1(job.factor[row]);
    f32 products = zero();
    for (int i = 0; i < width; i += W) {
        const int left = width - i;
        const f32 along = mul(load_some(d_y + i, left), mul(load_some(x + i, left), factor));
        products = fma(along, load_some(job.scale + i, left), products);
        store_some(d_scale + i, add(load_some(d_scale + i, left), along), left);
    }
    const f32 mean = set1(sum(products) / static_cast<float>(width));
    T* const d_x = static_cast<T*>(job.d_x) + int64_t{row} * width;
    for (int i = 0; i < width; i += W) {
        const int left = width - i;
        const f32 n = mul(load_some(x + i, left), factor), straight = mul(load_some(d_y + i, left), load_some(job.scale + i, left));
        store_some(d_x + i, mul(factor, sub(straight, mul(n, mean))), left);
    }
}

template <class T>
void norm_back(Workshop& shop, const gemel_rms_norm& job) {
    const int parts = divide_up(job.num_rows, kRowsAtOnce), width = job.width;
    float* const sums = shop.shared[0].take<float>(int64_t{parts} * width);
    shop.team.run(2, [&](int rank) {
        shop.team.share(rank, parts, [&](int part, int) {
            float* const d_scale = sums + int64_t{part} * width;
            std::fill_n(d_scale, width, 0.0f);
            for (int row = part * kRowsAtOnce; row < std::min(job.num_rows, (part + 1) * kRowsAtOnce); row++) norm_row_back<T>(job, row, d_scale);
        });
        shop.team.share(rank, divide_up(width, 4 * W), [&](int item, int) {
            const int first = item * 4 * W, end = std::min(width, first + 4 * W);
            std::fill(job.d_scale + first, job.d_scale + end, 0.0f);
            for (int part = 0; part < parts; part++) {
                for (int i = first; i < end; i++) job.d_scale[i] += sums[int64_t{part} * width + i];
            }
        });
    });
}

// --- rotation -----------------------------------------------------------------------------------------------------------------------

template <class T>
void turn_row(const gemel_rope& job, int row) {
    const int half = job.width / 2;
    const T* x = row_of<T>(job.x, row, job.group, job.width);
    const T *cosine = static_cast<const T*>(job.cosines) + row / job.group * job.ld_angles;
    const T *sine = static_cast<const T*>(job.sines) + row / job.group * job.ld_angles;
    T* const y = static_cast<T*>(job.y) + int64_t{row} * job.width;
    for (int i = 0; i < half; i += W) {
        const int left = half - i;
        const f32 a = load_some(x + i, left), b = load_some(x + half + i, left);
        f32 sine_a = load_some(sine + i, left), sine_b = load_some(sine + half + i, left);
        if (job.back) std::swap(sine_a, sine_b);
        store_some(y + i, fma(b, sine_a, mul(a, load_some(cosine + i, left))), left);
        store_some(y + half + i, fma(a, sine_b, mul(b, load_some(cosine + half + i, left))), left);
    }
}

// --- SwiGLU -------------------------------------------------------------------------------------------------------------------------

template <class T>
void swiglu_row(const gemel_swiglu& job, int row) {
    const int width = job.width;
    const T *gate = row_of<T>(job.x, row, 1, 0), *up = gate + width;
    T* const y = static_cast<T*>(job.y) + int64_t{row} * width;
    for (int i = 0; i < width; i += W) {
        store_some(y + i, mul(silu(load_some(gate + i, width - i)), load_some(up + i, width - i)), width - i);
    }
}

template <class T>
void swiglu_row_back(const gemel_swiglu& job, int row) {
    const int width = job.width;
    const T *gate = row_of<T>(job.x, row, 1, 0), *up = gate + width, *d_y = row_of<T>(job.d_y, row, 1, 0);
    T* const d_gate = static_cast<T*>(job.y) + int64_t{row} * 2 * width;
    const f32 one = set1(1.0f);
    for (int i = 0; i < width; i += W) {
        const int left = width - i;
        const f32 g = load_some(gate + i, left), d = load_some(d_y + i, left);
        const f32 open = div(one, add(one, exp(sub(zero(), g)))), silu = mul(g, open);
        const f32 steep = mul(open, fma(g, sub(one, open), one));
        store_some(d_gate + i, mul(mul(d, load_some(up + i, left)), steep), left);
        store_some(d_gate + width + i, mul(d, silu), left);
    }
}

}  // namespace
}  // namespace gemel

extern "C" {

void gemel_rms_norm_forward(gemel_workshop* workshop, const gemel_rms_norm* job) {
    using namespace gemel;
    by_rows(*reinterpret_cast<Workshop*>(workshop), job->num_rows, [job](int first, int end, int) {
        for (int row = first; row < end; row++) job->format == GEMEL_BF16 ? norm_row<bf16>(*job, row) : norm_row<float>(*job, row);
    });
}

void gemel_rms_norm_backward(gemel_workshop* workshop, const gemel_rms_norm* job) {
    using namespace gemel;
    Workshop& shop = *reinterpret_cast<Workshop*>(workshop);
    job->format == GEMEL_BF16 ? norm_back<bf16>(shop, *job) : norm_back<float>(shop, *job);
}

void gemel_rope_turn(gemel_workshop* workshop, const gemel_rope* job) {
    using namespace gemel;
    by_rows(*reinterpret_cast<Workshop*>(workshop), job->num_rows, [job](int first, int end, int) {
        for (int row = first; row < end; row++) job->format == GEMEL_BF16 ? turn_row<bf16>(*job, row) : turn_row<float>(*job, row);
    });
}

void gemel_swiglu_run(gemel_workshop* workshop, const gemel_swiglu* job) {
    using namespace gemel;
    const auto row_of_kind = job->d_y.data ? (job->format == GEMEL_BF16 ? swiglu_row_back<bf16> : swiglu_row_back<float>)
                                           : (job->format == GEMEL_BF16 ? swiglu_row<bf16> : swiglu_row<float>);
    by_rows(*reinterpret_cast<Workshop*>(workshop), job->num_rows, [job, row_of_kind](int first, int end, int) {
        for (int row = first; row < end; row++) row_of_kind(*job, row);
    });
}

}  // extern "C"
