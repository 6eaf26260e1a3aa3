// Low-bit weights: how a panel lies in memory, what its numbers are, and integer products with it.
//
// Panels follow one another; each is read from its first byte to its last and never touched again, which is all that a memory bus asks for.
//
//   F32            [k][NR]                     I8, a scale per row   fp32 scales [NR], then [k/4][NR][4]
//   BF16           [k/2][NR][2]                I8, groups of 32      per group: fp16 scales [NR], then [8][NR][4]
//   I4             per group: fp16 scales [NR], fp16 minima [NR] if there are any, then [group/8][NR][4]: of the eight numbers of a column,
//                  byte j holds the j-th in its lower and the (4+j)-th in its upper half, so one load gives two quads
//
// Sums of products within 32 elements along k are whole numbers, exact in any order; only they differ between instruction sets.
#pragma once

#include "gemel.h"
#include "tile.h"

namespace gemel {

constexpr int kGroup = 32;  // activations that share a scale

// --- panels -------------------------------------------------------------------------------------------------------------------------

inline int64_t head_bytes(const gemel_weight& w) { return w.format == GEMEL_I8 && !w.group ? NR * 4 : 0; }

inline int64_t scale_bytes(const gemel_weight& w) { return w.group ? (w.minima ? 4 : 2) * NR : 0; }  // of one group

// From one place along k to another; k is a multiple of the group.
inline int64_t bytes_along(const gemel_weight& w, int k) {
    const int64_t count = static_cast<int64_t>(k) * NR;
    if (w.format == GEMEL_F32) return 4 * count;
    if (w.format == GEMEL_BF16) return 2 * count;
    return (w.format == GEMEL_I8 ? count : count / 2) + (w.group ? k / w.group * scale_bytes(w) : 0);
}

inline int64_t panel_bytes(const gemel_weight& w) { return (head_bytes(w) + bytes_along(w, w.k) + 63) / 64 * 64; }

inline const uint8_t* panel_at(const gemel_weight& w, int panel, int k) {
    return static_cast<const uint8_t*>(w.packed) + panel * panel_bytes(w) + head_bytes(w) + bytes_along(w, k);
}

// --- whole numbers ------------------------------------------------------------------------------------------------------------------
// A quad is four numbers along k for each of W columns. Each set says how quads of 8-bit weights (Quad) and of 4-bit weights (Nibbles) are
// held, how products with the same quad of a row's activations are added to a sum (`dot`), and how sums begin and become fp32 (`finish`).

#if GEMEL_AVX512
constexpr int kIntegerRows = 8;
constexpr int kOffset = 128;  // what makes an 8-bit weight unsigned in memory: vpdpbusd takes one factor without and one with a sign

using i32 = __m512i;
struct Quad {
    i32 w;
};
using Activation4 = i32;
using Sum = i32;
using Sum4 = i32;
using Nibbles = i32;

inline i32 load_i32(const void* p) { return _mm512_loadu_si512(p); }
template <int shift>
inline f32 signed_byte(i32 v) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(v, shift), _mm512_set1_epi32(255)), _mm512_set1_epi32(kOffset)));
}
template <int shift>
inline f32 nibble(i32 v) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, shift), _mm512_set1_epi32(15)));
}

inline Activation4 activations(const int8_t* q) {
    int32_t quad;
    std::memcpy(&quad, q, 4);
    return _mm512_set1_epi32(quad);
}
inline Quad load_quad(const uint8_t* p) { return {load_i32(p)}; }
inline Sum begin(int32_t start) { return _mm512_set1_epi32(start); }
inline Sum dot(Sum sum, Quad w, Activation4 x) { return _mm512_dpbusd_epi32(sum, w.w, x); }
inline f32 finish(Sum sum) { return _mm512_cvtepi32_ps(sum); }

inline Sum4 begin4(int32_t start) { return _mm512_set1_epi32(start); }
inline void load_nibbles(const uint8_t* p, i32& low, i32& high) {
    const i32 both = load_i32(p), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
inline Sum4 dot4(Sum4 sum, i32 w, Activation4 x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline f32 finish4(Sum4 sum, int32_t) { return _mm512_cvtepi32_ps(sum); }

#elif GEMEL_AVX2
constexpr int kIntegerRows = 4;
constexpr int kOffset = 0;

using i32 = __m256i;
struct Quad {
    i32 w, size;  // with its sign, and without
};
using Activation4 = i32;
using Sum = i32;   // 32 bits
using Sum4 = i32;  // pairs of 16 bits: 8 quads of at most 15 * 127 twice stay below 2^15
using Nibbles = i32;

inline i32 load_i32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <int shift>
inline f32 signed_byte(i32 v) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - shift), 24));
}
template <int shift>
inline f32 nibble(i32 v) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v, shift), _mm256_set1_epi32(15)));
}

