// Draws tokens from rows of logits: what engine/sample.py does with tensors, in a few passes over a row and without sorting it.
//
// A row goes through stages, each over the row's chunks or over the row as a whole. With as many rows as threads, a row stays with one
// thread and in its cache; with fewer, threads share the chunks of each stage. Sums are taken over fixed blocks and added up in order, so
// a row's numbers depend neither on that nor on the rows beside it.
//
// Tokens that cannot be kept are left out by a bound on their logits before anything is ranked. For top-k it is the k-th largest of the
// maxima of small groups, which k logits at least reach. For top-p it is guessed from a part of the row how much the light tokens weigh
// together; if it turns out that too much was left out, a weight takes its place of which even a whole vocabulary would not be too much.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "candidates.h"
#include "gemel.h"
#include "threads.h"

namespace gemel {
namespace {

constexpr int kBlock = 256;          // logits whose weights are summed together
constexpr int kChunk = 32 * kBlock;  // logits that a thread takes at once
constexpr int kGroup = 32;           // logits of which the largest is kept
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int pieces(int count, int size) { return (count + size - 1) / size; }

// SplitMix64 (Steele et al. 2014) over three words, as in engine/sample.py.
uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

double uniform(const gemel_draw& draw) {
    const uint64_t state = mix(mix(draw.seed ^ mix(draw.stream)) ^ mix(draw.counter));
    return std::ldexp(static_cast<double>(state >> 11), -53);
}

// Memory of one row. Pages that no stage touches cost nothing.
struct Scratch {
    explicit Scratch(int vocabulary)
        : adjusted(new float[vocabulary]),
          value(new float[vocabulary + W]),
          weight(new float[vocabulary + W]),
          token(new int32_t[vocabulary]),
          group(new float[2 * pieces(vocabulary, kGroup)]),
          sum(new double[2 * pieces(vocabulary, kBlock)]),
          found(new int[pieces(vocabulary, kChunk)]) {}

    std::unique_ptr<float[]> adjusted, value, weight;
    std::unique_ptr<int32_t[]> token;
    std::unique_ptr<float[]> group;
    std::unique_ptr<double[]> sum;
    std::unique_ptr<int[]> found;
};

// Calls each(first, logits) for vectors that cover [begin, end); the last one is filled up with -inf.
template <class Each>
inline void vectors(const float* values, int begin, int end, const Each& each) {
    int i = begin;
    for (; i + W <= end; i += W) each(i, load(values + i));
    if (i == end) return;
    float rest[W];
    for (int lane = 0; lane < W; lane++) rest[lane] = i + lane < end ? values[i + lane] : -kInfinity;
    each(i, load(rest));
}

// A row of logits at a temperature: maxima of its groups, and sums of its blocks.
struct Distribution {
    const float* values;
    int count;
    float temperature, largest;
    float* group;
    double* sum;

    int groups() const { return pieces(count, kGroup); }
    int blocks() const { return pieces(count, kBlock); }

    f32 weigh(f32 v) const { return weight(div(sub(v, set1(largest)), set1(temperature))); }

    // Weights of some logits; there must be room for a whole number of vectors.
    void weigh(const float* some, int num, float* to) const {
        vectors(some, 0, num, [&](int i, f32 v) { store(to + i, weigh(v)); });
    }

    void find_maxima(int begin, int end) const {
        for (int first = begin; first < end; first += kGroup) {
            f32 most = set1(-kInfinity);
            vectors(values, first, std::min(first + kGroup, end), [&](int, f32 v) { most = max(most, v); });
            group[first / kGroup] = gemel::largest(most);
        }
    }

    void add_up(int begin, int end) const {
        constexpr int kLanes = 32;  // each adds up eight weights in fp32; then they are added in fp64
        for (int first = begin; first < end; first += kBlock) {
            f32 sums[kLanes / W];
            for (f32& each : sums) each = zero();
            const int last = std::min(first + kBlock, end);
            if (last - first == kBlock) {
                for (int i = first; i < last; i += kLanes) {
                    for (int j = 0; j < kLanes / W; j++) sums[j] = add(sums[j], weigh(load(values + i + j * W)));
                }
            } else {
                vectors(values, first, last, [&](int i, f32 v) {
                    f32& to = sums[(i - first) / W % (kLanes / W)];
                    to = add(to, weigh(v));
                });
            }
            float lanes[kLanes];
            for (int j = 0; j < kLanes / W; j++) store(lanes + j * W, sums[j]);
            sum[first / kBlock] = std::accumulate(lanes, lanes + kLanes, 0.0);
        }
    }

