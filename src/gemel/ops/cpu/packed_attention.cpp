// Attention over documents packed end to end, and its gradients, without ever holding a matrix of scores (Dao 2023, "FlashAttention-2",
// arXiv 2307.08691).
//
// A document is cut into blocks of kBlock tokens. A block of keys meets a block of queries as scores [keys][queries]: so the softmax of a
// query goes down a lane, without sums across lanes, and the same rows are left factors of the products over queries (gradients of keys and
// values) and, read along columns, of those over keys (outputs and the gradient of queries). All of it is fp32, whatever lies in memory.
//
// Forward, a piece of work is a block of queries of the heads that share keys. Backward it is one head of one document: it alone adds to
// the gradients of its queries, and what it gets for keys and values is folded over the heads of a group in order. So nothing is added by
// two threads, and the results are the same bits whatever their number.
//
// Scores are in powers of two: log2(e) is part of the scale.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "gemm.h"
#include "train.h"
#include "workshop.h"

namespace gemel {
namespace {

constexpr int kBlock = kBlockRows;  // a multiple of NR, and of the rows of a tile
constexpr int kPanels = kBlock / NR;
constexpr float kLog2E = 1.44269504f;
constexpr float kNothing = -std::numeric_limits<float>::infinity();  // the score of what is not seen

int divide_up(int a, int b) { return (a + b - 1) / b; }

// --- products -----------------------------------------------------------------------------------------------------------------------
// `diagonal`: keys and queries are the same tokens, and no query sees a later key; then half of the work is left out.

// scores [keys][kBlock] = keys in tiles times panels of queries [width][NR]. On the diagonal panel p has keys up to its last query.
int keys_of(int panel, int keys, bool diagonal) { return diagonal ? std::min(keys, (panel + 1) * NR) : keys; }

void score(const float* tiles, int keys, const float* panels, int queries, int width, bool diagonal, float* scores) {
    for (int p = 0; p * NR < queries; p++, panels += width * NR) {
        in_tiles<kRows>(keys, [&](auto n, int r) {
            if (r >= keys_of(p, keys, diagonal)) return;
            tile_known<n, 1, n>(tiles + r * width, panels, width, scores + r * kBlock + p * NR, kBlock, false);
        });
    }
}

// sums [panels][kBlock][NR] += scores times panels of something of each query, [kBlock][NR].
void add_to_keys(const float* scores, int keys, int queries, const float* panels, int num_panels, bool diagonal, float* sums) {
    for (int p = 0; p < num_panels; p++, panels += kBlock * NR, sums += kBlock * NR) {
        in_tiles<kRows>(keys, [&](auto n, int r) {
            const int from = diagonal ? r : 0;
            tile_known<n, kBlock, 1>(scores + r * kBlock + from, panels + from * NR, queries - from, sums + r * NR, NR, true);
        });
    }
}

// sums [panels][kBlock][NR] (+)= scores, turned, times panels of something of each key, [kBlock][NR].
void add_to_queries(const float* scores, int keys, int queries, const float* panels, int num_panels, bool diagonal, float* sums, bool add) {
    for (int p = 0; p < num_panels; p++, panels += kBlock * NR, sums += kBlock * NR) {
        in_tiles<kRows>(queries, [&](auto n, int r) {
            const int seen = diagonal ? std::min(keys, r + n) : keys;
            tile_known<n, 1, kBlock>(scores + r, panels, seen, sums + r * NR, NR, add);
        });
    }
}

// --- one head of one document ---------------------------------------------------------------------------------------------------------

// Rows of one head: token t at data + t * ld.
template <class T>
struct Rows {
    const T* data;
    int64_t ld;
    const T* at(int token) const { return data + token * ld; }
};

// What scores get before the softmax, and who sees whom. Tokens count from the document's first.
struct Rule {
    int window;   // positions seen, itself included; 0: all
    float slope;  // ALiBi, times log2(e)

