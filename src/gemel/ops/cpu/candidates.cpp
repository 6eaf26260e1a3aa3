#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace gemel {

int gather(const float* values, int begin, int end, float cut, float* value, int32_t* token) {
    const f32 limit = set1(cut);
    int count = 0, i = begin;
    for (; i + W <= end; i += W) {
        if (!at_least(limit, load(values + i))) continue;
        for (int lane = i; lane < i + W; lane++) {  // without a branch: who is in is as good as random
            value[count] = values[lane];
            token[count] = lane;
            count += values[lane] >= cut;
        }
    }
    for (; i < end; i++) {
        if (values[i] < cut) continue;
        value[count] = values[i];
        token[count++] = i;
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
    each_bin([this](int i, int bin) {
        bins_[bin].weight += all_.weight[i];
        bins_[bin].count++;
    });
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

// Calls each(index, bin) for all candidates.
template <class Each>
void Ranking::each_bin(const Each& each) const {
    constexpr int kRun = 64;  // bins are worked out by vectors, and then used one by one
    for (int first = 0; first < all_.count; first += kRun) {
        int32_t bin[kRun];
        const int count = std::min(kRun, all_.count - first);
        const float* value = all_.value + first;
        for (int i = 0; i < count; i++) bin[i] = static_cast<int32_t>((top_ - value[i]) * scale_);
        for (int i = 0; i < count; i++) each(first + i, std::min(bin[i], kBins - 1));
    }
}

Ranking::Part Ranking::part(int bin) const {
    std::vector<int> index(bins_[bin].count + 1);
    int count = 0;
    each_bin([&](int i, int own) {
        index[count] = i;
        count += own == bin;
    });
    index.pop_back();
    Part part;
    for (const int i : index) {
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
