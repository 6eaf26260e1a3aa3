// Matrices of weights into panels, once at loading, and back, for tests.
#include <cstring>
#include <vector>

#include "matmul.h"
#include "products.h"
#include "threads.h"

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

constexpr int kPiece = 8;  // panels that a thread takes at a time

// Whatever the format, four bytes of a row lie beside those of the next row: a panel is a transposed matrix of such words.
constexpr int kWords = 16;  // of a row at a time: a cache line

// Writes panels front to back; rows that are none are zeros.
class Packer {
   public:
    Packer(const gemel_weight& weight, const void* values, const float* scales, const float* minima)
        : weight_(weight),
          values_(static_cast<const uint8_t*>(values)),
          scales_(scales),
          minima_(minima),
          row_bytes_(row_bytes(weight)),
          none_(row_bytes_) {}

    void pack(int panel, uint8_t* to) {
        const uint8_t* const end = to + panel_bytes(weight_);
        for (int j = 0; j < NR; j++) {
            rows_[j] = source(weight_, panel, j);
            words_[j] = rows_[j] < 0 ? none_.data() : values_ + rows_[j] * row_bytes_;
        }
        if (head_bytes(weight_)) {
            for (int j = 0; j < NR; j++) put(to, rows_[j] < 0 ? 0.0f : scales_[rows_[j]]);
        }
        const int group = weight_.group ? weight_.group : weight_.k;
        const int words = static_cast<int>(row_bytes_ / 4) / (weight_.k / group);
        for (int number = 0; number * group < weight_.k; number++) {
            if (weight_.group) halves(to, scales_, number);
            if (weight_.minima) halves(to, minima_, number);
            interleave(to, words);
        }
        std::memset(to, 0, end - to);
    }

   private:
    static int64_t row_bytes(const gemel_weight& weight) {
        switch (weight.format) {
            case GEMEL_F32: return static_cast<int64_t>(weight.k) * 4;
            case GEMEL_BF16: return static_cast<int64_t>(weight.k) * 2;
            default: return weight.format == GEMEL_I8 ? weight.k : weight.k / 2;
        }
    }

    template <class T>
    static void put(uint8_t*& to, T value) {
        std::memcpy(to, &value, sizeof value);
        to += sizeof value;
    }

    // The next `count` words of all rows.
    void interleave(uint8_t*& to, int count) {
        uint8_t* const first = to;
        for (int i = 0; i < count; i += kWords) {
            const int size = count - i < kWords ? count - i : kWords;
            for (int j = 0; j < NR; j++) {
                uint32_t words[kWords];
                std::memcpy(words, words_[j], 4 * size);
                words_[j] += 4 * size;
                for (int s = 0; s < size; s++) std::memcpy(to + 4 * (s * NR + j), &words[s], 4);
            }
            to += 4 * size * NR;
        }
        if (weight_.format == GEMEL_I8) {
            for (uint8_t* p = first; p < to; p++) *p = static_cast<uint8_t>(*p + kOffset);
        } else if (weight_.format == GEMEL_I4) {
            for (uint8_t* p = first; p < to; p += 4) {
                uint32_t word;
                std::memcpy(&word, p, 4);
                word = spread(word & 0xffff) | spread(word >> 16) << 4;
                std::memcpy(p, &word, 4);
            }
        }
    }

    // Four numbers of four bits, each into the lower half of a byte.
    static uint32_t spread(uint32_t bits) {
        bits = (bits | bits << 8) & 0x00ff00ff;
        return (bits | bits << 4) & 0x0f0f0f0f;
    }

    void halves(uint8_t*& to, const float* table, int group) const {
        const int groups = weight_.k / weight_.group;
        for (int j = 0; j < NR; j++) put(to, rows_[j] < 0 ? fp16{0} : to_fp16(table[static_cast<int64_t>(rows_[j]) * groups + group]));
    }

    const gemel_weight& weight_;
    const uint8_t* values_;
    const float *scales_, *minima_;
    const int64_t row_bytes_;
    const std::vector<uint8_t> none_;  // a row of zeros
    int rows_[NR];
    const uint8_t* words_[NR];  // what comes next of each row
};

}  // namespace
}  // namespace gemel

extern "C" {

int64_t gemel_packed_bytes(const gemel_weight* weight) { return gemel::num_panels(*weight) * gemel::panel_bytes(*weight); }

void gemel_pack(gemel_team* team, const gemel_weight* weight, const void* values, const float* scales, const float* minima, void* packed) {
    using namespace gemel;
    const int panels = num_panels(*weight), pieces = (panels + kPiece - 1) / kPiece;
    const auto pack = [&](int piece, int) {
        Packer packer(*weight, values, scales, minima);
        for (int panel = piece * kPiece; panel < panels && panel < (piece + 1) * kPiece; panel++) {
            packer.pack(panel, static_cast<uint8_t*>(packed) + panel * panel_bytes(*weight));
        }
    };
    Team* const threads = reinterpret_cast<Team*>(team);
    if (threads == nullptr) {
        for (int piece = 0; piece < pieces; piece++) pack(piece, 0);
    } else {
        threads->run(1, [&](int rank) { threads->share(rank, pieces, pack); });
    }
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