    // The first block of keys that a query of a block sees, and the last block of queries that a key sees.
    int first_keys(int block) const { return window > 0 ? std::max(0, block * kBlock - window + 1) / kBlock : 0; }
    int last_queries(int block, int num_blocks) const {
        return window > 0 ? std::min(num_blocks - 1, (block * kBlock + kBlock - 1 + window - 1) / kBlock) : num_blocks - 1;
    }
    bool bends(int key_block, int query_block) const {
        return slope != 0.0f || key_block == query_block || (window > 0 && (query_block - key_block + 1) * kBlock > window);
    }

    // NR lanes of one key: queries from `query` on. What is not seen becomes `nothing`.
    void bend(float* lanes, int key, int query, float nothing) const {
        if (slope != 0.0f) {
            for (int i = 0; i < NR; i++) lanes[i] += slope * static_cast<float>(key - query - i);
        }
        if (key > query) std::fill(lanes, lanes + std::min(NR, key - query), nothing);
        if (window > 0 && key + window < query + NR) std::fill(lanes + std::max(0, key + window - query), lanes + NR, nothing);
    }
};

void scale_panels(float* panels, int64_t count, float scale) {
    for (int64_t i = 0; i < count; i += W) store(panels + i, mul(load(panels + i), set1(scale)));
}

// Tokens side by side, [panels of tokens][width][NR], or numbers side by side, [panels of the width][kBlock][NR].
template <class T>
void pack_tokens(const Rows<T>& from, int token, int count, int width, float scale, float* to) {
    for (int first = 0; first < count; first += NR, to += width * NR) {
        pack_turned(from.at(token + first), from.ld, width, std::min(NR, count - first), NR, to);
        if (scale != 1.0f) scale_panels(to, int64_t{width} * NR, scale);
    }
}
template <class T>
void pack_numbers(const Rows<T>& from, int token, int count, int width, float scale, float* to) {
    for (int column = 0; column < width; column += NR, to += kBlock * NR) {
        pack_lines(from.at(token) + column, from.ld, count, std::min(NR, width - column), NR, to);
        if (scale != 1.0f) scale_panels(to, int64_t{count} * NR, scale);
    }
}

// Row r of [panels of the width][kBlock][NR], times `scale`.
template <class T>
void write_row(const float* sums, int r, int width, float scale, T* to) {
    for (int column = 0; column < width; column += NR, sums += kBlock * NR) {
        const float* from = sums + r * NR;
        const int count = std::min(NR, width - column);
        int j = 0;
        for (; j + W <= count; j += W) store_as(to + column + j, mul(load(from + j), set1(scale)));
        for (; j < count; j++) set_as(to + column + j, from[j] * scale);
    }
}

template <class T>
class Attention {
   public:
    Attention(Workshop& shop, const gemel_packed_attention& job)
        : shop_(shop), job_(job), width_(job.width), group_(job.num_heads / job.num_kv_heads), columns_(divide_up(job.width, NR)),
          tokens_(job.starts[job.num_documents]), sums_(columns_ * kBlock * NR), turned_(kBlock * job.width) {}

    void forward() {
        // The last blocks of a document see most: first, so that no thread is left alone with one of them in the end.
        struct Piece {
            int document, block;
        };
        std::vector<Piece> pieces;
        for (int d = 0; d < job_.num_documents; d++) {
            for (int block = 0; block < num_blocks(d); block++) pieces.push_back({d, block});
        }
        std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.block > b.block; });
        shop_.team.run(1, [&](int rank) {
            shop_.team.share(rank, static_cast<int>(pieces.size()) * job_.num_kv_heads, [&](int item, int me) {
                const Piece& piece = pieces[static_cast<size_t>(item / job_.num_kv_heads)];
                attend(piece.document, item % job_.num_kv_heads, piece.block, me);
            });
        });
    }