inline Activation4 activations(const int8_t* q) {
    int32_t quad;
    std::memcpy(&quad, q, 4);
    return _mm256_set1_epi32(quad);
}
inline Quad load_quad(const uint8_t* p) {
    const i32 w = load_i32(p);
    return {w, _mm256_abs_epi8(w)};
}
inline Sum begin(int32_t start) { return _mm256_set1_epi32(start); }
inline Sum dot(Sum sum, Quad w, Activation4 x) {
    // The sign goes over to the activation, because the first factor has none. 127 * 127 twice stays below 2^15.
    const i32 pairs = _mm256_maddubs_epi16(w.size, _mm256_sign_epi8(x, w.w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline f32 finish(Sum sum) { return _mm256_cvtepi32_ps(sum); }

inline Sum4 begin4(int32_t) { return _mm256_setzero_si256(); }
inline void load_nibbles(const uint8_t* p, i32& low, i32& high) {
    const i32 both = load_i32(p), mask = _mm256_set1_epi8(15);
    low = _mm256_and_si256(both, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
}
inline Sum4 dot4(Sum4 sum, i32 w, Activation4 x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
inline f32 finish4(Sum4 sum, int32_t start) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(start)));
}

#else  // whole numbers below 2^24 are exact in fp32, and every processor multiplies those quickly
constexpr int kIntegerRows = 2;
constexpr int kOffset = 0;

using i32 = i32v;
struct Quad {
    f32 w[4];
};
struct Activation4 {
    f32 x[4];
};
using Sum = f32;
using Sum4 = f32;
using Nibbles = Quad;

inline i32 load_i32(const void* p) {
    i32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int shift>
inline f32 signed_byte(i32 v) {
    return __builtin_convertvector((v << (24 - shift)) >> 24, f32);
}
template <int shift>
inline f32 nibble(i32 v) {
    return __builtin_convertvector((v >> shift) & 15, f32);
}

inline Activation4 activations(const int8_t* q) { return {{set1(q[0]), set1(q[1]), set1(q[2]), set1(q[3])}}; }
inline Quad load_quad(const uint8_t* p) {
    const i32 v = load_i32(p);
    return {{signed_byte<0>(v), signed_byte<8>(v), signed_byte<16>(v), signed_byte<24>(v)}};
}
inline Sum begin(int32_t start) { return set1(static_cast<float>(start)); }
inline Sum dot(Sum sum, const Quad& w, const Activation4& x) {
    return fma(w.w[3], x.x[3], fma(w.w[2], x.x[2], fma(w.w[1], x.x[1], fma(w.w[0], x.x[0], sum))));
}
inline f32 finish(Sum sum) { return sum; }

inline Sum4 begin4(int32_t start) { return begin(start); }
inline void load_nibbles(const uint8_t* p, Quad& low, Quad& high) {
    const i32 v = load_i32(p);
    low = {{nibble<0>(v), nibble<8>(v), nibble<16>(v), nibble<24>(v)}};
    high = {{nibble<4>(v), nibble<12>(v), nibble<20>(v), nibble<28>(v)}};
}
inline Sum4 dot4(Sum4 sum, const Quad& w, const Activation4& x) { return dot(sum, w, x); }
inline f32 finish4(Sum4 sum, int32_t) { return sum; }
#endif

// Round 32 numbers times `factor`, to nearest, ties to even; their sum.
inline int32_t round_group(const float* x, float factor, int8_t* q) {
#if GEMEL_AVX512 || GEMEL_AVX2
    __m256i part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(factor)));
    // Packing works within halves of 128 bits, so quads come out in the order 0 2 4 6 1 3 5 7.
    const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    const __m256i ordered = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), ordered);
    const __m256i all = _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3]));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
