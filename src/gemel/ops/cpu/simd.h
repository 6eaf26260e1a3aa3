// One vector of floats, whatever the processor calls it, and the few operations that the kernels are written in.
//
// The same sources are compiled once per instruction set; this file is where the sets differ, next to the integer products of
// products.h. Nothing is left to the compiler's taste where results would depend on it: a fused multiply-add is asked for by name, and
// sums over lanes have one fixed order, so a row's numbers never depend on which loop they went through.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(GEMEL_EMULATE_AVX512)  // AVX-512 in plain C, to test that variant on processors without it
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
// What SIMDe 0.7 lacks, by halves.
inline __m512 gemel_cvtph_ps(__m256i v) {
    const __m512 low = _mm512_castps256_ps512(_mm256_cvtph_ps(_mm256_castsi256_si128(v)));
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(low), _mm256_castps_pd(_mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))), 1));
}
inline __m512i gemel_cvtps_epi32(__m512 v) {
    const __m512i low = _mm512_castsi256_si512(_mm256_cvtps_epi32(_mm512_castps512_ps256(v)));
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    return _mm512_inserti64x4(low, _mm256_cvtps_epi32(high), 1);
}
inline __m512 gemel_cvtepi32_ps(__m512i v) {
    const __m512 low = _mm512_castps256_ps512(_mm256_cvtepi32_ps(_mm512_castsi512_si256(v)));
    const __m256 high = _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(low), _mm256_castps_pd(high), 1));
}
inline __m512i gemel_cvtepu16_epi32(__m256i v) {
    const __m512i low = _mm512_castsi256_si512(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)));
    return _mm512_inserti64x4(low, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)), 1);
}
#define _mm512_cvtepu16_epi32 gemel_cvtepu16_epi32
#define _mm512_cvtph_ps gemel_cvtph_ps
#define _mm512_cvtps_epi32 gemel_cvtps_epi32
#define _mm512_cvtepi32_ps gemel_cvtepi32_ps
#elif defined(__x86_64__) && defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // what GCC 12 says of its own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace gemel {

using bf16 = uint16_t;  // the upper half of an fp32
using fp16 = uint16_t;

inline bf16 to_bf16(float value) {  // nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline float from_fp16(fp16 value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
    const uint32_t magnitude = value & 0x7fff;
    float out;
    if (magnitude < 0x400) {  // subnormal: magnitude times 2^-24
        out = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    } else {
        const uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000u : (magnitude << 13) + 0x38000000u;
        std::memcpy(&out, &bits, 4);
    }
    return sign ? -out : out;
}

inline fp16 to_fp16(float value) {  // nearest, ties to even; beyond the range: infinity
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<fp16>(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return static_cast<fp16>(sign | 0x7c00);
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lines the bits up, and rounds them
        float lined;
        std::memcpy(&lined, &magnitude, 4);
        lined += 0.5f;
        uint32_t out;
        std::memcpy(&out, &lined, 4);
        return static_cast<fp16>(sign | (out - 0x3f000000u));
    }
    return static_cast<fp16>(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

// --- vectors ------------------------------------------------------------------------------------------------------------------------

#if defined(GEMEL_EMULATE_AVX512) || (defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define GEMEL_AVX512 1
#define GEMEL_VARIANT "avx512 bf16 vnni"
constexpr int W = 16;
using f32 = __m512;

inline f32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, f32 v) { _mm512_storeu_ps(p, v); }
inline f32 set1(float x) { return _mm512_set1_ps(x); }
inline f32 add(f32 a, f32 b) { return _mm512_add_ps(a, b); }
inline f32 sub(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
inline f32 mul(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
inline f32 div(f32 a, f32 b) { return _mm512_div_ps(a, b); }
inline f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
inline f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
inline f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
inline f32 sqrt(f32 a) { return _mm512_sqrt_ps(a); }
inline f32 round(f32 a) { return _mm512_roundscale_ps(a, 8); }
inline f32 pow2(f32 whole) {  // 2^whole for whole numbers in [-126, 127]
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127)), 23));
}
inline f32 load_bf16(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline f32 load_fp16(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline f32 load_i8(const int8_t* p) {
#if defined(GEMEL_EMULATE_AVX512)  // SIMDe 0.7 widens to eight lanes at most
    const __m256i low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)));
    return _mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#else
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
}
inline f32 zero_below(f32 limit, f32 x, f32 v) {  // v, and 0 where x < limit
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), _mm512_setzero_ps());
}
inline uint32_t at_least(f32 limit, f32 x) { return _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ); }  // a bit per lane where x >= limit
// W pairs of bf16: the first of each pair, and the second.
inline f32 load_first(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline f32 load_second(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GEMEL_AVX2 1
#define GEMEL_VARIANT "avx2"
constexpr int W = 8;
using f32 = __m256;

inline f32 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, f32 v) { _mm256_storeu_ps(p, v); }
inline f32 set1(float x) { return _mm256_set1_ps(x); }
inline f32 add(f32 a, f32 b) { return _mm256_add_ps(a, b); }
inline f32 sub(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
inline f32 mul(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
inline f32 div(f32 a, f32 b) { return _mm256_div_ps(a, b); }
inline f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
inline f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
inline f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
inline f32 sqrt(f32 a) { return _mm256_sqrt_ps(a); }
inline f32 round(f32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline f32 pow2(f32 whole) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}
inline f32 load_bf16(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline f32 load_fp16(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline f32 load_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline f32 zero_below(f32 limit, f32 x, f32 v) { return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), v); }
inline uint32_t at_least(f32 limit, f32 x) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ))); }
inline f32 load_first(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
inline f32 load_second(const bf16* p) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask));
}