    void backward() {
        std::vector<int> documents(static_cast<size_t>(job_.num_documents));
        for (size_t d = 0; d < documents.size(); d++) documents[d] = static_cast<int>(d);
        std::stable_sort(documents.begin(), documents.end(), [&](int a, int b) { return length(a) > length(b); });
        if (group_ > 1) shares_ = shop_.shared[0].take<float>(int64_t{2} * job_.num_heads * tokens_ * width_);
        shop_.team.run(2, [&](int rank) {
            shop_.team.share(rank, job_.num_documents * job_.num_heads, [&](int item, int me) {
                differentiate(documents[static_cast<size_t>(item / job_.num_heads)], item % job_.num_heads, me);
            });
            if (group_ > 1) shop_.team.share(rank, tokens_, [&](int token, int) { fold(token); });
        });
    }

   private:
    int length(int document) const { return job_.starts[document + 1] - job_.starts[document]; }
    int num_blocks(int document) const { return divide_up(length(document), kBlock); }
    int count(int document, int block) const { return std::min(kBlock, length(document) - block * kBlock); }

    // Rows of a head, counted from a document's first token.
    Rows<T> rows(const void* data, int64_t ld, int document, int head) const {
        return {static_cast<const T*>(data) + job_.starts[document] * ld + int64_t{head} * width_, ld};
    }
    Rule rule(int head) const { return {job_.window, job_.slopes ? job_.slopes[head] * kLog2E : 0.0f}; }
    float* lse(int document, int head) const { return job_.lse + int64_t{head} * tokens_ + job_.starts[document]; }

    // --- forward

    // What a block of queries of one head knows so far.
    struct Seen {
        float *queries, *sums;  // panels [kPanels][width][NR]; values weighted by 2^(score - largest), [columns][kBlock][NR]
        float *largest, *total, *shrink;  // [kBlock]: of scores; of weights; by how much what was known before shrinks
    };

    void attend(int document, int kv_head, int block, int me) {
        float* scratch = shop_.own[static_cast<size_t>(me)].take<float>(group_ * (turned_ + sums_ + 3 * kBlock) + turned_ + kBlock * kBlock + sums_);
        const auto part = [&scratch](int64_t size) { return std::exchange(scratch, scratch + size); };
        float *const keys = part(turned_), *const values = part(sums_), *const scores = part(kBlock * kBlock);
        const int queries = count(document, block);
        std::vector<Seen> heads;
        for (int g = 0; g < group_; g++) {
            heads.push_back({part(turned_), part(sums_), part(kBlock), part(kBlock), part(kBlock)});
            std::fill_n(heads.back().largest, 2 * kBlock, 0.0f);
            std::fill_n(heads.back().largest, kBlock, kNothing);
            pack_tokens(rows(job_.q, job_.ld_q, document, kv_head * group_ + g), block * kBlock, queries, width_, job_.scale * kLog2E,
                        heads.back().queries);
        }
        const Rows<T> k = rows(job_.k, job_.ld_k, document, kv_head), v = rows(job_.v, job_.ld_v, document, kv_head);
        // From the diagonal backwards: there every query sees something, so that its largest score is a number from then on.
        for (int other = block, end = rule(kv_head * group_).first_keys(block); other >= end; other--) {
            const int num_keys = count(document, other);
            pack_rows(k.at(other * kBlock), k.ld, num_keys, width_, keys);
            pack_numbers(v, other * kBlock, num_keys, width_, 1.0f, values);
            for (int g = 0; g < group_; g++) {
                Seen& seen = heads[static_cast<size_t>(g)];
                const bool diagonal = other == block;
                score(keys, num_keys, seen.queries, queries, width_, diagonal, scores);
                soften(rule(kv_head * group_ + g), block, other, queries, num_keys, scores, seen);
                if (!diagonal) shrink(seen, queries);
                add_to_queries(scores, num_keys, queries, values, columns_, diagonal, seen.sums, !diagonal);
            }
        }
        for (int g = 0; g < group_; g++) finish(document, kv_head * group_ + g, block, queries, heads[static_cast<size_t>(g)]);
    }

