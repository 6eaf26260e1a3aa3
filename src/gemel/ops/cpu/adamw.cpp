// One step of AdamW in one pass over memory, whatever weights and moments are stored as: they become fp32 a few hundred at a time, move, and
// go back. How bf16 is rounded at random is a function of a key and a place (train/optim/noise.py), so no bit depends on threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "train.h"
#include "workshop.h"

namespace gemel {
namespace {

constexpr int64_t kAtOnce = 512;           // numbers in flight, in the first-level cache
constexpr int64_t kOfThread = 32 * kAtOnce;  // numbers that a thread takes at a time

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

void read(const gemel_stored& from, int64_t at, int count, float* to) {
    if (from.format == GEMEL_F32) {
        std::memcpy(to, static_cast<const float*>(from.data) + at, sizeof(float) * static_cast<size_t>(count));
        return;
    }
    const bf16* high = static_cast<const bf16*>(from.data) + at;
    for (int i = 0; i < count; i++) {
        uint32_t bits = static_cast<uint32_t>(high[i]) << 16;
        if (from.low) bits += static_cast<uint32_t>(static_cast<int32_t>(from.low[at + i]));
        std::memcpy(to + i, &bits, 4);
    }
}

void write(const gemel_stored& to, const int32_t* table, int64_t at, int count, const float* from) {
    if (to.format == GEMEL_F32) {
        std::memcpy(static_cast<float*>(to.data) + at, from, sizeof(float) * static_cast<size_t>(count));
        return;
    }
    bf16* high = static_cast<bf16*>(to.data) + at;
    if (to.low) {
        for (int i = 0; i < count; i++) {
            high[i] = static_cast<bf16>((bits_of(from[i]) + 0x8000) >> 16);
            to.low[at + i] = static_cast<int16_t>(bits_of(from[i]));
        }
    } else {
        for (int i = 0; i < count; i++) {
            const uint32_t drawn = ((static_cast<uint32_t>(table[to.place + at + i]) ^ to.mix[0]) * to.mix[1]) >> 16;
            high[i] = static_cast<bf16>((bits_of(from[i]) + drawn) >> 16);
        }
    }
}

// Numbers [begin, end) of one part.
void move(const gemel_adamw& how, const gemel_adamw_part& part, int64_t begin, int64_t end) {
    alignas(64) float w[kAtOnce] = {}, g[kAtOnce] = {}, m[kAtOnce] = {}, v[kAtOnce] = {};
    const f32 keep = set1(how.keep), rest1 = set1(how.rest1), beta2 = set1(how.beta2), rest2 = set1(how.rest2), root = set1(how.root),
              eps = set1(how.eps), step = set1(how.step), most = set1(how.shrink), least = set1(-how.shrink);
    const gemel_stored gradient{const_cast<void*>(part.gradient), nullptr, part.gradient_format, 0, {0, 0}};
    for (int64_t at = begin; at < end; at += kAtOnce) {
        const int count = static_cast<int>(std::min(kAtOnce, end - at));
        read(part.weight, at, count, w);
        read(gradient, at, count, g);
        read(part.first, at, count, m);
        read(part.second, at, count, v);
        for (int i = 0; i < count; i += W) {
            const f32 slope = load(g + i), first = fma(rest1, sub(slope, load(m + i)), load(m + i));
            const f32 second = fma(mul(rest2, slope), slope, mul(beta2, load(v + i)));
            const f32 moved = sub(mul(load(w + i), keep), mul(step, div(first, add(div(sqrt(second), root), eps))));
            store(w + i, how.shrink > 0.0f ? sub(moved, max(min(moved, most), least)) : moved);
            store(m + i, first);
            store(v + i, second);
        }
        write(part.weight, how.table, at, count, w);
        write(part.first, how.table, at, count, m);
        write(part.second, how.table, at, count, v);
    }
}

}  // namespace
}  // namespace gemel

extern "C" void gemel_adamw_step(gemel_workshop* workshop, const gemel_adamw* how, int32_t num_parts, const gemel_adamw_part* parts) {
    using namespace gemel;
    Workshop& shop = *reinterpret_cast<Workshop*>(workshop);
    struct Run {
        const gemel_adamw_part* part;
        int64_t begin, end;
    };
    std::vector<Run> runs;
    for (int i = 0; i < num_parts; i++) {
        for (int64_t begin = 0; begin < parts[i].count; begin += kOfThread) {
            runs.push_back({parts + i, begin, std::min(parts[i].count, begin + kOfThread)});
        }
    }
    shop.team.run(1, [&](int rank) {
        shop.team.share(rank, static_cast<int>(runs.size()), [&](int item, int) {
            const Run& run = runs[static_cast<size_t>(item)];
            move(*how, *run.part, run.begin, run.end);
        });
    });
}