#else
    int32_t total = 0;
    for (int i = 0; i < kGroup; i += W) {
        float lanes[W];
        store(lanes, round(mul(load(x + i), set1(factor))));
        for (int j = 0; j < W; j++) total += q[i + j] = static_cast<int8_t>(lanes[j]);
    }
    return total;
#endif
}

// Rows of rounded activations, from some place along k on.
struct Rounded {
    const int8_t* q;       // [rows, ld]
    const int16_t* wide;   // [rows, ld], the same, or nothing where no kernel wants it
    const float* scale;    // [rows, groups]
    const float* sum;      // [rows, groups]: scale times the sum of the group's q
    const int32_t* start;  // [rows, groups]: where whole sums begin: minus what the weights' offset adds to them
    int64_t ld, groups;
};

// k elements of R rows times P panels, which begin `next` bytes apart in w and R * NR apart in c [P][R][NR]. Each group of 32 is one step:
// c = fma(whole sum, scale of the weights * scale of the row, c). Scales per row of the weight are left to the epilogue.
template <int R, int P, bool scaled>
[[gnu::noinline]] void tile_i8(const Rounded& x, const uint8_t* w, int64_t next, int k, float* c, bool add) {
    if (!add) std::memset(c, 0, sizeof(float) * P * R * NR);
    for (int g = 0; g < k / kGroup; g++) {
        const fp16* head = reinterpret_cast<const fp16*>(w);
        if (scaled) w += 2 * NR;
        Sum left[P][R], right[P][R];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) left[p][r] = right[p][r] = begin(x.start[r * x.groups + g]);
        }
#pragma GCC unroll 1
        for (int i = 0; i < kGroup; i += 4, w += 4 * NR) {
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const Quad w0 = load_quad(w + p * next), w1 = load_quad(w + p * next + 4 * W);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const Activation4 q = activations(x.q + r * x.ld + g * kGroup + i);
                    left[p][r] = dot(left[p][r], w0, q);
                    right[p][r] = dot(right[p][r], w1, q);
                }
            }
        }
        keep_in_memory();
#pragma GCC unroll 4
        for (int p = 0; p < P; p++, head += next / 2) {
            f32 scale0 = zero(), scale1 = zero();
            if (scaled) scale0 = load_fp16(head), scale1 = load_fp16(head + W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const f32 scale = set1(x.scale[r * x.groups + g]);
                float* sums = c + (p * R + r) * NR;
                store(sums, fma(finish(left[p][r]), scaled ? mul(scale0, scale) : scale, load(sums)));
                store(sums + W, fma(finish(right[p][r]), scaled ? mul(scale1, scale) : scale, load(sums + W)));
            }
        }
    }
}

// The same with 4-bit weights in groups of `group`, a multiple of 32; a group's minimum goes in with the sums of the activations.
template <int R, int P, bool minima>
[[gnu::noinline]] void tile_i4(const Rounded& x, const uint8_t* w, int64_t next, int group, int k, float* c, bool add) {
    if (!add) std::memset(c, 0, sizeof(float) * P * R * NR);
    for (int from = 0; from < k; from += group) {
        const uint8_t* const group_head = w;
        w += (minima ? 4 : 2) * NR;
        for (int g = from / kGroup; g < (from + group) / kGroup; g++) {
            Sum4 left[P][R], right[P][R];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) left[p][r] = right[p][r] = begin4(x.start[r * x.groups + g]);
            }
#pragma GCC unroll 1
            for (int i = 0; i < kGroup; i += 8, w += 4 * NR) {
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) {
                                        Nibbles low0, high0, low1, high1;
                    load_nibbles(w + p * next, low0, high0);
                    load_nibbles(w + p * next + 4 * W, low1, high1);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const int8_t* q = x.q + r * x.ld + g * kGroup + i;
                        const Activation4 first = activations(q), second = activations(q + 4);
                        left[p][r] = dot4(dot4(left[p][r], low0, first), high0, second);
                        right[p][r] = dot4(dot4(right[p][r], low1, first), high1, second);
                    }
                }
            }
            keep_in_memory();
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const fp16* head = reinterpret_cast<const fp16*>(group_head + p * next);
                const f32 scale0 = load_fp16(head), scale1 = load_fp16(head + W);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const int64_t at = r * x.groups + g;
                    const f32 scale = set1(x.scale[at]);
                    float* sums = c + (p * R + r) * NR;
                    f32 sum0 = fma(finish4(left[p][r], x.start[at]), mul(scale0, scale), load(sums));
                    f32 sum1 = fma(finish4(right[p][r], x.start[at]), mul(scale1, scale), load(sums + W));
                    if (minima) {
                        sum0 = fma(load_fp16(head + NR), set1(x.sum[at]), sum0);
                        sum1 = fma(load_fp16(head + NR + W), set1(x.sum[at]), sum1);
                    }
                    store(sums, sum0);
                    store(sums + W, sum1);
                }
            }
        }
    }
}

