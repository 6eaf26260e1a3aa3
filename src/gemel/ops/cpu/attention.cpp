// A chunk of keys and values meets a few queries: scores, softmax, and the sum of values, all in fp32 between the products.
//
// The two products are one kernel: rows of activations (queries, or probabilities) times lines of a tile (elements of 16 keys, or tokens of
// 16 columns of values), summed over the lines from first to last in one accumulator, whatever the number of rows. Numbers are widened while
// they are multiplied, or, when many queries look at a tile, once before; that makes no difference to the bits either.
//
// Scores are in powers of two: log2(e) is part of the queries' scale.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "norm.h"
#include "threads.h"

namespace gemel {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();  // the score of what is not seen
constexpr float kLog2E = 1.44269504f;
constexpr int kTiles = kChunk / kTile;
constexpr int kVectors = kTile / W;  // of a line of 16

#if GEMEL_AVX512
constexpr int kMostRows = 8, kAccumulators = 16;
#elif GEMEL_AVX2
constexpr int kMostRows = 6, kAccumulators = 12;
#else
constexpr int kMostRows = 3, kAccumulators = 12;
#endif

// --- what a tile is made of ----------------------------------------------------------------------------------------------------------
//
// A format says what numbers a tile has, what they are multiplied with, and how a vector of a line is loaded. Lines come in pairs; where
// bf16 is multiplied as such, one vector holds both (kParts = 1), else they are taken one after the other. `kStep` is how many numbers of a
// line (BF16: of a pair) make a vector; `Wide` is the format that unpacking leads to.

inline f32 broadcast(const float* a, int part) { return set1(a[part]); }
inline void add_product(f32& sum, f32 x, f32 line) { accumulate(sum, x, line); }
inline void keep(f32 line, float* out, int part) { store(out + part * kTile, line); }

struct F32 {
    using Number = float;
    using Factor = float;
    using Wide = F32;
    static constexpr int kStep = W, kParts = 2;
    static f32 line(const float* w, int part) { return load(w + part * kTile); }
};

#if GEMEL_AVX512

inline __m512bh broadcast(const bf16* a, int) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}
inline void add_product(f32& sum, __m512bh x, __m512bh lines) { sum = _mm512_dpbf16_ps(sum, lines, x); }
inline void keep(__m512bh lines, bf16* out, int) { _mm512_storeu_si512(out, (__m512i)lines); }

struct Bf16 {
    using Number = bf16;
    using Factor = bf16;
    using Wide = Bf16;
    static constexpr int kStep = 2 * W, kParts = 1;
    static __m512bh line(const bf16* w, int) { return (__m512bh)_mm512_loadu_si512(w); }
};

struct I8 {
    using Number = int8_t;
    using Factor = bf16;
    using Wide = Bf16;
    static constexpr int kStep = W, kParts = 1;
    static __m512bh line(const int8_t* w, int) {  // up to 127 is exact in bf16: the lower half of the fp32 is zero
        const __m512i first = _mm512_castps_si512(load_i8(w)), second = _mm512_castps_si512(load_i8(w + kTile));
        return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    }
};

#else

struct Bf16 {
    using Number = bf16;
    using Factor = float;
    using Wide = F32;
    static constexpr int kStep = 2 * W, kParts = 2;
    static f32 line(const bf16* w, int part) {
        return part ? load_second(w) : load_first(w);
    }
};

struct I8 {
    using Number = int8_t;
    using Factor = float;
    using Wide = F32;
    static constexpr int kStep = W, kParts = 2;
    static f32 line(const int8_t* w, int part) { return load_i8(w + part * kTile); }
};

#endif

inline float factor(float x, const float*) { return x; }
inline bf16 factor(float x, const bf16*) { return to_bf16(x); }
inline void store_factors(float* p, f32 v) { store(p, v); }
inline void store_factors(bf16* p, f32 v) { store_bf16(p, v); }

// --- the kernel ----------------------------------------------------------------------------------------------------------------------

