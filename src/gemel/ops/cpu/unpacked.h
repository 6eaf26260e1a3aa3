// Blocks of many rows on processors that have no dot product of bytes: a stretch of a panel is unpacked once into numbers of twice their
// width, and every row then needs half the instructions.
//
//   8 bits become pairs of 16 along k: one instruction multiplies and adds a pair, one sums. As bytes they would need their signs moved over
//   to the activations, row by row, and another instruction to widen the pairs.
//   4 bits become quads of bytes without a sign: 8 quads of products with a row's quads, at most 15 * 127 each, fit into 16 bits.
//
// Whole sums are exact and what follows them is the same arithmetic as in products.h, so a row has the same bits here and there.
#pragma once

#include "products.h"

#if GEMEL_AVX2

namespace gemel {

constexpr int kUnpackedAlong = 256;  // places along k at once: 8 KB of 16-bit numbers beside 3 KB of activations
constexpr int kUnpackedRows = 6;     // most rows of a tile
constexpr int kUnpackedFrom = 4;     // rows of a block from which unpacking pays

struct Unpacked {
    alignas(64) uint8_t numbers[kUnpackedAlong * NR * 2];
    alignas(64) float scale[kUnpackedAlong / kGroup][NR], minimum[kUnpackedAlong / kGroup][NR];
};

// sum += the sums of pairs of 16-bit products, in place: see `accumulate`.
inline void accumulate_pairs(i32& sum, i32 w, i32 x) {
    i32 product;
    asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(x));
}

// The same with pairs of bytes, the first without a sign, in 16 bits.
inline void accumulate_bytes(i32& sum, i32 w, i32 x) {
    i32 product;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(x));
}

inline void widen_group(const int8_t* q, int16_t* to) {
    for (int i = 0; i < kGroup; i += 16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i));
        _mm256_storeu_si256(reinterpret_cast<i32*>(to + i), _mm256_cvtepi8_epi16(bytes));
    }
}

struct Pairs {  // 8-bit weights
    static constexpr int kAlong = 2;
    using Number = int16_t;
    static const Number* row(const Rounded& x, int r) { return x.wide + r * x.ld; }
    static void add(i32& sum, i32 w, i32 x) { accumulate_pairs(sum, w, x); }
    static f32 finish(i32 sum, int32_t) { return _mm256_cvtepi32_ps(sum); }

    static void unpack(const uint8_t* w, uint8_t* to) {  // a quad of each of W columns
        const i32 quads = load_i32(w), even = _mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8), odd = _mm256_srai_epi16(quads, 8);
        const i32 first = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
        const i32 second = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
        _mm256_store_si256(reinterpret_cast<i32*>(to), first);
        _mm256_store_si256(reinterpret_cast<i32*>(to + 4 * NR), second);
    }
};

struct Quads {  // 4-bit weights
    static constexpr int kAlong = 4;
    using Number = int8_t;
    static const Number* row(const Rounded& x, int r) { return x.q + r * x.ld; }
    static void add(i32& sum, i32 w, i32 x) { accumulate_bytes(sum, w, x); }
    static f32 finish(i32 sum, int32_t start) { return finish4(sum, start); }

    static void unpack(const uint8_t* w, uint8_t* to) {  // two quads of each of W columns
        i32 low, high;
        load_nibbles(w, low, high);
        _mm256_store_si256(reinterpret_cast<i32*>(to), low);
        _mm256_store_si256(reinterpret_cast<i32*>(to + 4 * NR), high);
    }
};

// `k` places of the panel at w, scales first where groups have them.
template <class Numbers>
void unpack(const gemel_weight& weight, const uint8_t* w, int k, Unpacked& into) {
    uint8_t* to = into.numbers;
    const int lines = kGroup / 2 / Numbers::kAlong;  // of 4 NR bytes in a group of 32
    for (int g = 0; g < k / kGroup; g++) {
        if (weight.group && g * kGroup % weight.group == 0) {
            for (int half = 0; half < NR; half += W) {
                store(into.scale[g] + half, load_fp16(reinterpret_cast<const fp16*>(w) + half));
                if (weight.minima) store(into.minimum[g] + half, load_fp16(reinterpret_cast<const fp16*>(w) + NR + half));
            }
            w += scale_bytes(weight);
        } else if (weight.group) {
            std::memcpy(into.scale[g], into.scale[g - 1], sizeof into.scale[g]);
            std::memcpy(into.minimum[g], into.minimum[g - 1], sizeof into.minimum[g]);
        }
        for (int line = 0; line < lines; line++, w += 4 * NR, to += 8 * NR) {
            Numbers::unpack(w, to);
            Numbers::unpack(w + 4 * W, to + 4 * W);
        }
    }
}

// Sums of k places of R rows times one panel, as in tile_i8 and tile_i4.
template <class Numbers, int R, bool scaled, bool minima>
[[gnu::noinline]] void tile_unpacked(const Rounded& x, const Unpacked& w, int k, float* c, bool add) {
    if (!add) std::memset(c, 0, sizeof(float) * R * NR);
    const uint8_t* line = w.numbers;
    for (int g = 0; g < k / kGroup; g++) {
        i32 left[R], right[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) left[r] = right[r] = _mm256_setzero_si256();
        const typename Numbers::Number* a = Numbers::row(x, 0) + g * kGroup;
#pragma GCC unroll 1
        for (int i = 0; i < kGroup; i += Numbers::kAlong, a += Numbers::kAlong, line += 4 * NR) {
            const i32 w0 = load_i32(line), w1 = load_i32(line + 4 * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int32_t some;
                std::memcpy(&some, a + r * x.ld, 4);
                const i32 factor = _mm256_set1_epi32(some);
                Numbers::add(left[r], w0, factor);
                Numbers::add(right[r], w1, factor);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int64_t at = r * x.groups + g;
            const f32 scale = set1(x.scale[at]);
            float* sums = c + r * NR;
            const f32 scale0 = scaled ? mul(load(w.scale[g]), scale) : scale, scale1 = scaled ? mul(load(w.scale[g] + W), scale) : scale;
            f32 sum0 = fma(Numbers::finish(left[r], x.start[at]), scale0, load(sums));
            f32 sum1 = fma(Numbers::finish(right[r], x.start[at]), scale1, load(sums + W));
            if (minima) {
                sum0 = fma(load(w.minimum[g]), set1(x.sum[at]), sum0);
                sum1 = fma(load(w.minimum[g] + W), set1(x.sum[at]), sum1);
            }
            store(sums, sum0);
            store(sums + W, sum1);
        }
    }
}

}  // namespace gemel

#endif
