// The head and the cross-entropy behind it, for a few hundred tokens at a time.
//
// Logits are made and used a block of vocabulary at a time, [96 entries of the vocabulary][tokens]: so the weight is the left factor and
// lies in memory as it is read, and what is done to a token is done to a lane. Of each block only e^(logit - largest of the block) is kept,
// with the largest and the sum of each token; when all blocks are known, one factor per token and block makes gradients of them. A block of
// gradients is formed once, and goes into its rows of the weight's gradient while it is in the cache, and, turned, into the hidden
// states' gradient.
//
// Computing gradients with the loss spares a second product for the logits (as Liger Kernel does, Hsu et al. 2024, arXiv 2410.10989);
// blocks of vocabulary that meet in a log-sum-exp are from Wijmans et al. 2024, "Cut Your Losses", arXiv 2411.09009.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "train.h"
#include "workshop.h"

namespace gemel {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kScoreBytes = 64 << 20;  // of the kept exponentials: more tokens at a time read the weight less often
constexpr int kChunkBlocks = 20;           // blocks of vocabulary whose gradients wait for the product with the weight
constexpr int64_t kChunkRows = int64_t{kChunkBlocks} * kBlockRows;

int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// What a block of vocabulary knows of W tokens.
struct Moments {
    float largest[W], sum[W], total[W];  // the largest logit, the sum of e^(logit - largest), and the sum of logits
};

// `T` is the type of hidden states and weight, and of what is kept of the logits.
template <class T>
class HeadLoss {
   public:
    HeadLoss(Workshop& shop, const gemel_head_loss& job)
        : shop_(shop), job_(job), width_(job.width), hidden_(static_cast<const T*>(job.hidden)), weight_(static_cast<const T*>(job.weight)),
          blocks_(divide_up(job.vocab, kBlockRows)), columns_(divide_up(width_, NR)), losses_(static_cast<size_t>(job.num_tokens)),
          zs_(losses_.size()) {
        const int64_t fit = kScoreBytes / (int64_t{job.vocab} * static_cast<int64_t>(sizeof(T)));
        const int slices = divide_up(job.num_tokens, std::max<int64_t>(kBlockRows, fit));
        most_ = divide_up(divide_up(job.num_tokens, slices), NR) * NR;
    }

    void run() {
        const bool differentiate = job_.d_hidden || job_.d_weight;
        const int64_t turned = int64_t{most_} * padded<P>(width_), lines = int64_t{columns_} * NR * padded<P>(most_);
        turned_ = shop_.shared[0].take<P>(turned + lines);
        lines_ = turned_ + turned;
        moments_ = shop_.shared[1].take<Moments>(int64_t{blocks_} * most_ / W);
        target_logit_ = std::vector<float>(static_cast<size_t>(most_));
        if (differentiate) {
            scores_ = shop_.shared[2].take<T>(int64_t{job_.vocab} * most_);
            const int64_t panels = columns_ * panel_size(), rows = most_ * kChunkRows, blocks = divide_up(most_, kBlockRows);
            panels_ = shop_.shared[3].take<P>(panels + rows + blocks * columns_ * kBlockRows * NR * sizeof(float) / sizeof(P));
            slopes_ = panels_ + panels;
            sums_ = reinterpret_cast<float*>(slopes_ + rows);
        }
        for (first_ = 0; first_ < job_.num_tokens; first_ += most_) {
            count_ = std::min(most_, job_.num_tokens - first_);
            const int chunks = divide_up(blocks_, kChunkBlocks);
            shop_.team.run(4 + 2 * chunks, [&](int rank) {
                shop_.team.share(rank, token_panels() + columns_, [&](int item, int) { pack_hidden(item); });
                shop_.team.share(rank, blocks_, [&](int block, int me) { score(block, differentiate, me); });
                shop_.team.share(rank, divide_up(count_, W), [&](int item, int) { reduce(item * W); });
                if (!differentiate) return;
                for (int chunk = 0; chunk < chunks; chunk++) {
                    const int begin = chunk * kChunkBlocks, end = std::min(begin + kChunkBlocks, blocks_);
                    const int packs = job_.d_hidden ? columns_ : 0;
                    shop_.team.share(rank, end - begin + packs, [&](int item, int me) {
                        if (item < end - begin) {
                            slopes(begin, begin + item, me);
                        } else {
                            pack_weight(begin, end, item - (end - begin));
                        }
                    });
                    if (!job_.d_hidden) continue;
                    const int across = divide_up(columns_, kBlockPanels);
                    shop_.team.share(rank, divide_up(count_, kBlockRows) * across, [&](int item, int me) {
                        add_hidden(begin, end, item / across * kBlockRows, item % across * kBlockPanels, me);
                    });
                }
                if (job_.d_hidden) shop_.team.share(rank, count_, [&](int token, int) { write_hidden(token); });
            });
        }
    }