// Which lines a product sums over: [first, end), both even, of tiles with `length` lines each.
struct Lines {
    int first, end, length;
};

// c[r][16 u ..+ 16) = sum over lines i of a[r][i] * line i of column u, whose n-th tile is w[n * ldw + u].
// Meanwhile the same parts of `ahead`, which are needed next, are fetched.
template <class Format, int R, int U>
[[gnu::noinline]] void product(const typename Format::Factor* a, int64_t lda, const typename Format::Number* const* w, int64_t ldw,
             const typename Format::Number* const* ahead, Lines lines, float* c, int64_t ldc) {
    f32 sums[R][U * kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < U * kVectors; v++) sums[r][v] = zero();
    }
    a += lines.first;
    int tile = lines.first / lines.length, i = lines.first % lines.length;
    for (int left = lines.end - lines.first; left > 0; tile++, i = 0) {
        const typename Format::Number* const* from = w + tile * ldw;
        const typename Format::Number* const* next = ahead + tile * ldw;
        const int stop = std::min(lines.length, i + left);
        left -= stop - i;
        for (; i < stop; i += 2, a += 2) {
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) __builtin_prefetch(next[u] + i * kTile);
#pragma GCC unroll 2
            for (int part = 0; part < Format::kParts; part++) {
#pragma GCC unroll 4
                for (int u = 0; u < U; u++) {
                    decltype(Format::line(from[u], part)) line[kVectors];
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; v++) line[v] = Format::line(from[u] + i * kTile + v * Format::kStep, part);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const auto x = broadcast(a + r * lda, part);
#pragma GCC unroll 4
                        for (int v = 0; v < kVectors; v++) add_product(sums[r][u * kVectors + v], x, line[v]);
                    }
                    asm volatile("" ::: "memory");  // or factors would be loaded ahead for all u, and sums pushed out of registers
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < U * kVectors; v++) store(c + r * ldc + v * W, sums[r][v]);
    }
}

// As many columns at a time as registers hold the sums of: with few rows, the sums of one would wait for each other.
constexpr int columns_at_once(int rows) {
    int columns = 4;
    while (columns > 1 && rows * columns * kVectors > kAccumulators) columns /= 2;
    return columns;
}

template <class Format, int R = kMostRows>
void products(int rows, const typename Format::Factor* a, int64_t lda, const typename Format::Number* const* w, int64_t ldw,
              const typename Format::Number* const* ahead, int num_columns, Lines lines, float* c, int64_t ldc) {
    if (rows != R) {
        if constexpr (R > 1) products<Format, R - 1>(rows, a, lda, w, ldw, ahead, num_columns, lines, c, ldc);
        return;
    }
    constexpr int U = columns_at_once(R);
    int u = 0;
    for (; u + U <= num_columns; u += U) product<Format, R, U>(a, lda, w + u, ldw, ahead + u, lines, c + u * kTile, ldc);
    for (; u < num_columns; u++) product<Format, R, 1>(a, lda, w + u, ldw, ahead + u, lines, c + u * kTile, ldc);
}

template <class Format>
const typename Format::Wide::Number* unpack(const typename Format::Number* w, int num_lines, typename Format::Wide::Number* out) {
    for (int i = 0; i < num_lines; i += 2) {
        for (int v = 0; v < kVectors; v++) {
            for (int part = 0; part < Format::kParts; part++) {
                keep(Format::line(w + i * kTile + v * Format::kStep, part), out + i * kTile + v * Format::Wide::kStep, part);
            }
        }
    }
    return out;
}

// --- softmax -------------------------------------------------------------------------------------------------------------------------

// What a query knows of some tokens: the largest score, the sum of 2^(score - largest), and, elsewhere, that of values weighted so.
struct Moments {
    float largest = kNothing, sum = 0.0f;
};

inline float exp2(float x) {
    float lanes[W];
    store(lanes, gemel::exp2(set1(x)));
    return lanes[0];
}