    // Scores become weights 2^(score - largest so far).
    static void soften(const Rule& rule, int block, int other, int queries, int keys, float* scores, Seen& seen) {
        const bool diagonal = other == block, bends = rule.bends(other, block);
        for (int p = 0; p * NR < queries; p++) {
            float *lanes = scores + p * NR, *largest = seen.largest + p * NR, *total = seen.total + p * NR;
            const int count = keys_of(p, keys, diagonal);
            const f32 before0 = load(largest), before1 = load(largest + W);
            f32 most0 = before0, most1 = before1;
            for (int r = 0; r < count; r++) {
                float* at = lanes + r * kBlock;
                if (bends) rule.bend(at, other * kBlock + r, block * kBlock + p * NR, kNothing);
                most0 = max(most0, load(at));
                most1 = max(most1, load(at + W));
            }
            const f32 less0 = exp2(sub(before0, most0)), less1 = exp2(sub(before1, most1));
            f32 sum0 = mul(load(total), less0), sum1 = mul(load(total + W), less1);
            for (int r = 0; r < count; r++) {
                float* at = lanes + r * kBlock;
                const f32 weight0 = exp2(sub(load(at), most0)), weight1 = exp2(sub(load(at + W), most1));
                sum0 = add(sum0, weight0);
                sum1 = add(sum1, weight1);
                store(at, weight0);
                store(at + W, weight1);
            }
            // A tile of queries may reach into the next panel, which has more keys.
            for (int r = count; r < std::min(keys, count + NR); r++) std::fill_n(lanes + r * kBlock, NR, 0.0f);
            store(largest, most0), store(largest + W, most1);
            store(total, sum0), store(total + W, sum1);
            store(seen.shrink + p * NR, less0), store(seen.shrink + p * NR + W, less1);
        }
    }

    void shrink(const Seen& seen, int queries) const {
        for (int column = 0; column < columns_; column++) {
            for (int r = 0; r < queries; r++) {
                if (seen.shrink[r] == 1.0f) continue;
                float* sums = seen.sums + (int64_t{column} * kBlock + r) * NR;
                store(sums, mul(load(sums), set1(seen.shrink[r])));
                store(sums + W, mul(load(sums + W), set1(seen.shrink[r])));
            }
        }
    }

    void finish(int document, int head, int block, int queries, const Seen& seen) const {
        T* const out = static_cast<T*>(job_.out);
        for (int r = 0; r < queries; r++) {
            const int token = block * kBlock + r;
            write_row(seen.sums, r, width_, 1.0f / seen.total[r],
                      out + (int64_t{job_.starts[document] + token} * job_.num_heads + head) * width_);
            lse(document, head)[token] = seen.largest[r] + std::log2(seen.total[r]);
        }
    }

    // --- backward

    // One head of a document, block by block of its queries.
    struct Head {
        float *queries, *d_outs;         // tokens side by side, per block [kPanels][width][NR]; queries scaled as in the forward pass
        float *query_lines, *out_lines;  // numbers side by side, per block [columns][kBlock][NR]; queries scaled without log2(e)
        float* d_queries;                // sums, likewise
        float *lse, *delta;              // [blocks * kBlock]; delta: the product of an output with its gradient
    };

