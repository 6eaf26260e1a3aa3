// Tokens that may be chosen, and finding one of them by its rank or by the weight above it without sorting them all.
#pragma once

#include <cstdint>
#include <vector>

#include "simd.h"

namespace gemel {

constexpr float kLeast = -87.3f;  // e^kLeast is nearly the smallest normal number

// e^x for x <= 0, and exactly 0 below kLeast.
inline f32 weight(f32 x) { return zero_below(set1(kLeast), x, exp(x)); }

// Values, tokens and weights side by side, in order of the tokens.
struct Candidates {
    float* value = nullptr;
    int32_t* token = nullptr;
    float* weight = nullptr;
    int count = 0;

    // Keeps those at which keep(index) is true.
    template <class Keep>
    void filter(const Keep& keep) {
        int kept = 0;
        for (int i = 0; i < count; i++) {
            value[kept] = value[i];
            token[kept] = token[i];
            weight[kept] = weight[i];
            kept += keep(i);
        }
        count = kept;
    }
};

// Writes those of values[begin, end) that are at least `cut`, a finite number, and their indices. Returns how many they are; there must be
// room for all.
int gather(const float* values, int begin, int end, float cut, float* value, int32_t* token);

// Where a search through ranked candidates ended.
struct Place {
    float value = 0.0f;
    int32_t token = -1;
    int64_t rank = -1;
    double running = 0.0;  // its weight and those of all that rank above it
};

// Candidates by falling value, of equal ones the smaller token first. They are counted into bins by value, and only the bin in which a
// search ends is looked at more closely, so nearly all of them are touched once. What is ranked must stay where it is.
class Ranking {
 public:
    explicit Ranking(const Candidates& all);

    Place at(int64_t rank) const;          // the last one if there are fewer
    Place reaching(double weight) const;   // the first at which the running weight is at least this
    Place exceeding(double weight) const;  // the first at which it is more; if there is none, the last that weighs anything

 private:
    static constexpr int kBins = 256;
    static constexpr int kFew = 48;  // sorted at once

    struct Bin {
        double weight = 0.0;
        int64_t count = 0;
    };
    struct Part {
        std::vector<float> value, weight;
        std::vector<int32_t> token;
        Candidates candidates();
    };

    bool bin();
    void sort();
    template <class Each>
    void each_bin(const Each& each) const;
    Part part(int bin) const;
    template <class Passes>
    Place find(const Passes& passes, Place above) const;

    const Candidates all_;
    float top_ = 0.0f, scale_ = 0.0f;
    std::vector<Bin> bins_;   // if there are many
    std::vector<int> order_;  // if they are few
};

}  // namespace gemel