// Fold what a query got from the next chunk into what it has. A chunk of which it saw nothing changes no bit.
void fold_in(const Moments& next, const float* next_values, int columns, Moments& all, float* values) {
    if (next.largest == kNothing) return;
    const float largest = next.largest > all.largest || all.largest == kNothing ? next.largest : all.largest;
    const float keep_all = exp2(all.largest - largest), take = exp2(next.largest - largest);
    all.largest = largest;
    all.sum = all.sum * keep_all + next.sum * take;
    for (int i = 0; i < columns; i += W) {
        store(values + i, fma(load(next_values + i), set1(take), mul(load(values + i), set1(keep_all))));
    }
}

void finish(const Moments& all, const float* values, int width, float* out) {
    int i = 0;
    for (; i + W <= width; i += W) store(out + i, div(load(values + i), set1(all.sum)));
    for (; i < width; i++) out[i] = values[i] / all.sum;
}

// --- a few queries and a chunk -------------------------------------------------------------------------------------------------------

// What all queries of one layer and kv head have in common.
struct Context {
    const Pages& pages;
    const gemel_attention& attention;
    int head_width, group, window, kv_head;
};

// Hands out parts of one piece of memory, each on cache lines of its own. From nowhere it only counts.
class Parts {
   public:
    explicit Parts(void* memory) : next_(reinterpret_cast<uintptr_t>(memory)) {}
    template <class T>
    void take(T*& part, int64_t count) {
        part = reinterpret_cast<T*>(next_);
        next_ += static_cast<uintptr_t>((count * int64_t{sizeof(T)} + 63) / 64 * 64);
    }
    int64_t end() const { return static_cast<int64_t>(next_); }

   private:
    uintptr_t next_;
};

// Up to rows_at_once(group) rows with all heads of one group, in memory that belongs to one thread.
template <class Format>
class Queries {
   public:
    Queries(const Context& context, void* scratch) : context_(context), width_(context.pages.width()), columns_(context.pages.columns()) {
        const int64_t most = int64_t{rows_at_once(context.group)} * context.group;
        Parts parts(scratch);
        parts.take(queries_, most * width_);
        parts.take(scores_, most * kChunk);
        if constexpr (std::is_same_v<Factor, float>) {
            factors_ = scores_;
        } else {
            parts.take(factors_, most * kChunk);
        }
        parts.take(chunk_values_, most * columns_);
        parts.take(values_, most * columns_);
        parts.take(wide_, kUnpacks ? int64_t{kChunk} * (width_ + columns_) : 0);
        parts.take(heads_, most);
        parts.take(sets_, most);
        parts.take(value_table_, 3 * kTiles * columns_ / kTile);
        end_ = parts.end();
    }

    static int64_t bytes(const Context& context) { return Queries(context, nullptr).end_; }

    void take_rows(const Plan::Row* rows, int num_rows, const float* qkv, int64_t ld) {
        num_ = num_rows * context_.group;
        end_position_ = 0;
        const float scale = kLog2E / std::sqrt(static_cast<float>(context_.head_width));
        for (int i = 0; i < num_; i++) {
            const Plan::Row& row = rows[i / context_.group];
            const int head = context_.kv_head * context_.group + i % context_.group;
            scale_query(qkv + row.row * ld + int64_t{head} * context_.head_width, scale, queries_ + int64_t{i} * width_);
            const float* slopes = context_.attention.slopes;
            heads_[i] = {context_.window > 0 ? std::max(0, row.position - context_.window + 1) : 0, row.position + 1,
                         slopes ? slopes[head] * kLog2E : 0.0f, Moments{}, Moments{}};
            end_position_ = std::max(end_position_, row.position + 1);
        }
        std::fill_n(values_, int64_t{num_} * columns_, 0.0f);
        num_sets_ = (num_ + kMostRows - 1) / kMostRows;
        for (int set = 0; set < num_sets_; set++) sets_[set] = {num_ * set / num_sets_, num_ * (set + 1) / num_sets_, {}};
    }