    double loss() const { return in_order(losses_); }
    double z() const { return in_order(zs_); }

   private:
    using P = Multiplied<T, T>;

    static double in_order(const std::vector<double>& values) {
        double total = 0.0;
        for (const double value : values) total += value;
        return total;
    }

    int token_panels() const { return divide_up(count_, NR); }
    int rows_of(int block) const { return std::min(kBlockRows, job_.vocab - block * kBlockRows); }
    static int64_t panel_size() { return kChunkRows * NR; }
    const T* weight_row(int row) const { return weight_ + row * job_.ld_weight; }
    Moments& moments(int block, int token) const { return moments_[(int64_t{block} * most_ + token) / W]; }
    T* scores(int block, int row) const { return scores_ + (int64_t{block} * kBlockRows + row) * most_; }

    // Hidden states as both products want them: tokens side by side for the logits, numbers side by side for the weight's gradient.
    void pack_hidden(int item) {
        const T* from = hidden_ + first_ * job_.ld_hidden;
        if (item < token_panels()) {
            const int token = item * NR;
            pack_turned(from + token * job_.ld_hidden, job_.ld_hidden, width_, std::min(NR, count_ - token), NR,
                        turned_ + int64_t{item} * padded<P>(width_) * NR);
        } else {
            const int column = (item - token_panels()) * NR;
            pack_lines(from + column, job_.ld_hidden, count_, std::min(NR, width_ - column), NR,
                       lines_ + int64_t{item - token_panels()} * padded<P>(count_) * NR);
        }
    }

    void score(int block, bool keep, int me) {
        const int rows = rows_of(block), row = block * kBlockRows;
        const int64_t left_size = int64_t{padded<P>(width_)} * kBlockRows;
        P* const left = shop_.own[static_cast<size_t>(me)].take<P>(left_size + kBlockSums * sizeof(float) / sizeof(P));
        float* const sums = reinterpret_cast<float*>(left + left_size);
        pack_rows(weight_row(row), job_.ld_weight, rows, width_, left);
        const int64_t size = int64_t{padded<P>(width_)} * NR;
        for (int panel = 0; panel < token_panels(); panel += kBlockPanels) {
            const int panels = std::min(kBlockPanels, token_panels() - panel);
            multiply(left, padded<P>(width_), rows, turned_ + panel * size, size, panels, padded<P>(width_), sums, false);
            for (int p = 0; p < panels; p++) {
                for (int half = 0; half < NR; half += W) {
                    soften(block, rows, (panel + p) * NR + half, sums + p * kBlockRows * NR + half, keep);
                }
            }
        }
    }

    // W tokens of a block: logits become e^(logit - largest).
    void soften(int block, int rows, int token, const float* logits, bool keep) {
        if (token >= count_) return;
        for (int i = 0; i < std::min(W, count_ - token); i++) {
            const int row = job_.targets[first_ + token + i] - block * kBlockRows;
            if (row >= 0 && row < rows) target_logit_[static_cast<size_t>(token + i)] = logits[row * NR + i];
        }
        f32 most = load(logits), sum = zero(), total = zero();
        for (int r = 1; r < rows; r++) most = max(most, load(logits + r * NR));
        for (int r = 0; r < rows; r++) {
            const f32 logit = load(logits + r * NR), power = exp2(mul(sub(logit, most), set1(kLog2E)));
            sum = add(sum, power);
            total = add(total, logit);
            if (keep) store_as(scores(block, r) + token, power);
        }
        Moments& to = moments(block, token);
        store(to.largest, most);
        store(to.sum, sum);
        store(to.total, total);
    }

