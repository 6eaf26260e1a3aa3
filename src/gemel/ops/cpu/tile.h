// The innermost loop of everything: a few rows of activations times two vectors of columns, summed along k in order.
//
// Every sum runs over k from first to last in one accumulator, whatever the number of rows. That makes a row's result the same bits alone
// and among a thousand others.
#pragma once

#include <type_traits>

#include "simd.h"

namespace gemel {

constexpr int NR = 2 * W;  // columns of a panel

// With bf16 arithmetic both factors are bf16; without it, a bf16 weight is widened and multiplied with an fp32 activation.
#if GEMEL_AVX512
using bf16_act = bf16;
constexpr int kRows = 8;  // most rows of a tile
#else
using bf16_act = float;
constexpr int kRows = 6;
#endif

// What was loaded before is loaded again after this: registers are for sums, and a compiler left to itself keeps factors in them instead.
inline void keep_in_memory() { asm volatile("" ::: "memory"); }

// c[r][0..NR) (+)= sum over k of a[r][k] * w[k][0..NR).   w: row k begins at w + k * ldw.
// One or two rows have too few sums to keep the multipliers busy, so they may go through P panels at once: those begin `next` apart in w
// and NR apart in c.
template <int R, int P = 1>
[[gnu::noinline]] void tile_f32(const float* a, int64_t lda, const float* w, int64_t ldw, int k, float* c, int64_t ldc, bool add, int64_t next = 0) {
    f32 left[R][P], right[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            left[r][p] = add ? load(c + r * ldc + p * NR) : zero();
            right[r][p] = add ? load(c + r * ldc + p * NR + W) : zero();
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < k; i++, w += ldw) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const f32 w0 = load(w + p * next), w1 = load(w + p * next + W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const f32 x = set1(a[r * lda + i]);
                accumulate(left[r][p], x, w0);
                accumulate(right[r][p], x, w1);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            store(c + r * ldc + p * NR, left[r][p]);
            store(c + r * ldc + p * NR + W, right[r][p]);
        }
    }
}

// The same where it is known to the compiler how far numbers are apart: number i of row r is a[r * Row + i * Along], w is packed. Finding them
// then takes no registers and no instructions, and four steps along k can be one of the loop's. (+ 20% on a Zen 3 whose cores are shared.)
template <int R, int Row, int Along>
[[gnu::noinline]] void tile_known(const float* a, const float* w, int k, float* c, int64_t ldc, bool add) {
    f32 left[R], right[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        left[r] = add ? load(c + r * ldc) : zero();
        right[r] = add ? load(c + r * ldc + W) : zero();
    }
    for (int step; k > 0; k -= step, a += step * Along, w += step * NR) {
        step = k >= 4 ? 4 : 1;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            if (i && step == 1) break;
            const f32 w0 = load(w + i * NR), w1 = load(w + i * NR + W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const f32 x = set1(a[r * Row + i * Along]);
                accumulate(left[r], x, w0);
                accumulate(right[r], x, w1);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        store(c + r * ldc, left[r]);
        store(c + r * ldc + W, right[r]);
    }
}

// The same as `tile_f32` with w in pairs along k: the pair (k, k+1) of column j lies at w + (k/2) * ldw + 2 j. k is even.
template <int R, int P = 1>
[[gnu::noinline]] void tile_bf16(const bf16_act* a, int64_t lda, const bf16* w, int64_t ldw, int k, float* c, int64_t ldc, bool add,
                      int64_t next = 0) {
    f32 left[R][P], right[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            left[r][p] = add ? load(c + r * ldc + p * NR) : zero();
            right[r][p] = add ? load(c + r * ldc + p * NR + W) : zero();
        }
    }
    for (int i = 0; i < k; i += 2, w += ldw) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
#if GEMEL_AVX512
            const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + p * next), w1 = (__m512bh)_mm512_loadu_si512(w + p * next + 2 * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int32_t pair;
                std::memcpy(&pair, a + r * lda + i, 4);
                const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                left[r][p] = _mm512_dpbf16_ps(left[r][p], w0, x);
                right[r][p] = _mm512_dpbf16_ps(right[r][p], w1, x);
            }
#else
            f32 w0 = load_first(w + p * next), w1 = load_first(w + p * next + 2 * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const f32 x = set1(a[r * lda + i]);
                accumulate(left[r][p], x, w0);
                accumulate(right[r][p], x, w1);
            }
            w0 = load_second(w + p * next), w1 = load_second(w + p * next + 2 * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const f32 x = set1(a[r * lda + i + 1]);
                accumulate(left[r][p], x, w0);
                accumulate(right[r][p], x, w1);
            }
#endif
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            store(c + r * ldc + p * NR, left[r][p]);
            store(c + r * ldc + p * NR + W, right[r][p]);
        }
    }
}

template <int n>
using Count = std::integral_constant<int, n>;

// work(Count<rows>) for rows known only now, 1 <= rows <= most.
template <int most, class Work>
inline void with_count(int rows, const Work& work) {
    if constexpr (most == 1) {
        work(Count<1>{});
    } else {
        if (rows == most) {
            work(Count<most>{});
        } else {
            with_count<most - 1>(rows, work);
        }
    }
}

// work(Count<n>, first row) over tiles of at most `most` rows, as even as possible: two tiles of four keep the processor busier than one of
// six and one of two.
template <int most, class Work>
inline void in_tiles(int rows, const Work& work) {
    for (int tiles = (rows + most - 1) / most, row = 0; tiles; tiles--) {
        const int count = (rows - row + tiles - 1) / tiles;
        with_count<most>(count, [&](auto n) { work(n, row); });
        row += count;
    }
}

}  // namespace gemel