    // What the queries get from one chunk, for `fold` or `leave`. Tiles of the chunk after it are fetched if it is `next`.
    void look(const int32_t* blocks, int chunk, bool next) {
        start_ = chunk * kChunk;
        Extent all{kChunk, 0};
        for (Set* set = sets_; set < sets_ + num_sets_; set++) {
            set->seen = extent(*set);
            all = {std::min(all.first, set->seen.first), std::max(all.end, set->seen.end)};
        }
        find(blocks, all, next);
        if (kUnpacks && num_sets_ > 1) {
            multiply_wide(all);
        } else {
            multiply<Format>(keys_, value_table_, ahead_of_keys_, value_table_ + kTiles * columns_ / kTile, all);
        }
    }

    void fold() {
        for (int i = 0; i < num_; i++) fold_in(heads_[i].chunk, chunk_values_ + int64_t{i} * columns_, columns_, heads_[i].all, values(i));
    }

    const Moments& chunk_moments(int i) const { return heads_[i].chunk; }
    const float* chunk_values(int i) const { return chunk_values_ + int64_t{i} * columns_; }
    const Moments& moments(int i) const { return heads_[i].all; }
    float* values(int i) const { return values_ + int64_t{i} * columns_; }

   private:
    using Factor = typename Format::Factor;
    using Number = typename Format::Number;
    using Wide = typename Format::Wide;
    using WideNumber = typename Wide::Number;
    static constexpr bool kScaled = std::is_same_v<Format, I8>;
    static constexpr bool kUnpacks = !std::is_same_v<Format, Wide>;

    struct Head {
        int first, end;  // the positions that it sees
        float slope;
        Moments chunk, all;
    };
    struct Extent {  // the tokens of the chunk that any of some queries sees; none if end <= first
        int first, end;
        int first_tile() const { return first / kTile; }
        int end_tile() const { return (end + kTile - 1) / kTile; }
    };
    struct Set {  // queries that are multiplied together
        int begin, end;
        Extent seen;
    };

    void scale_query(const float* from, float scale, Factor* to) const {
        for (int h = 0; h < width_; h++) to[h] = h < context_.head_width ? factor(from[h] * scale, to) : Factor{0};
    }

    Extent extent(const Set& set) const {
        Extent seen{kChunk, 0};
        for (int i = set.begin; i < set.end; i++) {
            const int first = std::max(0, heads_[i].first - start_), end = std::min(kChunk, heads_[i].end - start_);
            if (first < end) seen = {std::min(seen.first, first), std::max(seen.end, end)};
        }
        return seen;
    }

    // Where the tiles of the chunk lie, and what to fetch while each is multiplied: the values of the same tokens during scores, keys of the
    // next chunk during values.
    void find(const int32_t* blocks, const Extent& all, bool next) {
        const int layer = context_.attention.layer, num_columns = columns_ / kTile;
        const Number** ahead_of_values = value_table_ + kTiles * num_columns;
        for (int t = all.first_tile(); t < all.end_tile(); t++) {
            const int64_t token = start_ + t * kTile, token_ahead = token + kChunk;
            key_tiles_[t] = context_.pages.keys(layer, blocks, context_.kv_head, token);
            value_tiles_[t] = context_.pages.values(layer, blocks, context_.kv_head, token);
            keys_[t] = reinterpret_cast<const Number*>(key_tiles_[t]);
            ahead_of_keys_[t] = reinterpret_cast<const Number*>(value_tiles_[t]);
            const char* ahead = value_tiles_[t];
            if (next && token_ahead < end_position_) ahead = context_.pages.keys(layer, blocks, context_.kv_head, token_ahead);
            for (int u = 0; u < num_columns; u++) {
                value_table_[t * num_columns + u] = reinterpret_cast<const Number*>(value_tiles_[t]) + u * kTile * kTile;
                ahead_of_values[t * num_columns + u] = reinterpret_cast<const Number*>(ahead) + u * kTile * kTile;
            }
        }
    }

