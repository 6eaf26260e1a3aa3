// Matrices of weights into panels, once at loading, and back, for tests.
#include <cstring>
#include <vector>

#include "matmul.h"
#include "products.h"

namespace gemel {
namespace {

// The row of W [n, k] that column j of a panel holds; -1 for none.
int source(const gemel_weight& weight, int panel, int j) {
    if (!weight.paired) {
        const int row = panel * NR + j;
        return row < weight.n ? row : -1;
    }
    const int half = weight.n / 2, pair = panel * W + j % W;
    return pair < half ? (j < W ? pair : half + pair) : -1;
}

// Writes panels front to back; rows that are none are zeros.
class Packer {
   public:
    Packer(const gemel_weight& weight, const void* values, const float* scales, const float* minima)
        : weight_(weight), values_(static_cast<const uint8_t*>(values)), scales_(scales), minima_(minima) {}

    void pack(int panel, uint8_t* to) {
        for (int j = 0; j < NR; j++) rows_[j] = source(weight_, panel, j);
        std::memset(to, 0, panel_bytes(weight_));
        if (head_bytes(weight_)) {
            for (int j = 0; j < NR; j++) put(to, rows_[j] < 0 ? 0.0f : scales_[rows_[j]]);
        }
        switch (weight_.format) {
            case GEMEL_F32: interleave<float>(to, 0, weight_.k, 1); break;
            case GEMEL_BF16: interleave<bf16>(to, 0, weight_.k, 2); break;
            default:
                const int group = weight_.group ? weight_.group : weight_.k;
                for (int from = 0; from < weight_.k; from += group) {
                    if (weight_.group) halves(to, scales_, from / group);
                    if (weight_.minima) halves(to, minima_, from / group);
                    if (weight_.format == GEMEL_I8) {
                        eights(to, from, group);
                    } else {
                        fours(to, from, group);
                    }
                }
        }
    }

   private:
    template <class T>
    static void put(uint8_t*& to, T value) {
        std::memcpy(to, &value, sizeof value);
        to += sizeof value;
    }

    template <class T>
    T value(int j, int i) const {
        T v{};
        if (rows_[j] >= 0) std::memcpy(&v, values_ + sizeof(T) * (static_cast<int64_t>(rows_[j]) * weight_.k + i), sizeof v);
        return v;
    }

    uint8_t nibble(int j, int i) const {
        if (rows_[j] < 0) return 0;
        const int64_t at = static_cast<int64_t>(rows_[j]) * weight_.k + i;
        return (values_[at / 2] >> (at % 2 * 4)) & 15;
    }

    template <class T>
    void interleave(uint8_t*& to, int from, int count, int run) const {
        for (int i = from; i < from + count; i += run) {
            for (int j = 0; j < NR; j++) {
                for (int s = 0; s < run; s++) put(to, value<T>(j, i + s));
            }
        }
    }

    void eights(uint8_t*& to, int from, int count) const {
        uint8_t* const first = to;
        interleave<int8_t>(to, from, count, 4);
        for (uint8_t* p = first; p < to; p++) *p = static_cast<uint8_t>(*p + kOffset);
    }

    void fours(uint8_t*& to, int from, int count) const {
        for (int i = from; i < from + count; i += 8) {
            for (int j = 0; j < NR; j++) {
                for (int s = i; s < i + 4; s++) *to++ = static_cast<uint8_t>(nibble(j, s) | nibble(j, s + 4) << 4);
            }
        }
    }

    void halves(uint8_t*& to, const float* table, int group) const {
        const int groups = weight_.k / weight_.group;
        for (int j = 0; j < NR; j++) put(to, rows_[j] < 0 ? fp16{0} : to_fp16(table[static_cast<int64_t>(rows_[j]) * groups + group]));
    }

    const gemel_weight& weight_;
    const uint8_t* values_;
    const float *scales_, *minima_;
    int rows_[NR];
};

}  // namespace
}  // namespace gemel

extern "C" {

int64_t gemel_packed_bytes(const gemel_weight* weight) { return gemel::num_panels(*weight) * gemel::panel_bytes(*weight); }

void gemel_pack(const gemel_weight* weight, const void* values, const float* scales, const float* minima, void* packed) {
    gemel::Packer packer(*weight, values, scales, minima);
    uint8_t* to = static_cast<uint8_t*>(packed);
    for (int panel = 0; panel < gemel::num_panels(*weight); panel++) packer.pack(panel, to + panel * gemel::panel_bytes(*weight));
}

void gemel_unpack(const gemel_weight* weight, float* values) {
    using namespace gemel;
    for (int panel = 0; panel < num_panels(*weight); panel++) {
        widen(*weight, panel, 0, weight->k, [&](int i, f32 left, f32 right) {
            float columns[NR];
            store(columns, left);
            store(columns + W, right);
            for (int j = 0; j < NR; j++) {
                const int row = source(*weight, panel, j);
                if (row >= 0) values[static_cast<int64_t>(row) * weight->k + i] = columns[j];
            }
        });
    }
}

}  // extern "C"
