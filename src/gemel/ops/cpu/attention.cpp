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
// A format says what numbers a tile has, what they are multiplied with, how one vector of two lines is loaded, multiplied and kept. `kStep`
// is how many numbers of a line (bf16: of a pair of lines) make a vector; `Wide` is the format that unpacking leads to.

struct Two {
    f32 first, second;
};

inline f32 multiply_add(const float* a, const Two& lines, f32 sum) { return fma(set1(a[1]), lines.second, fma(set1(a[0]), lines.first, sum)); }
inline void keep(const Two& lines, float* out, int64_t ld) {
    store(out, lines.first);
    store(out + ld, lines.second);
}

struct F32 {
    using Number = float;
    using Factor = float;
    using Wide = F32;
    static constexpr int kStep = W;
    static Two load_lines(const float* w, int64_t ld) { return {load(w), load(w + ld)}; }
};

#if GEMEL_AVX512

inline f32 multiply_add(const bf16* a, __m512bh lines, f32 sum) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return _mm512_dpbf16_ps(sum, lines, (__m512bh)_mm512_set1_epi32(pair));
}
inline void keep(__m512bh lines, bf16* out, int64_t) { _mm512_storeu_si512(out, (__m512i)lines); }

struct Bf16 {
    using Number = bf16;
    using Factor = bf16;
    using Wide = Bf16;
    static constexpr int kStep = 2 * W;
    static __m512bh load_lines(const bf16* w, int64_t) { return (__m512bh)_mm512_loadu_si512(w); }
};

struct I8 {
    using Number = int8_t;
    using Factor = bf16;
    using Wide = Bf16;
    static constexpr int kStep = W;
    static __m512bh load_lines(const int8_t* w, int64_t ld) {  // up to 127 is exact in bf16: the lower half of the fp32 is zero
        const __m512i first = _mm512_castps_si512(load_i8(w)), second = _mm512_castps_si512(load_i8(w + ld));
        return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    }
};

#else

struct Bf16 {
    using Number = bf16;
    using Factor = float;
    using Wide = F32;
    static constexpr int kStep = 2 * W;
    static Two load_lines(const bf16* w, int64_t) {
        Two lines;
        lines = {load_first(w), load_second(w)};
        return lines;
    }
};

struct I8 {
    using Number = int8_t;
    using Factor = float;
    using Wide = F32;
    static constexpr int kStep = W;
    static Two load_lines(const int8_t* w, int64_t ld) { return {load_i8(w), load_i8(w + ld)}; }
};

#endif

inline float factor(float x, const float*) { return x; }
inline bf16 factor(float x, const bf16*) { return to_bf16(x); }
inline void store_factors(float* p, f32 v) { store(p, v); }
inline void store_factors(bf16* p, f32 v) { store_bf16(p, v); }

// --- the kernel ----------------------------------------------------------------------------------------------------------------------

// c[r][16 u ..+ 16) (+)= sum over k of a[r][k] * w[u][k][0..16). Line k of w begins at w + k * ldw; k is even.
template <class Format, int R, int U>
void product(const typename Format::Factor* a, int64_t lda, const typename Format::Number* const* w, int64_t ldw, int k, float* c,
             int64_t ldc, bool add) {
    f32 sums[R][U * kVectors];
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < U * kVectors; v++) sums[r][v] = add ? load(c + r * ldc + v * W) : zero();
    }
    for (int i = 0; i < k; i += 2, a += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < U * kVectors; v++) {
            const auto lines = Format::load_lines(w[v / kVectors] + i * ldw + v % kVectors * Format::kStep, ldw);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sums[r][v] = multiply_add(a + r * lda, lines, sums[r][v]);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < U * kVectors; v++) store(c + r * ldc + v * W, sums[r][v]);
    }
}

// As many tiles at a time as registers hold the sums of: with few rows, one tile's sums would wait for each other.
constexpr int tiles_at_once(int rows) {
    int tiles = 4;
    while (tiles > 1 && rows * tiles * kVectors > kAccumulators) tiles /= 2;
    return tiles;
}