    // With many queries numbers are made wide once, not once for every set.
    void multiply_wide(const Extent& all) {
        const int num_columns = columns_ / kTile;
        const WideNumber* keys[kTiles];
        const WideNumber** values = reinterpret_cast<const WideNumber**>(value_table_ + 2 * kTiles * num_columns);
        for (int t = all.first_tile(); t < all.end_tile(); t++) {
            keys[t] = unpack<Format>(keys_[t], width_, wide_ + t * kTile * width_);
            for (int u = 0; u < num_columns; u++) {
                const int panel = width_ * kChunk + (u * kTiles + t) * kTile * kTile;
                values[t * num_columns + u] = unpack<Format>(value_table_[t * num_columns + u], kTile, wide_ + panel);
            }
        }
        multiply<Wide>(keys, values, keys, values, all);
    }

    template <class Kept>
    using Tiles = const typename Kept::Number* const*;

    template <class Kept>
    void multiply(Tiles<Kept> keys, Tiles<Kept> values, Tiles<Kept> ahead_of_keys, Tiles<Kept> ahead_of_values, const Extent& all) {
        const int num_columns = columns_ / kTile, at_once = num_sets_ > 1 ? columns_at_once(kMostRows) : 1 << 20;
        for (int begin = all.first_tile(), end; begin < all.end_tile(); begin = end) {
            end = std::min(all.end_tile(), begin + std::min(at_once, kTiles));
            for (const Set* set = sets_; set < sets_ + num_sets_; set++) {
                const int t = std::max(begin, set->seen.first_tile()), num_tiles = std::min(end, set->seen.end_tile()) - t;
                if (num_tiles <= 0) continue;
                products<Kept>(set->end - set->begin, queries_ + int64_t{set->begin} * width_, width_, keys + t, 0, ahead_of_keys + t, num_tiles,
                               {0, width_, width_}, scores_ + set->begin * kChunk + t * kTile, kChunk);
            }
        }
        for (const Set* set = sets_; set < sets_ + num_sets_; set++) {
            for (int i = set->begin; i < set->end; i++) soften(set->seen, heads_[i], scores_ + i * kChunk, factors_ + i * kChunk);
        }
        for (int u = 0; u < num_columns; u += std::min(at_once, num_columns)) {
            for (const Set* set = sets_; set < sets_ + num_sets_; set++) {
                if (set->seen.end <= set->seen.first) continue;
                // Only tokens that were written, and the zeros that complete a pair.
                products<Kept>(set->end - set->begin, factors_ + set->begin * kChunk, kChunk, values + u, num_columns, ahead_of_values + u,
                               std::min(at_once, num_columns - u), {set->seen.first & ~1, (set->seen.end + 1) & ~1, kTile},
                               chunk_values_ + int64_t{set->begin} * columns_ + u * kTile, columns_);
            }
        }
    }

    // One query's scores of a part of the chunk become factors of values.
    void soften(const Extent& seen, Head& head, float* scores, Factor* factors) {
        const int from = seen.first_tile() * kTile, to = std::max(from, seen.end_tile() * kTile);
        if (kScaled || context_.attention.slopes) adjust(from, to, head, scores);
        std::fill(scores + from, scores + std::min(std::max(head.first - start_, from), to), kNothing);
        std::fill(scores + std::max(std::min(head.end - start_, to), from), scores + to, kNothing);
        f32 most = set1(kNothing);
        for (int i = from; i < to; i += W) most = max(most, load(scores + i));
        head.chunk.largest = largest(most);
        const f32 shift = set1(head.chunk.largest == kNothing ? 0.0f : head.chunk.largest);
        f32 sums = zero();
        for (int i = from; i < to; i += W) {
            f32 p = gemel::exp2(sub(load(scores + i), shift));
            sums = add(sums, p);
            if constexpr (kScaled) p = mul(p, load(context_.pages.value_scales(value_tiles_[i / kTile]) + i % kTile));
            store_factors(factors + i, p);
        }
        head.chunk.sum = sum(sums);
    }