    // W tokens: their losses; and what makes a gradient of a block's exponential, in the place of the block's sum.
    void reduce(int token) {
        f32 most = load(moments(0, token).largest), sum = zero(), total = zero();
        for (int block = 1; block < blocks_; block++) most = max(most, load(moments(block, token).largest));
        for (int block = 0; block < blocks_; block++) {
            const Moments& of = moments(block, token);
            sum = fma(load(of.sum), exp2(mul(sub(load(of.largest), most), set1(kLog2E))), sum);
            total = add(total, load(of.total));
        }
        float largest[W], sums[W], totals[W], lse[W] = {}, scale[W] = {};
        store(largest, most);
        store(sums, sum);
        store(totals, total);
        const float smooth = job_.label_smoothing;
        for (int i = 0; i < std::min(W, count_ - token); i++) {
            const float weight = job_.weights[first_ + token + i], target = target_logit_[static_cast<size_t>(token + i)];
            lse[i] = largest[i] + std::log(sums[i]);
            scale[i] = weight * (1.0f + 2.0f * job_.z_loss * lse[i]);
            const double z = double{weight} * job_.z_loss * lse[i] * lse[i];
            const double mean = double{totals[i]} / job_.vocab;
            const auto at = static_cast<size_t>(first_ + token + i);
            zs_[at] = z;
            losses_[at] = double{weight} * (lse[i] - ((1.0 - smooth) * target + (smooth == 0.0f ? 0.0 : smooth * mean))) + z;
        }
        for (int block = 0; block < blocks_; block++) {
            Moments& of = moments(block, token);
            store(of.sum, mul(load(scale), exp2(mul(sub(load(of.largest), load(lse)), set1(kLog2E)))));
        }
    }

    // The gradient of a block's logits, [rows][ld]: of all tokens, those of the last lanes too, which nobody looks at.
    void fill(int block, int rows, float* to, int64_t ld) const {
        const float off = job_.label_smoothing / static_cast<float>(job_.vocab);
        for (int token = 0; token < count_; token += W) {
            const f32 factor = load(moments(block, token).sum);
            f32 less = zero();
            if (off != 0.0f) {
                float lanes[W] = {};
                for (int i = 0; i < std::min(W, count_ - token); i++) lanes[i] = job_.weights[first_ + token + i] * off;
                less = load(lanes);
            }
            for (int r = 0; r < rows; r++) {
                store(to + r * ld + token, sub(mul(load_as_f32(scores(block, r) + token), factor), less));
            }
        }
        for (int token = 0; token < count_; token++) {
            const int row = job_.targets[first_ + token] - block * kBlockRows;
            if (row >= 0 && row < rows) to[row * ld + token] -= job_.weights[first_ + token] * (1.0f - job_.label_smoothing);
        }
    }

    // Gradients of a block's logits: into the weight's gradient, and, turned, into the rows that `add_hidden` multiplies.
    void slopes(int begin, int block, int me) {
        const int rows = rows_of(block);
        const int64_t ld = spread(most_), left_size = int64_t{padded<P>(most_)} * kBlockRows;
        const int64_t narrow = std::is_same_v<P, float> ? 0 : ld * kBlockRows;
        float* const slope = shop_.own[static_cast<size_t>(me)].take<float>(ld * kBlockRows + kBlockSums + narrow + left_size);
        float* const sums = slope + ld * kBlockRows;
        fill(block, rows, slope, ld);
        const P* from = reinterpret_cast<const P*>(slope);
        if constexpr (!std::is_same_v<P, float>) {
            P* const rounded = reinterpret_cast<P*>(sums + kBlockSums);
            for (int r = 0; r < rows; r++) {
                for (int token = 0; token < padded<P>(count_); token += W) store_as(rounded + r * ld + token, load(slope + r * ld + token));
            }
            from = rounded;
        }
        if (job_.d_hidden) turn(from, ld, rows, (block - begin) * kBlockRows);
        if (!job_.d_weight) return;
        P* const left = reinterpret_cast<P*>(sums + kBlockSums + narrow);
        pack_rows(from, ld, rows, count_, left);
        const int64_t size = int64_t{padded<P>(count_)} * NR;
        for (int panel = 0; panel < columns_; panel += kBlockPanels) {
            const int panels = std::min(kBlockPanels, columns_ - panel);
            multiply(left, padded<P>(count_), rows, lines_ + panel * size, size, panels, padded<P>(count_), sums, false);
            for (int p = 0; p < panels; p++) add_weight(block, rows, (panel + p) * NR, sums + p * kBlockRows * NR);
        }
    }