    double total() const { return std::accumulate(sum, sum + blocks(), 0.0); }

    // A logit that at least `k` of them reach. `room` [groups].
    float reached_by(int k, float* room) const {
        if (k > groups()) return -FLT_MAX;
        std::copy(group, group + groups(), room);
        std::nth_element(room, room + (k - 1), room + groups(), [](float a, float b) { return a > b; });
        return std::max(room[k - 1], -FLT_MAX);
    }

    // A weight such that the lighter ones together come to about `sum`: by a sixteenth of them, counted by their logarithms.
    double light(double sum) const {
        constexpr int kEvery = 16, kPerUnit = 4, kBins = 88 * kPerUnit;
        double bins[kBins] = {};
        float weights[W];
        const float per_unit = -kPerUnit / temperature;
        for (int i = 0; i + W <= count; i += kEvery * W) {
            weigh(values + i, W, weights);
            for (int lane = 0; lane < W; lane++) {
                const float bin = (values[i + lane] - largest) * per_unit;
                if (bin < static_cast<float>(kBins)) bins[static_cast<int>(bin)] += kEvery * weights[lane];
            }
        }
        int bin = kBins;
        for (double left = sum; bin > 1 && bins[bin - 1] <= left; bin--) left -= bins[bin - 1];
        return std::exp(-static_cast<double>(bin) / kPerUnit);
    }

    // A logit that all reach whose weight is `least` or more, in spite of rounding.
    float weighing(double least) const {
        const double logit = largest + temperature * (std::log(least) - 1e-3);
        return std::max(std::nextafter(static_cast<float>(std::max(logit, -1.0 * FLT_MAX)), -kInfinity), -FLT_MAX);
    }
};

// One draw, stage by stage.
class Drawing {
   public:
    Drawing(const gemel_draw& draw, const float* logits, int vocabulary, Scratch& scratch, gemel_drawn& drawn, gemel_drawn* likeliest)
        : draw_(draw), scratch_(scratch), drawn_(drawn), likeliest_(likeliest), vocabulary_(vocabulary) {
        const float* row = logits + static_cast<int64_t>(draw.row) * vocabulary;
        model_ = {row, vocabulary, 1.0f, draw.largest, scratch.group.get(), scratch.sum.get()};
        own_ = {changed() ? scratch.adjusted.get() : row, vocabulary,          std::max(draw.temperature, FLT_MIN),
                draw.largest,                             model_.group + model_.groups(), model_.sum + model_.blocks()};
    }

    void copy(int chunk) {
        if (changed()) std::copy(model_.values + begin(chunk), model_.values + end(chunk), scratch_.adjusted.get() + begin(chunk));
    }

    void adjust(int) {
        for (int i = 0; i < draw_.num_marked; i++) {
            float& logit = scratch_.adjusted[draw_.marked[i]];
            const int count = draw_.counts[i];
            logit += draw_.bias[i];
            if (count >= 0 && draw_.repetition != 1.0f) logit = logit > 0.0f ? logit / draw_.repetition : logit * draw_.repetition;
            if (count > 0) logit -= draw_.presence + draw_.frequency * static_cast<float>(count);
        }
        for (int i = 0; i < draw_.num_banned; i++) scratch_.adjusted[draw_.banned[i]] = -kInfinity;
    }

    void find_maxima(int chunk) {
        if (changed() || takes_k()) own_.find_maxima(begin(chunk), end(chunk));
        if (draw_.logprobs > 0) model_.find_maxima(begin(chunk), end(chunk));
    }

    void settle(int) {
        if (changed()) own_.largest = *std::max_element(own_.group, own_.group + own_.groups());
    }

    void add_up(int chunk) {
        if (needs_total()) own_.add_up(begin(chunk), end(chunk));
        if (draw_.logprobs >= 0) model_.add_up(begin(chunk), end(chunk));
    }

    void bound(int) {
        if (!filtered()) return;
        cut_ = lowest();
        if (needs_total()) cut_ = std::max(cut_, own_.weighing(own_.light(0.9 * left_out())));
    }

    void gather(int chunk) {
        if (!filtered()) return;
        const int first = begin(chunk);
        scratch_.found[chunk] = gemel::gather(own_.values, first, end(chunk), cut_, &scratch_.value[first], &scratch_.token[first]);
    }