    void differentiate(int document, int head, int me) {
        const int blocks = num_blocks(document), kv_head = head / group_;
        float* scratch = shop_.own[static_cast<size_t>(me)].take<float>(blocks * (2 * turned_ + 3 * sums_ + 2 * kBlock) +
                                                                        2 * (turned_ + kBlock * kBlock) + 3 * sums_);
        const auto part = [&scratch](int64_t size) { return std::exchange(scratch, scratch + size); };
        const Head of{part(blocks * turned_), part(blocks * turned_), part(blocks * sums_), part(blocks * sums_),
                      part(blocks * sums_),   part(blocks * kBlock),  part(blocks * kBlock)};
        prepare(document, head, of);
        float *const key_tiles = part(turned_), *const value_tiles = part(turned_), *const key_lines = part(sums_);
        float *const d_keys = part(sums_), *const d_values = part(sums_);
        float *const weights = part(kBlock * kBlock), *const slopes = part(kBlock * kBlock);
        const Rows<T> k = rows(job_.k, job_.ld_k, document, kv_head), v = rows(job_.v, job_.ld_v, document, kv_head);
        for (int other = 0; other < blocks; other++) {
            const int keys = count(document, other);
            pack_rows(k.at(other * kBlock), k.ld, keys, width_, key_tiles);
            pack_rows(v.at(other * kBlock), v.ld, keys, width_, value_tiles);
            pack_numbers(k, other * kBlock, keys, width_, 1.0f, key_lines);
            std::fill_n(d_keys, 2 * sums_, 0.0f);
            for (int block = other, last = rule(head).last_queries(other, blocks); block <= last; block++) {
                const int queries = count(document, block);
                const bool diagonal = block == other;
                score(key_tiles, keys, of.queries + block * turned_, queries, width_, diagonal, weights);
                score(value_tiles, keys, of.d_outs + block * turned_, queries, width_, diagonal, slopes);
                slope(rule(head), block, other, queries, keys, of, weights, slopes);
                add_to_keys(weights, keys, queries, of.out_lines + block * sums_, columns_, diagonal, d_values);
                add_to_keys(slopes, keys, queries, of.query_lines + block * sums_, columns_, diagonal, d_keys);
                add_to_queries(slopes, keys, queries, key_lines, columns_, diagonal, of.d_queries + block * sums_, true);
            }
            for (int r = 0; r < keys; r++) write_key(document, head, other * kBlock + r, d_keys, d_values, r);
        }
        T* const d_q = static_cast<T*>(job_.d_q);
        for (int token = 0; token < length(document); token++) {
            write_row(of.d_queries + token / kBlock * sums_, token % kBlock, width_, job_.scale,
                      d_q + (int64_t{job_.starts[document] + token} * job_.num_heads + head) * width_);
        }
    }

    void prepare(int document, int head, const Head& of) const {
        const Rows<T> q = rows(job_.q, job_.ld_q, document, head), d_out = rows(job_.d_out, job_.ld_d_out, document, head);
        const Rows<T> out = rows(job_.out, int64_t{job_.num_heads} * width_, document, head);
        const int blocks = num_blocks(document);
        for (int block = 0; block < blocks; block++) {
            const int token = block * kBlock, queries = count(document, block);
            pack_tokens(q, token, queries, width_, job_.scale * kLog2E, of.queries + block * turned_);
            pack_tokens(d_out, token, queries, width_, 1.0f, of.d_outs + block * turned_);
            pack_numbers(q, token, queries, width_, job_.scale, of.query_lines + block * sums_);
            pack_numbers(d_out, token, queries, width_, 1.0f, of.out_lines + block * sums_);
        }
        std::fill_n(of.d_queries, blocks * sums_, 0.0f);
        std::fill_n(of.lse, blocks * kBlock, -kNothing);  // of queries that are none: no weight
        std::fill_n(of.delta, blocks * kBlock, 0.0f);
        for (int token = 0; token < length(document); token++) {
            of.lse[token] = lse(document, head)[token];
            of.delta[token] = dot(out.at(token), d_out.at(token));
        }
    }

    float dot(const T* a, const T* b) const {
        f32 products = zero();
        int i = 0;
        for (; i + W <= width_; i += W) products = fma(load_as_f32(a + i), load_as_f32(b + i), products);
        float total = sum(products);
        for (; i < width_; i++) total += as_f32(a[i]) * as_f32(b[i]);
        return total;
    }