    // Numbers of all tokens, [rows][ld], to where `add_hidden` has those of rows from `row` of the chunk on.
    void turn(const P* from, int64_t ld, int rows, int row) {
        for (int token = 0; token < count_; token += kBlockRows) {
            in_tiles<kRows>(std::min(kBlockRows, count_ - token), [&](auto n, int t) {
                pack_lines(from + token + t, ld, rows, n, n, slopes_ + (token + t) * kChunkRows + row * n);
            });
        }
    }

    void add_weight(int block, int rows, int column, const float* sums) {
        const int count = std::min(NR, width_ - column);
        for (int r = 0; r < rows; r++, sums += NR) {
            float* to = job_.d_weight + (int64_t{block} * kBlockRows + r) * width_ + column;
            int j = 0;
            for (; j + W <= count; j += W) store(to + j, first_ ? add(load(to + j), load(sums + j)) : load(sums + j));
            for (; j < count; j++) to[j] = first_ ? to[j] + sums[j] : sums[j];
        }
    }

    void pack_weight(int begin, int end, int column) {
        const int row = begin * kBlockRows, rows = std::min(end * kBlockRows, job_.vocab) - row;
        pack_lines(weight_row(row) + column * NR, job_.ld_weight, rows, std::min(NR, width_ - column * NR), NR,
                   panels_ + column * panel_size());
    }

    float* hidden_sums(int token, int column) { return sums_ + (int64_t{token / kBlockRows} * columns_ + column) * kBlockRows * NR; }

    // What the vocabulary of blocks [begin, end) adds to the gradient of some tokens' numbers. A sum of its own: one over all of a vocabulary,
    // number by number, would lose three digits.
    void add_hidden(int begin, int end, int token, int column, int me) {
        const int rows = std::min(end * kBlockRows, job_.vocab) - begin * kBlockRows, panels = std::min(kBlockPanels, columns_ - column);
        float *const to = hidden_sums(token, column), *const sums = begin ? shop_.own[static_cast<size_t>(me)].take<float>(kBlockSums) : to;
        multiply(slopes_ + token * kChunkRows, kChunkRows, std::min(kBlockRows, count_ - token), panels_ + column * panel_size(), panel_size(),
                 panels, padded<P>(rows), sums, false);
        if (!begin) return;
        for (int i = 0; i < panels * kBlockRows * NR; i += W) store(to + i, add(load(to + i), load(sums + i)));
    }

    void write_hidden(int token) {
        T* to = static_cast<T*>(job_.d_hidden) + int64_t{first_ + token} * width_;
        for (int column = 0; column < columns_; column++, to += NR) {
            const float* from = hidden_sums(token, column) + token % kBlockRows * NR;
            const int count = std::min(NR, width_ - column * NR);
            int j = 0;
            for (; j + W <= count; j += W) store_as(to + j, load(from + j));
            for (; j < count; j++) set_as(to + j, from[j]);
        }
    }

    Workshop& shop_;
    const gemel_head_loss& job_;
    const int width_;
    const T* const hidden_;
    const T* const weight_;
    const int blocks_, columns_;  // of the vocabulary, in kBlockRows; of the width, in NR
    int most_ = 0, first_ = 0, count_ = 0;  // tokens of a slice at most, where this one begins, how many it has
    std::vector<double> losses_, zs_;
    std::vector<float> target_logit_;
    P* turned_ = nullptr;  // hidden states, [panels of tokens][width][NR]
    P* lines_ = nullptr;   // hidden states, [panels of the width][tokens][NR]
    Moments* moments_ = nullptr;
    T* scores_ = nullptr;   // [vocabulary][most_]
    P* panels_ = nullptr;   // the weight of a chunk, [panels of the width][vocabulary][NR]
    P* slopes_ = nullptr;   // gradients of a chunk's logits, tokens in tiles
    float* sums_ = nullptr;  // gradient of the hidden states, [blocks of tokens][panels of the width][kBlockRows][NR]
};

template <class T>
void run(Workshop& shop, gemel_head_loss& job) {
    HeadLoss<T> loss(shop, job);
    loss.run();
    job.loss = loss.loss();
    job.z = loss.z();
}

}  // namespace
}  // namespace gemel

extern "C" void gemel_head_cross_entropy(gemel_workshop* workshop, gemel_head_loss* job) {
    gemel::Workshop& shop = *reinterpret_cast<gemel::Workshop*>(workshop);
    if (job->format == GEMEL_BF16) return gemel::run<gemel::bf16>(shop, *job);
    gemel::run<float>(shop, *job);
}