#else  // any processor: vectors of the compiler, no fused multiply-add (compile with -ffp-contract=off)
#define GEMEL_VARIANT "generic"
constexpr int W = 4;
typedef float f32 __attribute__((vector_size(16)));
typedef int32_t i32v __attribute__((vector_size(16)));
typedef uint32_t u32v __attribute__((vector_size(16)));

inline f32 load(const float* p) {
    f32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, f32 v) { std::memcpy(p, &v, sizeof v); }
inline f32 set1(float x) { return f32{x, x, x, x}; }
inline f32 add(f32 a, f32 b) { return a + b; }
inline f32 sub(f32 a, f32 b) { return a - b; }
inline f32 mul(f32 a, f32 b) { return a * b; }
inline f32 div(f32 a, f32 b) { return a / b; }
inline f32 fma(f32 a, f32 b, f32 c) { return a * b + c; }
inline f32 max(f32 a, f32 b) { return a > b ? a : b; }
inline f32 min(f32 a, f32 b) { return a < b ? a : b; }
inline f32 sqrt(f32 a) { return f32{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
inline f32 round(f32 a) {  // adding 1.5 * 2^23 pushes the fraction out, to nearest even; for |a| < 2^22
    const f32 magic = set1(12582912.0f);
    return (a + magic) - magic;
}
inline f32 pow2(f32 whole) {
    const i32v bits = (__builtin_convertvector(whole, i32v) + 127) << 23;
    f32 out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
inline f32 load_bf16(const bf16* p) { return f32{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])}; }
inline f32 load_fp16(const fp16* p) { return f32{from_fp16(p[0]), from_fp16(p[1]), from_fp16(p[2]), from_fp16(p[3])}; }
inline f32 load_i8(const int8_t* p) { return f32{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline f32 zero_below(f32 limit, f32 x, f32 v) {  // v, and 0 where x < limit
    i32v bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= ~(x < limit);
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
inline uint32_t at_least(f32 limit, f32 x) {
    const i32v bits = (x >= limit) & i32v{1, 2, 4, 8};
    return static_cast<uint32_t>(bits[0] | bits[1] | bits[2] | bits[3]);
}
inline f32 as_floats(u32v bits) {
    f32 v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
inline u32v load_bits(const bf16* p) {  // little-endian, as everything we support
    u32v bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}
inline f32 load_first(const bf16* p) { return as_floats(load_bits(p) << 16); }
inline f32 load_second(const bf16* p) { return as_floats(load_bits(p) & 0xffff0000u); }
#endif

inline f32 zero() { return set1(0.0f); }

// sum += a * b where sum lies: a compiler that chooses freely overwrites a factor instead, and runs out of registers in long lists of sums.
inline void accumulate(f32& sum, f32 a, f32 b) {
#if GEMEL_AVX2
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
    sum = fma(a, b, sum);
#endif
}

inline float sum(f32 v) {  // lanes i and i + half, again and again
    float lanes[W];
    store(lanes, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float largest(f32 v) {
    float lanes[W];
    store(lanes, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// e^x to about 2 units in the last place; below -87.3 the smallest normal number, above 88.3 the largest finite power.
inline f32 exp(f32 x) {
    x = max(min(x, set1(88.3f)), set1(-87.3f));
    const f32 whole = round(mul(x, set1(1.44269504f)));
    f32 rest = fma(whole, set1(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
    rest = fma(whole, set1(2.12194440e-4f), rest);
    f32 p = set1(1.0f / 720.0f);
    p = fma(p, rest, set1(1.0f / 120.0f));
    p = fma(p, rest, set1(1.0f / 24.0f));
    p = fma(p, rest, set1(1.0f / 6.0f));
    p = fma(p, rest, set1(0.5f));
    p = fma(p, rest, set1(1.0f));
    p = fma(p, rest, set1(1.0f));
    return mul(p, pow2(whole));
}

// 2^x to about 2 units in the last place, for x <= 0; exactly 1 at 0, and exactly 0 below -126. NaN stays NaN.
inline f32 exp2(f32 x) {
    const f32 limit = set1(-126.0f), clipped = max(limit, x);
    const f32 whole = round(clipped), rest = sub(clipped, whole);
    f32 p = set1(1.3264727e-3f);  // equal ripple of the relative error, 9e-8
    p = fma(p, rest, set1(9.671513e-3f));
    p = fma(p, rest, set1(5.5507336e-2f));
    p = fma(p, rest, set1(2.4022242e-1f));
    p = fma(p, rest, set1(6.93147e-1f));
    p = fma(p, rest, set1(1.0f));
    return zero_below(limit, x, mul(p, pow2(whole)));
}

inline void store_bf16(bf16* p, f32 v) {
#if GEMEL_AVX2
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(nearest), _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000))),
                                         _mm256_cmp_ps(v, v, _CMP_UNORD_Q));  // NaN stays NaN
    const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
#else
    float lanes[W];
    store(lanes, v);
    for (int i = 0; i < W; i++) p[i] = to_bf16(lanes[i]);
#endif
}

}  // namespace gemel