    // Scores become weights, and products of values with gradients of outputs become gradients of scores.
    static void slope(const Rule& rule, int block, int other, int queries, int keys, const Head& of, float* weights, float* slopes) {
        const bool diagonal = other == block, bends = rule.bends(other, block);
        for (int p = 0; p * NR < queries; p++) {
            const int query = block * kBlock + p * NR, count = keys_of(p, keys, diagonal);
            const f32 lse0 = load(of.lse + query), lse1 = load(of.lse + query + W);
            const f32 delta0 = load(of.delta + query), delta1 = load(of.delta + query + W);
            for (int r = 0; r < count; r++) {
                float *weight = weights + r * kBlock + p * NR, *slope = slopes + r * kBlock + p * NR;
                if (bends) rule.bend(weight, other * kBlock + r, query, kNothing);
                const f32 weight0 = exp2(sub(load(weight), lse0)), weight1 = exp2(sub(load(weight + W), lse1));
                store(weight, weight0);
                store(weight + W, weight1);
                store(slope, mul(weight0, sub(load(slope), delta0)));
                store(slope + W, mul(weight1, sub(load(slope + W), delta1)));
            }
            for (int r = count; r < keys; r++) {
                std::fill_n(weights + r * kBlock + p * NR, NR, 0.0f);
                std::fill_n(slopes + r * kBlock + p * NR, NR, 0.0f);
            }
        }
    }

    // Where the keys' (0) or values' (1) gradients of one head and token wait for those of the group's other heads.
    float* share(int which, int head, int token) const {
        return shares_ + ((int64_t{which} * job_.num_heads + head) * tokens_ + token) * width_;
    }

    void write_key(int document, int head, int token, const float* d_keys, const float* d_values, int r) const {
        const int at = job_.starts[document] + token;
        if (group_ > 1) {
            write_row(d_keys, r, width_, 1.0f, share(0, head, at));
            write_row(d_values, r, width_, 1.0f, share(1, head, at));
        } else {
            const int64_t to = (int64_t{at} * job_.num_heads + head) * width_;
            write_row(d_keys, r, width_, 1.0f, static_cast<T*>(job_.d_k) + to);
            write_row(d_values, r, width_, 1.0f, static_cast<T*>(job_.d_v) + to);
        }
    }

    void fold(int token) const {
        for (int kv_head = 0; kv_head < job_.num_kv_heads; kv_head++) {
            const int64_t to = (int64_t{token} * job_.num_kv_heads + kv_head) * width_;
            fold_heads(0, kv_head, token, static_cast<T*>(job_.d_k) + to);
            fold_heads(1, kv_head, token, static_cast<T*>(job_.d_v) + to);
        }
    }

    void fold_heads(int which, int kv_head, int token, T* to) const {
        int i = 0;
        for (; i + W <= width_; i += W) {
            f32 total = zero();
            for (int g = 0; g < group_; g++) total = add(total, load(share(which, kv_head * group_ + g, token) + i));
            store_as(to + i, total);
        }
        for (; i < width_; i++) {
            float total = 0.0f;
            for (int g = 0; g < group_; g++) total += share(which, kv_head * group_ + g, token)[i];
            set_as(to + i, total);
        }
    }

    Workshop& shop_;
    const gemel_packed_attention& job_;
    const int width_, group_, columns_;  // columns: of the width, in NR
    const int tokens_;
    const int64_t sums_, turned_;  // numbers of one block: [columns][kBlock][NR], [kPanels][width][NR]
    float* shares_ = nullptr;
};

}  // namespace
}  // namespace gemel

extern "C" {

void gemel_packed_attention_forward(gemel_workshop* workshop, const gemel_packed_attention* job) {
    gemel::Workshop& shop = *reinterpret_cast<gemel::Workshop*>(workshop);
    if (job->format == GEMEL_BF16) return gemel::Attention<gemel::bf16>(shop, *job).forward();
    gemel::Attention<float>(shop, *job).forward();
}

void gemel_packed_attention_backward(gemel_workshop* workshop, const gemel_packed_attention* job) {
    gemel::Workshop& shop = *reinterpret_cast<gemel::Workshop*>(workshop);
    if (job->format == GEMEL_BF16) return gemel::Attention<gemel::bf16>(shop, *job).backward();
    gemel::Attention<float>(shop, *job).backward();
}

}  // extern "C"
