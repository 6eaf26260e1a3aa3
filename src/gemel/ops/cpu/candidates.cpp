#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace gemel {

int gather(const float* values, int begin, int end, float cut, float* value, int32_t* token) {
    const f32 limit = set1(cut);
    constexpr uint32_t kAll = (1u << W) - 1;
    int count = 0, i = begin;
    for (; i + W <= end; i += W) {
        uint32_t hits = at_least(limit, load(values + i));
        if (hits == kAll) {
            store(value + count, load(values + i));
            for (int lane = 0; lane < W; lane++) token[count + lane] = i + lane;
            count += W;
            continue;
        }
        for (; hits; hits &= hits - 1) {
            token[count] = i + __builtin_ctz(hits);
            value[count] = values[token[count]];
            count++;
        }
    }
    for (; i < end; i++) {
        if (values[i] >= cut) {
            token[count] = i;
            value[count++] = values[i];
        }
    }
    return count;
}

Ranking::Ranking(const Candidates& all) : all_(all) {
    if (all_.count <= kFew || !bin()) sort();
}

// False if bins would not tell the candidates apart.
bool Ranking::bin() {
    f32 most = load(all_.value), least = most;  // there are enough for a vector
    for (int i = 0; i < all_.count; i += W) {
        const f32 v = load(all_.value + std::min(i, all_.count - W));
        most = max(most, v);
        least = min(least, v);
    }
    top_ = largest(most);
    scale_ = static_cast<float>(kBins) / (top_ + largest(sub(zero(), least)));
    if (!std::isfinite(scale_) || scale_ == 0.0f) return false;
    bins_.resize(kBins);
    constexpr int kRun = 64;  // bins are worked out by vectors, and then filled one by one
    for (int first = 0; first < all_.count; first += kRun) {
        int32_t which[kRun];
        const int count = std::min(kRun, all_.count - first);
        for (int i = 0; i < count; i++) which[i] = bin_of(all_.value[first + i]);
        for (int i = 0; i < count; i++) {
            bins_[which[i]].weight += all_.weight[first + i];
            bins_[which[i]].count++;
        }
    }
    const auto fullest = std::max_element(bins_.begin(), bins_.end(), [](const Bin& a, const Bin& b) { return a.count < b.count; });
    if (fullest->count < all_.count) return true;
    bins_.clear();
    return false;
}

void Ranking::sort() {
    order_.resize(all_.count);
    std::iota(order_.begin(), order_.end(), 0);
    const auto above = [this](int a, int b) { return all_.value[a] > all_.value[b]; };
    if (!std::is_sorted(order_.begin(), order_.end(), above)) std::stable_sort(order_.begin(), order_.end(), above);
}

int Ranking::bin_of(float value) const { return std::min(static_cast<int>((top_ - value) * scale_), kBins - 1); }

Ranking::Part Ranking::part(int bin) const {
    Part part;
    for (int i = 0; i < all_.count; i++) {
        if (bin_of(all_.value[i]) != bin) continue;
        part.value.push_back(all_.value[i]);
        part.token.push_back(all_.token[i]);
        part.weight.push_back(all_.weight[i]);
    }
    return part;
}

Candidates Ranking::Part::candidates() { return {value.data(), token.data(), weight.data(), static_cast<int>(value.size())}; }

template <class Passes>
Place Ranking::find(const Passes& passes, Place above) const {
    if (bins_.empty()) {
        Place last = above;
        for (const int i : order_) {
            above = {all_.value[i], all_.token[i], above.rank + 1, above.running + all_.weight[i]};
            if (all_.weight[i] > 0.0f || last.token < 0) last = above;
            if (passes(above)) return above;
        }
        return last;
    }
    int last = 0;
    Place before = above;
    for (int bin = 0; bin < kBins; bin++) {
        if (bins_[bin].weight > 0.0) {
            last = bin;
            before = above;
        }
        Place end = above;
        end.rank += bins_[bin].count;
        end.running += bins_[bin].weight;
        if (bins_[bin].count && passes(end)) {
            last = bin;
            before = above;
            break;
        }
        above = end;
    }
    Part some = part(last);
    return Ranking(some.candidates()).find(passes, {0.0f, -1, before.rank, before.running});
}

Place Ranking::at(int64_t rank) const {
    return find([rank](const Place& place) { return place.rank >= rank; }, {});
}

Place Ranking::reaching(double weight) const {
    return find([weight](const Place& place) { return place.running >= weight; }, {});
}

Place Ranking::exceeding(double weight) const {
    return find([weight](const Place& place) { return place.running > weight; }, {});
}

}  // namespace gemel
