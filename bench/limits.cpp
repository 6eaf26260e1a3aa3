// What this processor can do at most, measured the plainest way: reading memory in order, and multiplying in registers without touching it.
//
// Compiled by kernels.py for the processor it runs on, apart from the kernels: a limit that came out of the code it judges would be none.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds from when all threads stand ready until the last has done body(rank).
template <class Body>
double together(int threads, const Body& body) {
    std::atomic<int> ready{0};
    std::vector<double> begun(threads), ended(threads);
    std::vector<std::thread> team;
    for (int rank = 0; rank < threads; rank++) {
        team.emplace_back([&, rank] {
            ready++;
            while (ready < threads) std::this_thread::yield();
            begun[rank] = now_s();
            body(rank);
            ended[rank] = now_s();
        });
    }
    for (std::thread& thread : team) thread.join();
    double first = begun[0], last = ended[0];
    for (int rank = 1; rank < threads; rank++) {
        first = begun[rank] < first ? begun[rank] : first;
        last = ended[rank] > last ? ended[rank] : last;
    }
    return last - first;
}

volatile int64_t sink;

#if defined(__AVX512F__)
using Floats = __m512;
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
using Floats = __m256;
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Floats __attribute__((vector_size(16)));
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

constexpr int kChains = 12;  // independent sums: more than latency times units of any processor we know
constexpr int64_t kRounds = 20'000'000;

// Operations per second of `step`, which does `operations` of them on one of kChains sums.
template <class Vector, class Step>
double rate(int threads, int operations, const Step& step) {
    const double seconds = together(threads, [&](int) {
        Vector sums[kChains] = {};
        for (int64_t round = 0; round < kRounds / kChains; round++) {
#pragma GCC unroll 12
            for (int i = 0; i < kChains; i++) {
                sums[i] = step(sums[i]);
                asm volatile("" : "+x"(sums[i]));  // each step is done, and in a register
            }
        }
    });
    return static_cast<double>(threads) * (kRounds / kChains * kChains) * operations / seconds;
}

}  // namespace

extern "C" {

// Seconds of one pass over the memory, cut into one piece per thread.
double limits_read(const void* data, int64_t bytes, int threads) {
    typedef int64_t Words __attribute__((vector_size(64)));
    const Words* words = static_cast<const Words*>(data);
    const int64_t count = bytes / static_cast<int64_t>(sizeof(Words)) / threads / 4 * 4;
    return together(threads, [&](int rank) {
        Words sums[4] = {};
        const Words* own = words + rank * count;
        for (int64_t i = 0; i < count; i += 4) {
            for (int j = 0; j < 4; j++) sums[j] += own[i + j];
        }
        sink = (sums[0] + sums[1] + sums[2] + sums[3])[0];
    });
}

// Operations per second, a multiplication and an addition being two; 0 where there is no such instruction.
double limits_float32(int threads) {
    Floats a = {}, b = {};
    asm volatile("" : "+x"(a), "+x"(b));
    return rate<Floats>(threads, 2 * static_cast<int>(sizeof(Floats) / 4), [=](Floats sum) { return multiply_add(a, b, sum); });
}

double limits_bfloat16(int threads) {
#if defined(__AVX512BF16__)
    __m512bh a = {}, b = {};
    asm volatile("" : "+x"(a), "+x"(b));
    return rate<__m512>(threads, 64, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, a, b); });
#else
    (void)threads;
    return 0;
#endif
}

double limits_int8(int threads) {
#if defined(__AVX512VNNI__)
    __m512i a = {}, b = {};
    asm volatile("" : "+x"(a), "+x"(b));
    return rate<__m512i>(threads, 128, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, b); });
#elif defined(__AVX2__)  // bytes to pairs to fours, then add: three instructions
    __m256i a = {}, b = {}, ones = {};
    asm volatile("" : "+x"(a), "+x"(b), "+x"(ones));
    return rate<__m256i>(threads, 64, [=](__m256i sum) {
        __m256i pairs = _mm256_maddubs_epi16(a, b);
        asm volatile("" : "+x"(pairs));  // the same every time, which the compiler must not notice
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    });
#else
    (void)threads;
    return 0;
#endif
}

}  // extern "C"