template <class Format, int R>
void products_of(const typename Format::Factor* a, int64_t lda, const typename Format::Number* const* w, int num_tiles, int64_t ldw, int k,
                 float* c, int64_t ldc, bool add) {
    constexpr int U = tiles_at_once(R);
    int u = 0;
    for (; u + U <= num_tiles; u += U) product<Format, R, U>(a, lda, w + u, ldw, k, c + u * kTile, ldc, add);
    for (; u < num_tiles; u++) product<Format, R, 1>(a, lda, w + u, ldw, k, c + u * kTile, ldc, add);
}

template <class Format, int R = kMostRows>
void products(int rows, const typename Format::Factor* a, int64_t lda, const typename Format::Number* const* w, int num_tiles, int64_t ldw,
              int k, float* c, int64_t ldc, bool add) {
    if (rows == R) return products_of<Format, R>(a, lda, w, num_tiles, ldw, k, c, ldc, add);
    if constexpr (R > 1) products<Format, R - 1>(rows, a, lda, w, num_tiles, ldw, k, c, ldc, add);
}

template <class Format>
const typename Format::Wide::Number* unpack(const typename Format::Number* w, int64_t ldw, int k, typename Format::Wide::Number* out) {
    for (int i = 0; i < k; i += 2) {
        for (int v = 0; v < ldw / W; v++) {
            keep(Format::load_lines(w + i * ldw + v * Format::kStep, ldw), out + i * ldw + v * Format::Wide::kStep, ldw);
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
        parts.take(unpacked_, int64_t{kTile} * std::max(width_, columns_));
        parts.take(heads_, most);
        parts.take(extents_, most);
        end_ = parts.end();
    }

    static int64_t bytes(const Context& context) { return Queries(context, nullptr).end_; }

    void take_rows(const Plan::Row* rows, int num_rows, const float* qkv, int64_t ld) {
        num_ = num_rows * context_.group;
        const float scale = kLog2E / std::sqrt(static_cast<float>(context_.head_width));
        for (int i = 0; i < num_; i++) {
            const Plan::Row& row = rows[i / context_.group];
            const int head = context_.kv_head * context_.group + i % context_.group;
            scale_query(qkv + row.row * ld + int64_t{head} * context_.head_width, scale, queries_ + int64_t{i} * width_);
            const float* slopes = context_.attention.slopes;
            heads_[i] = {context_.window > 0 ? std::max(0, row.position - context_.window + 1) : 0, row.position + 1,
                         slopes ? slopes[head] * kLog2E : 0.0f, Moments{}, Moments{}};
        }
        std::fill_n(values_, int64_t{num_} * columns_, 0.0f);
        num_sets_ = (num_ + kMostRows - 1) / kMostRows;
    }

    // What the queries get from one chunk, for `fold` or `leave`.
    void look(const int32_t* blocks, int chunk) {
        start_ = chunk * kChunk;
        Extent all{kChunk, 0};
        for (int set = 0; set < num_sets_; set++) {
            extents_[set] = extent(set);
            all = {std::min(all.first, extents_[set].first), std::max(all.end, extents_[set].end)};
        }
        for (int t = all.first_tile(); t < all.end_tile(); t++) {
            keys_[t] = context_.pages.keys(context_.attention.layer, blocks, context_.kv_head, start_ + t * kTile);
            value_tiles_[t] = context_.pages.values(context_.attention.layer, blocks, context_.kv_head, start_ + t * kTile);
        }
        score(all);
        for (int set = 0; set < num_sets_; set++) {
            for (int i = first_of(set); i < first_of(set + 1); i++) soften(extents_[set], heads_[i], scores_ + i * kChunk, factors_ + i * kChunk);
        }
        sum_values(all);
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

    // Queries are multiplied in sets of nearly the same size, at most kMostRows.
    int first_of(int set) const { return static_cast<int>(int64_t{num_} * set / num_sets_); }

    void scale_query(const float* from, float scale, Factor* to) const {
        for (int h = 0; h < width_; h++) to[h] = h < context_.head_width ? factor(from[h] * scale, to) : Factor{0};
    }

    Extent extent(int set) const {
        Extent seen{kChunk, 0};
        for (int i = first_of(set); i < first_of(set + 1); i++) {
            const int first = std::max(0, heads_[i].first - start_), end = std::min(kChunk, heads_[i].end - start_);
            if (first < end) seen = {std::min(seen.first, first), std::max(seen.end, end)};
        }
        return seen;
    }

    // Of one tile for many queries: all its numbers made wide once. For few: as they are.
    template <class Body>
    void with_lines(const Number* tile, int64_t ldw, int k, const Body& body) {
        if constexpr (kUnpacks) {
            if (num_sets_ > 1) return body(Wide{}, unpack<Format>(tile, ldw, k, unpacked_));
        }
        body(Format{}, tile);
    }

    void score(const Extent& all) {
        if (num_sets_ == 1) {
            const int first = all.first_tile();
            const Number* tiles[kTiles];
            for (int t = first; t < all.end_tile(); t++) tiles[t] = reinterpret_cast<const Number*>(keys_[t]);
            products<Format>(num_, queries_, width_, tiles + first, all.end_tile() - first, kTile, width_, scores_ + first * kTile, kChunk,
                             false);
            return;
        }
        for (int t = all.first_tile(); t < all.end_tile(); t++) {
            with_lines(reinterpret_cast<const Number*>(keys_[t]), kTile, width_, [&](auto format, const auto* tile) {
                for (int set = 0; set < num_sets_; set++) {
                    if (t < extents_[set].first_tile() || t >= extents_[set].end_tile()) continue;
                    const int i = first_of(set);
                    products<decltype(format)>(first_of(set + 1) - i, queries_ + int64_t{i} * width_, width_, &tile, 1, kTile, width_,
                                               scores_ + i * kChunk + t * kTile, kChunk, false);
                }
            });
        }
    }

    // One query's scores of a part of the chunk become factors of values.
    void soften(const Extent& extent, Head& head, float* scores, Factor* factors) {
        const int from = extent.first_tile() * kTile, to = std::max(from, extent.end_tile() * kTile);
        if (kScaled || context_.attention.slopes) adjust(extent, head, scores);
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
    void adjust(const Extent& extent, const Head& head, float* scores) const {
        static const float kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int i = extent.first_tile() * kTile; i < extent.end_tile() * kTile; i += W) {
            f32 score = load(scores + i);
            if constexpr (kScaled) score = mul(score, load(context_.pages.key_scales(keys_[i / kTile]) + i % kTile));
            const f32 distance = add(set1(static_cast<float>(start_ + i - (head.end - 1))), load(kCount));
            if (context_.attention.slopes) score = fma(set1(head.slope), distance, score);
            store(scores + i, score);
        }
    }

    void sum_values(const Extent& all) {
        for (int t = all.first_tile(); t < all.end_tile(); t++) {
            with_lines(reinterpret_cast<const Number*>(value_tiles_[t]), columns_, kTile, [&](auto format, const auto* tile) {
                for (int set = 0; set < num_sets_; set++) {
                    // Only tokens that were written, and the zeros that complete a pair.
                    const int first = std::max(extents_[set].first - t * kTile, 0) & ~1;
                    const int end = (std::min(extents_[set].end - t * kTile, kTile) + 1) & ~1;
                    if (first < end) sum_lines(format, set, t, tile + first * columns_, first, end);
                }
            });
        }
    }

    // Adds lines [first, end) of a tile, weighted.
    template <class Lines>
    void sum_lines(Lines, int set, int t, const typename Lines::Number* lines, int first, int end) {
        constexpr int kMost = 4;
        const int i = first_of(set), num = first_of(set + 1) - i;
        for (int column = 0; column < columns_; column += kMost * kTile) {
            const typename Lines::Number* tiles[kMost];
            for (int u = 0; u < kMost; u++) tiles[u] = lines + (column / kTile + u) * kVectors * Lines::kStep;
            products<Lines>(num, factors_ + i * kChunk + t * kTile + first, kChunk, tiles, std::min(kMost, (columns_ - column) / kTile),
                            columns_, end - first, chunk_values_ + int64_t{i} * columns_ + column, columns_, t > extents_[set].first_tile());
        }
    }

    const Context context_;
    const int width_, columns_;
    int num_ = 0, num_sets_ = 0, start_ = 0;
    Factor *queries_, *factors_;
    float *scores_, *chunk_values_, *values_;
    typename Wide::Number* unpacked_;
    Head* heads_;
    Extent* extents_;
    int64_t end_;
    char *keys_[kTiles], *value_tiles_[kTiles];  // of the chunk
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
            queries.look(piece.blocks, chunk);
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