    void choose(int) {
        if (!std::isfinite(own_.largest)) {
            drawn_ = {-1, 0.0f};
        } else if (draw_.temperature == 0.0f) {
            drawn_.token = changed() ? first_largest() : draw_.likeliest;
        } else {
            drawn_.token = filtered() ? from_candidates() : from_all();
        }
        if (draw_.logprobs >= 0) report();
    }

    static int chunks(int vocabulary) { return pieces(vocabulary, kChunk); }

   private:
    int begin(int chunk) const { return chunk * kChunk; }
    int end(int chunk) const { return std::min((chunk + 1) * kChunk, vocabulary_); }
    bool changed() const { return draw_.num_marked || draw_.num_banned; }
    bool takes_k() const { return draw_.temperature != 0.0f && draw_.top_k > 0 && draw_.top_k < vocabulary_; }
    bool filtered() const { return draw_.temperature != 0.0f && (draw_.top_k > 0 || draw_.top_p < 1.0 || draw_.min_p > 0.0); }
    bool needs_total() const { return draw_.temperature != 0.0f && (!filtered() || (draw_.top_p < 1.0 && !takes_k())); }

    // What the tokens weigh that top-p leaves out, unless it follows top-k.
    double left_out() const { return (1.0 - draw_.top_p) * own_.total(); }

    // A logit that every token reaches which can be kept.
    float lowest() const {
        float cut = own_.weighing(std::exp(static_cast<double>(kLeast)));
        if (takes_k()) cut = own_.reached_by(draw_.top_k, scratch_.value.get());
        if (takes_k() && draw_.top_p < 1.0) return cut;  // its part of what top-k leaves, of which all are needed
        if (draw_.min_p > 0.0) cut = std::max(cut, own_.weighing(draw_.min_p));
        return needs_total() ? std::max(cut, own_.weighing(left_out() / vocabulary_)) : cut;
    }

    // What all chunks have gathered, with weights.
    Candidates gathered() const {
        Candidates all{scratch_.value.get(), scratch_.token.get(), scratch_.weight.get(), 0};
        for (int chunk = 0; chunk < chunks(vocabulary_); chunk++) {
            std::memmove(all.value + all.count, all.value + begin(chunk), scratch_.found[chunk] * sizeof(float));
            std::memmove(all.token + all.count, all.token + begin(chunk), scratch_.found[chunk] * sizeof(int32_t));
            all.count += scratch_.found[chunk];
        }
        own_.weigh(all.value, all.count, all.weight);
        return all;
    }

    static double weight_of(const Candidates& all) { return std::accumulate(all.weight, all.weight + all.count, 0.0); }

    int from_candidates() {
        Candidates all = gathered();
        if (needs_total() && weight_of(all) < draw_.top_p * own_.total() && lowest() < cut_) {  // the guess was wrong
            cut_ = lowest();
            for (int chunk = 0; chunk < chunks(vocabulary_); chunk++) gather(chunk);
            all = gathered();
        }
        if (takes_k() && all.count > draw_.top_k) {
            const Place last = Ranking(all).at(draw_.top_k - 1);
            all.filter([&](int i) { return all.value[i] > last.value || (all.value[i] == last.value && all.token[i] <= last.token); });
        }
        const double total = needs_total() ? own_.total() : weight_of(all);
        if (draw_.min_p > 0.0) all.filter([&](int i) { return all.weight[i] >= draw_.min_p; });
        const Ranking ranking(all);
        const Place last = ranking.reaching(draw_.top_p < 1.0 ? draw_.top_p * total : std::numeric_limits<double>::infinity());
        const Place place = ranking.exceeding(uniform(draw_) * last.running);
        return place.rank < last.rank ? place.token : last.token;
    }

    // Inverts the whole distribution, in order of the tokens: which block, then which token of it.
    int from_all() const {
        const double target = uniform(draw_) * own_.total();
        double running = 0.0;
        int block = 0, last = 0;
        for (; block < own_.blocks(); block++) {
            if (own_.sum[block] > 0.0) last = block;
            if (running + own_.sum[block] > target) break;
            running += own_.sum[block];
        }
        if (block == own_.blocks()) block = last;
        const int first = block * kBlock, end = std::min(first + kBlock, vocabulary_);
        float weights[kBlock + W];
        own_.weigh(own_.values + first, end - first, weights);
        int token = first;
        for (int i = 0; i < end - first; i++) {
            running += weights[i];
            if (weights[i] > 0.0f) token = first + i;
            if (running > target && weights[i] > 0.0f) break;
        }
        return token;
    }

