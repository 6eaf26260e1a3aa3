// Products of two ordinary matrices, for training, where no matrix stays long enough to be packed once and for all.
//
// A block of at most kBlockRows rows of the left factor and panels of NR columns of the right one are laid out as the tiles of tile.h read
// them, widened to fp32 on the way, or kept in bf16 where the processor multiplies that. Then the block goes through a few panels at a time,
// in stretches along k, with its sums in the second-level cache. Every sum runs along k from first to last in one accumulator, so neither
// threads nor the sizes of blocks change a bit of it.
//
// No threads in here. Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), is where the order of loops is from.
#pragma once

#include <cstring>
#include <type_traits>

#include "gemel.h"
#include "tile.h"

namespace gemel {

constexpr int kBlockRows = 96;            // of the left factor; a multiple of the rows of a tile on every processor
constexpr int kBlockPanels = 4;           // of the right factor
constexpr int kPanelBytes = 16 * 1024;    // of a panel that are used at a time, half of a small first-level cache
constexpr int kBlockSums = kBlockPanels * kBlockRows * NR;

inline f32 load_as_f32(const float* p) { return load(p); }
inline f32 load_as_f32(const bf16* p) { return load_bf16(p); }
inline float as_f32(float x) { return x; }
inline float as_f32(bf16 x) { return from_bf16(x); }
inline void store_as(float* p, f32 v) { store(p, v); }
inline void store_as(bf16* p, f32 v) { store_bf16(p, v); }
inline void set_as(float* p, float x) { *p = x; }
inline void set_as(bf16* p, float x) { *p = to_bf16(x); }

// work(a pointer of the type that `format` says), for pointers that come through the C interface.
template <class Work>
inline void with_format(const void* data, int format, const Work& work) {
    if (format == GEMEL_BF16) return work(static_cast<const bf16*>(data));
    work(static_cast<const float*>(data));
}
template <class Work>
inline void with_format(void* data, int format, const Work& work) {
    if (format == GEMEL_BF16) return work(static_cast<bf16*>(data));
    work(static_cast<float*>(data));
}

// The type in which two factors are multiplied.
#if GEMEL_AVX512
template <class Left, class Right>
using Multiplied = std::conditional_t<std::is_same_v<Left, bf16> && std::is_same_v<Right, bf16>, bf16, float>;
#else
template <class Left, class Right>
using Multiplied = float;
#endif

// k as packed: bf16 is multiplied in pairs, and the partner of an odd one out is zero.
template <class P>
constexpr int padded(int k) {
    return std::is_same_v<P, bf16> ? (k + 1) / 2 * 2 : k;
}

// An odd number of units of 64: rows of a tile then begin in different sets of a cache, also where k is a power of two.
inline int64_t spread(int k) { return ((k + 63) / 64 | 1) * 64; }

// --- packing ------------------------------------------------------------------------------------------------------------------------
// Into lines: number j of line i at to[i * width + j]; bf16 in pairs of lines: at to[(i / 2 * width + j) * 2 + i % 2]. Beyond `count` numbers
// a line is zero.

// From memory in which a line's numbers are contiguous: at from[i * ld + j].
template <class T>
void pack_lines(const T* from, int64_t ld, int k, int count, int width, float* to) {
    int i = 0;
    if (count < W && count == width && ld >= count) {  // a tile: what is written behind a line is overwritten by the next ones
        for (; (k - 1 - i) * ld + count >= W && (k - i) * width >= W; i++, from += ld, to += width) store(to, load_as_f32(from));
    }
    for (; i < k; i++, from += ld, to += width) {
        int j = 0;
        for (; j + W <= count; j += W) store(to + j, load_as_f32(from + j));
        for (; j < count; j++) to[j] = as_f32(from[j]);
        for (; j < width; j++) to[j] = 0.0f;
    }
}
void pack_lines(const bf16* from, int64_t ld, int k, int count, int width, bf16* to);

// From memory in which a number's lines are contiguous: at from[j * ld + i].
void pack_turned(const float* from, int64_t ld, int k, int count, int width, float* to);
void pack_turned(const bf16* from, int64_t ld, int k, int count, int width, float* to);
void pack_turned(const bf16* from, int64_t ld, int k, int count, int width, bf16* to);

// The left factor, into tiles: those that `in_tiles` makes of the rows, one after the other, each packed as a panel of as many columns as it has
// rows. A row takes k numbers, the tile that begins with row r begins at to + r * k; k is as packed.

// From memory in which a row's numbers are contiguous: at from[r * ld + i].
template <class T, class P>
void pack_rows(const T* from, int64_t ld, int rows, int k, P* to) {
    in_tiles<kRows>(rows, [&](auto n, int r) { pack_turned(from + r * ld, ld, k, n, n, to + int64_t{r} * padded<P>(k)); });
}

// From memory in which a number's rows are contiguous: at from[i * ld + r].
template <class T, class P>
void turn_rows(const T* from, int64_t ld, int rows, int k, P* to) {
    in_tiles<kRows>(rows, [&](auto n, int r) { pack_lines(from + r, ld, k, n, n, to + int64_t{r} * padded<P>(k)); });
}

// --- multiplying --------------------------------------------------------------------------------------------------------------------

// c [R][NR] (+)= a tile of rows times a panel.
template <int R>
inline void tile(const float* a, const float* w, int k, float* c, bool add) {
    tile_known<R, 1, R>(a, w, k, c, NR, add);
}
#if GEMEL_AVX512
template <int R>
[[gnu::noinline]] void tile(const bf16* a, const bf16* w, int k, float* c, bool add) {
    f32 left[R], right[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        left[r] = add ? load(c + r * NR) : zero();
        right[r] = add ? load(c + r * NR + W) : zero();
    }
#pragma GCC unroll 2
    for (int i = 0; i < k; i += 2, a += 2 * R, w += 2 * NR) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 2 * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, a + 2 * r, 4);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            left[r] = _mm512_dpbf16_ps(left[r], w0, x);
            right[r] = _mm512_dpbf16_ps(right[r], w1, x);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        store(c + r * NR, left[r]);
        store(c + r * NR + W, right[r]);
    }
}
#endif

// sums [panels][kBlockRows][NR] (+)= a block of rows in tiles, in which a row takes `row` numbers, times panels, of which number p begins at
// panels + p * panel_size. k is as packed.
template <class P>
void multiply(const P* block, int64_t row, int rows, const P* panels, int64_t panel_size, int num_panels, int k, float* sums, bool add) {
    constexpr int kStretch = kPanelBytes / static_cast<int>(sizeof(P)) / NR;
    for (int from = 0; from < k; from += kStretch) {
        const int count = k - from < kStretch ? k - from : kStretch;
        for (int p = 0; p < num_panels; p++) {
            const P* w = panels + p * panel_size + static_cast<int64_t>(from) * NR;
            float* c = sums + static_cast<int64_t>(p) * kBlockRows * NR;
            in_tiles<kRows>(rows, [&](auto n, int r) { tile<n>(block + r * row + from * n, w, count, c + r * NR, add || from); });
        }
    }
}

}  // namespace gemel
