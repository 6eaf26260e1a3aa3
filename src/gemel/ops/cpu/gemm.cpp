#include "gemm.h"

#include <algorithm>

#include "train.h"
#include "workshop.h"

namespace gemel {
namespace {

constexpr int64_t kSweepBytes = 8 << 20;  // of panels that lie ready at a time, a part of a last-level cache
constexpr int kBlockBytes = 320 << 10;    // of a block of the left factor; longer ones go through in parts, lest they leave the second-level
constexpr int kPartBytes = 128 << 10;     // cache; and the sums of a run of panels stay there meanwhile
constexpr int kRunBytes = 256 << 10;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Eight by eight numbers of 32 bits: column i of `from` becomes row i of `to`. Rows are written in order, so they may overlap.
#if GEMEL_AVX512 || GEMEL_AVX2
inline void turn(__m256 (&v)[8], float* to, int64_t ld) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + i * ld, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + (i + 4) * ld, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
}
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
#endif

// One number at a time, through memcpy because it may stand for a pair of bf16.
inline void move(const float* from, float* to) { std::memcpy(to, from, sizeof(float)); }
inline void move(const bf16* from, float* to) { *to = from_bf16(*from); }

// to[i * ld_to + j] = from[j * ld + i]
template <class T>
void turn_all(const T* from, int64_t ld, int k, int count, float* to, int64_t ld_to) {
    int j = 0;
#if GEMEL_AVX512 || GEMEL_AVX2
    for (; j + 8 <= count; j += 8) {
        int i = 0;
        for (; i + 8 <= k; i += 8) {
            __m256 v[8];
            for (int r = 0; r < 8; r++) v[r] = load8(from + (j + r) * ld + i);
            turn(v, to + i * ld_to + j, ld_to);
        }
        for (; i < k; i++) {
            for (int r = 0; r < 8; r++) move(from + (j + r) * ld + i, to + i * ld_to + j + r);
        }
    }
    if (j == 0 && count == ld_to) {  // a tile: what is written behind a line is overwritten by the next ones
        int i = 0;
        for (; (i + 8) * ld_to + 8 <= k * ld_to; i += 8) {
            __m256 v[8];
            for (int r = 0; r < 8; r++) v[r] = r < count ? load8(from + r * ld + i) : _mm256_setzero_ps();
            turn(v, to + i * ld_to, ld_to);
        }
        for (; i < k; i++) {
            for (int r = 0; r < count; r++) move(from + r * ld + i, to + i * ld_to + r);
        }
        return;
    }
#endif
    for (; j < count; j++) {
        for (int i = 0; i < k; i++) move(from + j * ld + i, to + i * ld_to + j);
    }
}

template <class T>
void turn_lines(const T* from, int64_t ld, int k, int count, int width, float* to) {
    turn_all(from, ld, k, count, to, width);
    if (count == width) return;
    for (int i = 0; i < k; i++) std::memset(to + int64_t{i} * width + count, 0, sizeof(float) * static_cast<size_t>(width - count));
}

// One product. `P` is what is multiplied, `A`, `B`, `C` are what lies in memory.
template <class P, class A, class B, class C>
class Product {
   public:
    Product(Workshop& shop, int m, int n, int k, const A* a, const gemel_factor& left, const B* b, const gemel_factor& right, C* c,
            int64_t ldc, bool add)
        : shop_(shop), m_(m), n_(n), k_(k), a_(a), lda_(left.ld), b_(b), ldb_(right.ld), a_turned_(left.transposed),
          b_turned_(right.transposed), c_(c), ldc_(ldc), add_(add), panel_size_(int64_t{padded<P>(k)} * NR) {}

    void run() {
        const int panels = static_cast<int>(divide_up(n_, NR));
        const int most = static_cast<int>(std::max<int64_t>(1, kSweepBytes / (panel_size_ * sizeof(P) * kBlockPanels))) * kBlockPanels;
        const int sweeps = static_cast<int>(divide_up(panels, most));
        const int sweep = static_cast<int>(divide_up(divide_up(panels, sweeps), kBlockPanels)) * kBlockPanels;
        packed_ = shop_.shared[0].take<P>(sweep * panel_size_);
        // A few pieces for each thread, so that a slow one does not keep the others waiting.
        const int down = static_cast<int>(divide_up(m_, kBlockRows)), wanted = static_cast<int>(divide_up(6 * shop_.team.threads(), down));
        const bool whole = k_ * kBlockRows * static_cast<int64_t>(sizeof(P)) <= kBlockBytes;
        part_ = whole ? k_ : kPartBytes / kBlockRows / static_cast<int>(sizeof(P)) / 64 * 64;
        const int64_t longest = whole ? sweep : kRunBytes / (kBlockRows * NR * sizeof(float));
        const int64_t even = divide_up(sweep, std::max<int64_t>(wanted, divide_up(sweep, longest)));
        const int run = static_cast<int>(divide_up(even, kBlockPanels)) * kBlockPanels;
        at_once_ = whole ? kBlockPanels : run;
        shop_.team.run(2 * sweeps, [&](int rank) {
            for (int first = 0; first < panels; first += sweep) {
                const int end = std::min(first + sweep, panels), across = static_cast<int>(divide_up(end - first, run));
                shop_.team.share(rank, end - first, [&](int item, int) { pack_panel(first + item, packed_ + item * panel_size_); });
                int packed_row = -1;  // the block that this thread has packed whole
                shop_.team.share(rank, down * across, [&](int item, int me) {
                    const int row = item / across * kBlockRows, panel = item % across * run;
                    piece(row, first, panel, std::min(panel + run, end - first), me, packed_row);
                });
            }
        });
    }