    int first_largest() const {
        const int group = static_cast<int>(std::find(own_.group, own_.group + own_.groups(), own_.largest) - own_.group);
        return static_cast<int>(std::find(own_.values + group * kGroup, own_.values + vocabulary_, own_.largest) - own_.values);
    }

    void report() {
        const double log_total = std::log(model_.total());
        const auto logprob = [&](int token) { return static_cast<float>(model_.values[token] - model_.largest - log_total); };
        if (drawn_.token >= 0) drawn_.logprob = logprob(drawn_.token);
        const int wanted = std::min(draw_.logprobs, vocabulary_);
        if (!wanted) return;
        const float cut = model_.reached_by(wanted, scratch_.value.get());
        int32_t* token = scratch_.token.get();
        const int count = gemel::gather(model_.values, 0, vocabulary_, cut, scratch_.value.get(), token);
        std::partial_sort(token, token + wanted, token + count, [&](int a, int b) {
            return model_.values[a] > model_.values[b] || (model_.values[a] == model_.values[b] && a < b);
        });
        for (int i = 0; i < wanted; i++) likeliest_[i] = {token[i], logprob(token[i])};
    }

    const gemel_draw& draw_;
    Scratch& scratch_;
    gemel_drawn& drawn_;
    gemel_drawn* likeliest_;
    const int vocabulary_;
    Distribution model_, own_;  // the row as it is, and the one that is drawn from
    float cut_ = 0.0f;
};

struct Stage {
    void (Drawing::*work)(int chunk);
    bool whole;
};

constexpr Stage kStages[] = {
    {&Drawing::copy, false},  {&Drawing::adjust, true}, {&Drawing::find_maxima, false}, {&Drawing::settle, true},
    {&Drawing::add_up, false}, {&Drawing::bound, true},  {&Drawing::gather, false},      {&Drawing::choose, true},
};

class Sampler {
   public:
    Sampler(Team& team, int vocabulary) : team_(team), vocabulary_(vocabulary) {
        for (int i = 0; i < team.threads(); i++) scratch_.emplace_back(vocabulary);
    }

    void run(const float* logits, int num_draws, const gemel_draw* draws, gemel_drawn* drawn, int most, gemel_drawn* likeliest) {
        const auto drawing = [&](int i, int room) {
            return Drawing(draws[i], logits, vocabulary_, scratch_[room], drawn[i], likeliest + static_cast<int64_t>(i) * most);
        };
        const int chunks = Drawing::chunks(vocabulary_);
        if (num_draws >= team_.threads()) {
            team_.run(1, [&](int rank) {
                team_.share(rank, num_draws, [&](int i, int me) {
                    Drawing one = drawing(i, me);
                    for (const Stage& stage : kStages) {
                        for (int chunk = 0; chunk < (stage.whole ? 1 : chunks); chunk++) (one.*stage.work)(chunk);
                    }
                });
            });
            return;
        }
        std::vector<Drawing> drawings;
        for (int i = 0; i < num_draws; i++) drawings.push_back(drawing(i, i));
        team_.run(static_cast<int>(std::size(kStages)), [&](int rank) {
            for (const Stage& stage : kStages) {
                const int each = stage.whole ? 1 : chunks;
                team_.share(rank, num_draws * each, [&](int item, int) { (drawings[item / each].*stage.work)(item % each); });
            }
        });
    }

   private:
    Team& team_;
    const int vocabulary_;
    std::vector<Scratch> scratch_;
};

}  // namespace
}  // namespace gemel

extern "C" {

gemel_sampler* gemel_sampler_new(gemel_team* team, int32_t vocabulary) {
    return reinterpret_cast<gemel_sampler*>(new gemel::Sampler(*reinterpret_cast<gemel::Team*>(team), vocabulary));
}

void gemel_sampler_free(gemel_sampler* sampler) { delete reinterpret_cast<gemel::Sampler*>(sampler); }

void gemel_sampler_run(gemel_sampler* sampler, const float* logits, int32_t num_draws, const gemel_draw* draws, gemel_drawn* drawn,
                       int32_t most, gemel_drawn* likeliest) {
    reinterpret_cast<gemel::Sampler*>(sampler)->run(logits, num_draws, draws, drawn, most, likeliest);
}

}  // extern "C"