    // Scores get what was left out of the product: the scales of keys, and ALiBi's penalty of distance.
    void adjust(int from, int to, const Head& head, float* scores) const {
        static const float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int i = from; i < to; i += W) {
            f32 score = load(scores + i);
            if constexpr (kScaled) score = mul(score, load(context_.pages.key_scales(key_tiles_[i / kTile]) + i % kTile));
            const f32 distance = add(set1(static_cast<float>(start_ + i - (head.end - 1))), load(kCount));
            if (context_.attention.slopes) score = fma(set1(head.slope), distance, score);
            store(scores + i, score);
        }
    }

    const Context context_;
    const int width_, columns_;
    int num_ = 0, num_sets_ = 0, start_ = 0, end_position_ = 0;
    Factor *queries_, *factors_;
    float *scores_, *chunk_values_, *values_;
    WideNumber* wide_;
    Head* heads_;
    Set* sets_;
    int64_t end_;
    char *key_tiles_[kTiles], *value_tiles_[kTiles];  // of the chunk
    const Number *keys_[kTiles], *ahead_of_keys_[kTiles];
    const Number** value_table_;  // [tile, columns / 16]; the same of what to fetch ahead; the same of what was unpacked
};

// A partial result is the values of one head, then its moments.
int64_t partial_floats(const Pages& pages) { return pages.columns() + kTile; }

void leave(const Moments& moments, const float* values, int columns, float* partial) {
    if (moments.largest != kNothing) std::memcpy(partial, values, sizeof(float) * static_cast<size_t>(columns));
    partial[columns] = moments.largest;
    partial[columns + 1] = moments.sum;
}

}  // namespace

int64_t Plan::partial_bytes() const { return num_partials_ * partial_floats(pages_) * int64_t{sizeof(float)}; }

int64_t Plan::scratch_bytes(const gemel_pages& pages, int num_heads) {
    const gemel_attention attention{};
    const Pages layout(pages);
    const Context context{layout, attention, pages.width, num_heads / pages.heads, 0, 0};
    return std::max({Queries<F32>::bytes(context), Queries<Bf16>::bytes(context), Queries<I8>::bytes(context)});
}

void Plan::write(const gemel_attention& attention, float* qkv, int64_t ld, int item) const {
    const Span& span = spans_[static_cast<size_t>(item / num_kv_heads_)];
    const int kv_head = item % num_kv_heads_, num_heads = num_kv_heads_ * group_;
    const auto turn = [&](float* head, const float* scale, int position) {
        if (scale) rms_norm(head, scale, attention.eps, head_width_, head);
        if (attention.rotation) rotate(head, attention.rotation + int64_t{position} * 2 * head_width_, head_width_);
    };
    float* const rows = qkv + span.row * ld;
    const int64_t keys = int64_t{num_heads + kv_head} * head_width_, values = keys + int64_t{num_kv_heads_} * head_width_;
    for (int i = 0; i < span.count; i++) {
        for (int g = 0; g < group_; g++) {
            turn(rows + i * ld + int64_t{kv_head * group_ + g} * head_width_, attention.q_norm, span.position + i);
        }
        turn(rows + i * ld + keys, attention.k_norm, span.position + i);
    }
    pages_.write(attention.layer, span.blocks, kv_head, span.position, span.count, rows + keys, rows + values, ld);
}

void Plan::attend(const gemel_attention& attention, const float* qkv, int64_t ld, int piece, void* scratch, void* partials, float* out,
                  int64_t ld_out) const {
    switch (format_) {
        case GEMEL_F32: return attend_as<F32>(attention, qkv, ld, piece, scratch, static_cast<float*>(partials), out, ld_out);
        case GEMEL_BF16: return attend_as<Bf16>(attention, qkv, ld, piece, scratch, static_cast<float*>(partials), out, ld_out);
        default: return attend_as<I8>(attention, qkv, ld, piece, scratch, static_cast<float*>(partials), out, ld_out);
    }
}