// --- back to fp32 -------------------------------------------------------------------------------------------------------------------

// Call use(i, columns 0..W, columns W..NR) for the `k` rows of a panel from place `from` on, 0 <= i < k, in order.
template <class Use>
inline void widen(const gemel_weight& weight, int panel, int from, int k, const Use& use) {
    const uint8_t* p = panel_at(weight, panel, from);
    if (weight.format == GEMEL_F32) {
        const float* w = reinterpret_cast<const float*>(p);
        for (int i = 0; i < k; i++, w += NR) use(i, load(w), load(w + W));
    } else if (weight.format == GEMEL_BF16) {
        const bf16* w = reinterpret_cast<const bf16*>(p);
        for (int i = 0; i < k; i += 2, w += 2 * NR) {
            use(i, load_first(w), load_first(w + 2 * W));
            use(i + 1, load_second(w), load_second(w + 2 * W));
        }
    } else if (weight.format == GEMEL_I8) {
        const float* head = reinterpret_cast<const float*>(panel_at(weight, panel, 0) - head_bytes(weight));
        f32 scale0 = zero(), scale1 = zero();
        if (!weight.group) scale0 = load(head), scale1 = load(head + W);
        for (int i = 0; i < k; i += 4, p += 4 * NR) {
            if (weight.group && i % kGroup == 0) {
                scale0 = load_fp16(reinterpret_cast<const fp16*>(p));
                scale1 = load_fp16(reinterpret_cast<const fp16*>(p) + W);
                p += 2 * NR;
            }
            const i32 left = load_i32(p), right = load_i32(p + 4 * W);
            use(i, mul(scale0, signed_byte<0>(left)), mul(scale1, signed_byte<0>(right)));
            use(i + 1, mul(scale0, signed_byte<8>(left)), mul(scale1, signed_byte<8>(right)));
            use(i + 2, mul(scale0, signed_byte<16>(left)), mul(scale1, signed_byte<16>(right)));
            use(i + 3, mul(scale0, signed_byte<24>(left)), mul(scale1, signed_byte<24>(right)));
        }
    } else {
        f32 scale0 = zero(), scale1 = zero(), minimum0 = zero(), minimum1 = zero();
        for (int i = 0; i < k; i += 8, p += 4 * NR) {
            if (i % weight.group == 0) {
                const fp16* head = reinterpret_cast<const fp16*>(p);
                scale0 = load_fp16(head);
                scale1 = load_fp16(head + W);
                minimum0 = weight.minima ? load_fp16(head + NR) : mul(scale0, set1(-8.0f));
                minimum1 = weight.minima ? load_fp16(head + NR + W) : mul(scale1, set1(-8.0f));
                p += scale_bytes(weight);
            }
            const i32 left = load_i32(p), right = load_i32(p + 4 * W);
            use(i, fma(scale0, nibble<0>(left), minimum0), fma(scale1, nibble<0>(right), minimum1));
            use(i + 1, fma(scale0, nibble<8>(left), minimum0), fma(scale1, nibble<8>(right), minimum1));
            use(i + 2, fma(scale0, nibble<16>(left), minimum0), fma(scale1, nibble<16>(right), minimum1));
            use(i + 3, fma(scale0, nibble<24>(left), minimum0), fma(scale1, nibble<24>(right), minimum1));
            use(i + 4, fma(scale0, nibble<4>(left), minimum0), fma(scale1, nibble<4>(right), minimum1));
            use(i + 5, fma(scale0, nibble<12>(left), minimum0), fma(scale1, nibble<12>(right), minimum1));
            use(i + 6, fma(scale0, nibble<20>(left), minimum0), fma(scale1, nibble<20>(right), minimum1));
            use(i + 7, fma(scale0, nibble<28>(left), minimum0), fma(scale1, nibble<28>(right), minimum1));
        }
    }
}

}  // namespace gemel