   private:
    void pack_panel(int panel, P* to) const {
        const int column = panel * NR, count = std::min(NR, n_ - column);
        if (b_turned_) {
            pack_turned(b_ + column * ldb_, ldb_, k_, count, NR, to);
        } else {
            pack_lines(b_ + column, ldb_, k_, count, NR, to);
        }
    }

    // Rows from `row` on times panels [begin, end) of the sweep that starts at panel `first`.
    void piece(int row, int first, int begin, int end, int me, int& packed_row) const {
        const int rows = std::min(kBlockRows, m_ - row);
        const int64_t block_size = int64_t{padded<P>(part_)} * kBlockRows, num_sums = int64_t{at_once_} * kBlockRows * NR;
        P* const block = shop_.own[static_cast<size_t>(me)].take<P>(block_size + num_sums * sizeof(float) / sizeof(P));
        float* const sums = reinterpret_cast<float*>(block + block_size);
        for (int p = begin; p < end; p += at_once_) {
            const int panels = std::min(at_once_, end - p);
            for (int from = 0; from < k_; from += part_) {
                const int count = std::min(part_, k_ - from);
                if (packed_row != row) pack_block(row, rows, from, count, block);
                packed_row = count == k_ ? row : -1;
                const P* const panel = packed_ + p * panel_size_ + int64_t{from} * NR;
                multiply(block, padded<P>(count), rows, panel, panel_size_, panels, padded<P>(count), sums, from > 0);
            }
            for (int i = 0; i < panels; i++) finish(row, rows, (first + p + i) * NR, sums + i * kBlockRows * NR);
        }
    }

    void pack_block(int row, int rows, int from, int count, P* block) const {
        if (a_turned_) {
            turn_rows(a_ + from * lda_ + row, lda_, rows, count, block);
        } else {
            pack_rows(a_ + row * lda_ + from, lda_, rows, count, block);
        }
    }

    void finish(int row, int rows, int column, const float* sums) const {
        const int count = std::min(NR, n_ - column);
        for (int r = 0; r < rows; r++, sums += NR) {
            C* to = c_ + (row + r) * ldc_ + column;
            int j = 0;
            for (; j + W <= count; j += W) store_as(to + j, add_ ? gemel::add(load_as_f32(to + j), load(sums + j)) : load(sums + j));
            for (; j < count; j++) set_as(to + j, add_ ? as_f32(to[j]) + sums[j] : sums[j]);
        }
    }

    Workshop& shop_;
    const int m_, n_, k_;
    const A* const a_;
    const int64_t lda_;
    const B* const b_;
    const int64_t ldb_;
    const bool a_turned_, b_turned_;
    C* const c_;
    const int64_t ldc_;
    const bool add_;
    const int64_t panel_size_;
    P* packed_ = nullptr;
    int part_ = 0, at_once_ = 0;  // of k; of panels
};

}  // namespace

void pack_lines(const bf16* from, int64_t ld, int k, int count, int width, bf16* to) {
    for (int i = 0; i < k; i += 2, from += 2 * ld, to += 2 * width) {
        int j = 0;
#if GEMEL_AVX512 || GEMEL_AVX2
        for (; i + 1 < k && j + 8 <= count; j += 8) {
            const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
            const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + ld + j));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * j), _mm_unpacklo_epi16(first, second));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * j + 8), _mm_unpackhi_epi16(first, second));
        }
#endif
        for (; j < count; j++) {
            to[2 * j] = from[j];
            to[2 * j + 1] = i + 1 < k ? from[ld + j] : bf16{0};
        }
        std::fill(to + 2 * count, to + 2 * width, bf16{0});
    }
}

void pack_turned(const float* from, int64_t ld, int k, int count, int width, float* to) { turn_lines(from, ld, k, count, width, to); }
void pack_turned(const bf16* from, int64_t ld, int k, int count, int width, float* to) { turn_lines(from, ld, k, count, width, to); }

void pack_turned(const bf16* from, int64_t ld, int k, int count, int width, bf16* to) {
    // A pair is moved like one number of 32 bits.
    float* const pairs = reinterpret_cast<float*>(to);
    if (ld % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
        turn_lines(reinterpret_cast<const float*>(from), ld / 2, k / 2, count, width, pairs);
    } else {
        for (int i = 0; i + 2 <= k; i += 2) {
            for (int j = 0; j < count; j++) std::memcpy(pairs + i / 2 * int64_t{width} + j, from + j * ld + i, 4);
            std::memset(pairs + i / 2 * int64_t{width} + count, 0, sizeof(float) * static_cast<size_t>(width - count));
        }
    }
    if (k % 2 == 0) return;
    bf16* const last = to + int64_t{k - 1} * width;
    for (int j = 0; j < width; j++) {
        last[2 * j] = j < count ? from[j * ld + k - 1] : bf16{0};
        last[2 * j + 1] = 0;
    }
}

}  // namespace gemel

extern "C" void gemel_gemm(gemel_workshop* workshop, int32_t m, int32_t n, int32_t k, const gemel_factor* a, const gemel_factor* b, void* c,
                           int64_t ldc, int32_t format, int32_t add) {
    using namespace gemel;
    Workshop& shop = *reinterpret_cast<Workshop*>(workshop);
    with_format(a->data, a->format, [&](auto* left) {
        with_format(b->data, b->format, [&](auto* right) {
            with_format(c, format, [&](auto* into) {
                using A = std::remove_cv_t<std::remove_pointer_t<decltype(left)>>;
                using B = std::remove_cv_t<std::remove_pointer_t<decltype(right)>>;
                using C = std::remove_pointer_t<decltype(into)>;
                using P = Multiplied<A, B>;
                Product<P, A, B, C>(shop, m, n, k, left, *a, right, *b, into, ldc, add).run();
            });
        });
    });
}