template <class Format>
void Plan::attend_as(const gemel_attention& attention, const float* qkv, int64_t ld, int item, void* scratch, float* partials, float* out,
                     int64_t ld_out) const {
    const Piece& piece = pieces_[static_cast<size_t>(item / num_kv_heads_)];
    const int kv_head = item % num_kv_heads_, at_once = rows_at_once(group_);
    Queries<Format> queries(Context{pages_, attention, head_width_, group_, window_, kv_head}, scratch);
    for (int chunk = piece.first_chunk; chunk < piece.end_chunk; chunk++) {
        for (int begin = 0; begin < piece.num_rows; begin += at_once) {
            const Row* rows = rows_.data() + piece.first_row + begin;
            const int num_rows = std::min(at_once, piece.num_rows - begin), num = num_rows * group_;
            if (chunk == piece.first_chunk || piece.num_rows > at_once) queries.take_rows(rows, num_rows, qkv, ld);
            queries.look(piece.blocks, chunk, chunk + 1 < piece.end_chunk);
            if (piece.whole) {
                queries.fold();
                continue;
            }
            for (int i = 0; i < num; i++) {
                const int64_t partial = rows[i / group_].partial + (int64_t{chunk} * num_kv_heads_ + kv_head) * group_ + i % group_;
                leave(queries.chunk_moments(i), queries.chunk_values(i), pages_.columns(), partials + partial * partial_floats(pages_));
            }
        }
    }
    if (!piece.whole) return;
    for (int i = 0; i < piece.num_rows * group_; i++) {
        const Row& row = rows_[static_cast<size_t>(piece.first_row + i / group_)];
        finish(queries.moments(i), queries.values(i), head_width_, out + row.row * ld_out + int64_t{kv_head * group_ + i % group_} * head_width_);
    }
}

void Plan::fold(int item, const void* partials, float* out, int64_t ld_out) const {
    constexpr int kColumns = 64;  // at a time
    const Fold& fold = folds_[static_cast<size_t>(item / num_kv_heads_)];
    const int columns = pages_.columns();
    for (int head = item % num_kv_heads_ * group_, last = head + group_; head < last; head++) {
        for (int column = 0; column < columns; column += kColumns) {
            Moments all;
            float values[kColumns] = {};
            for (int chunk = fold.first_chunk; chunk < fold.end_chunk; chunk++) {
                const int64_t partial = fold.row.partial + int64_t{chunk} * num_kv_heads_ * group_ + head;
                const float* next = static_cast<const float*>(partials) + partial * partial_floats(pages_);
                fold_in({next[columns], next[columns + 1]}, next + column, std::min(kColumns, columns - column), all, values);
            }
            finish(all, values, std::min(kColumns, head_width_ - column), out + fold.row.row * ld_out + int64_t{head} * head_width_ + column);
        }
    }
}

}  // namespace gemel

extern "C" void gemel_attend(gemel_team* team, const gemel_attention* attention, const gemel_pages* pages, int32_t num_stretches,
                             const gemel_stretch* stretches, float* qkv, int32_t, float* out) {
    gemel::Team& everyone = *reinterpret_cast<gemel::Team*>(team);
    const gemel::Plan plan(*pages, attention->num_heads, attention->window, num_stretches, stretches, everyone.threads());
    const int64_t ld = int64_t{attention->num_heads + 2 * pages->heads} * pages->width, ld_out = int64_t{attention->num_heads} * pages->width;
    const auto scratch_bytes = static_cast<size_t>(gemel::Plan::scratch_bytes(*pages, attention->num_heads));
    std::vector<std::vector<char>> scratch(static_cast<size_t>(everyone.threads()), std::vector<char>(scratch_bytes));
    std::vector<char> partials(static_cast<size_t>(plan.partial_bytes()));
    everyone.run(3, [&](int rank) {
        everyone.share(rank, plan.num_writes(), [&](int item, int) { plan.write(*attention, qkv, ld, item); });
        everyone.share(rank, plan.num_pieces(), [&](int piece, int me) {
            plan.attend(*attention, qkv, ld, piece, scratch[static_cast<size_t>(me)].data(), partials.data(), out, ld_out);
        });
        everyone.share(rank, plan.num_folds(), [&](int item, int) { plan.fold(item, partials.data(), out, ld_out); });
    });
}
