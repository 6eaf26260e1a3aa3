// Products of activations with packed weights.
//
// A rectangle is walked in blocks of some rows and a few panels. Of one block the running sums stay in the second-level cache, as does the
// part of the activations in use, and the part of one panel in use stays in the first; so a block goes along k in stretches, each row and
// panel continuing its sums in order. Blocks of few rows read each weight once and need none of that.
#include "matmul.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "norm.h"
#include "products.h"
#include "threads.h"
#include "unpacked.h"

namespace gemel {
namespace {

constexpr int kBlockPanels = 4;              // of a block
constexpr int kStretchBytes = 16 * 1024;     // of a panel, half of a small first-level cache
#if GEMEL_AVX2
constexpr bool kWide = true;                 // activations are wanted in 16 bits too
#else
constexpr bool kWide = false;
#endif
constexpr int kWidenedRows = 3;              // up to here weights are widened in registers, above into memory
constexpr int kWidened = kStretchBytes / 4 / NR;  // places along k that are widened into memory at once

// Bytes that will be wanted soon.
struct Ahead {
    const uint8_t* from;
    int64_t bytes;

    // Orders the memory to bring part `part` of `parts`.
    void fetch(int part, int parts) const {
        for (const uint8_t *p = from + bytes * part / parts, *end = from + bytes * (part + 1) / parts; p < end; p += 64) __builtin_prefetch(p, 0, 2);
    }
};

// The same tiles, and meanwhile what lies ahead is fetched.
template <int most, class Work>
inline void in_tiles(int rows, const Ahead& ahead, const Work& work) {
    const int tiles = (rows + most - 1) / most;
    int tile = 0;
    gemel::in_tiles<most>(rows, [&](auto n, int row) {
        ahead.fetch(tile++, tiles);
        work(n, row);
    });
}

// One block: `rows` rows from `row` on times `panels` panels, `apart` from one another, from `panel` on. Sums: [panel][row][NR].
struct Block {
    const gemel_weight& weight;
    const Activations& x;
    int row, rows, panel, panels, apart;
    float* sums;

    float* at(int p, int r) const { return sums + (static_cast<int64_t>(p) * rows + r) * NR; }

    // How far along k a stretch goes if tiles have up to `most_rows` rows: stretches are about equally long.
    int stretch(int most_rows) const {
        const int unit = weight.format == GEMEL_I4 ? 128 : kGroup;
        if (rows <= most_rows) return weight.k;
        const int units = (weight.k + unit - 1) / unit, most = static_cast<int>(kStretchBytes / bytes_along(weight, unit));
        const int stretches = (units + most - 1) / most;
        return (units + stretches - 1) / stretches * unit;
    }

    template <class Work>
    void along_k(int step, const Work& work) const {
        for (int from = 0; from < weight.k; from += step) {
            const int k = from + step < weight.k ? step : weight.k - from;
            for (int p = 0; p < panels; p++) {
                const bool last = p + 1 == panels;
                const Ahead ahead{panel_at(weight, panel + (last ? 0 : p + 1), last ? from + k : from), bytes_along(weight, k)};
                work(p, from, k, ahead);
            }
        }
    }

    void f32() const {
        const float* a = x.f32 + row * x.ld;
        if (rows == 1) return together([&](auto n, int64_t next) {
            const auto* w = reinterpret_cast<const float*>(panel_at(weight, panel, 0));
            tile_f32<1, n>(a, x.ld, w, NR, weight.k, at(0, 0), NR, false, next / 4);
        });
        along_k(stretch(kRows), [&](int p, int from, int k, const Ahead& ahead) {
            const auto* w = reinterpret_cast<const float*>(panel_at(weight, panel + p * apart, from));
            in_tiles<kRows>(rows, ahead, [&](auto n, int r) { tile_f32<n>(a + r * x.ld + from, x.ld, w, NR, k, at(p, r), NR, from > 0); });
        });
    }

    void bf16() const {
#if GEMEL_AVX512
        const bf16_act* a = x.b16 + row * x.ld;
#else
        const bf16_act* a = x.f32 + row * x.ld;
#endif
        if (rows == 1) return together([&](auto n, int64_t next) {
            const auto* w = reinterpret_cast<const gemel::bf16*>(panel_at(weight, panel, 0));
            tile_bf16<1, n>(a, x.ld, w, 2 * NR, weight.k, at(0, 0), NR, false, next / 2);
        });
        along_k(stretch(kRows), [&](int p, int from, int k, const Ahead& ahead) {
            const auto* w = reinterpret_cast<const gemel::bf16*>(panel_at(weight, panel + p * apart, from));
            in_tiles<kRows>(rows, ahead, [&](auto n, int r) { tile_bf16<n>(a + r * x.ld + from, x.ld, w, 2 * NR, k, at(p, r), NR, from > 0); });
        });
    }

    // One row goes through all panels at once: work(Count<panels>, bytes from one to the next).
    template <class Work>
    void together(const Work& work) const {
        with_count<kBlockPanels>(panels, [&](auto n) { work(n, apart * panel_bytes(weight)); });
    }

    Rounded rounded(int r, int from) const {
        const int64_t groups = weight.k / kGroup, at = (row + r) * groups + from / kGroup;
        const int64_t first = (row + r) * x.ld + from;
        return {x.q + first, x.wide ? x.wide + first : nullptr, x.scale + at, x.sum + at, x.start + at, x.ld, groups};
    }

#if GEMEL_AVX2
    template <class Numbers>
    void unpacked() const {
        Unpacked w;
        along_k(kUnpackedAlong, [&](int p, int from, int k, const Ahead& ahead) {
            unpack<Numbers>(weight, panel_at(weight, panel + p * apart, from), k, w);
            in_tiles<kUnpackedRows>(rows, ahead, [&](auto n, int r) {
                const auto tile = !weight.group   ? tile_unpacked<Numbers, n, false, false>
                                  : weight.minima ? tile_unpacked<Numbers, n, true, true>
                                                  : tile_unpacked<Numbers, n, true, false>;
                tile(rounded(r, from), w, k, at(p, r), from > 0);
            });
        });
    }
#endif

    void i8() const {
#if GEMEL_AVX2
        if (rows >= kUnpackedFrom) return unpacked<Pairs>();
#endif
        if (rows == 1) return together([&](auto n, int64_t next) { i8_tile<1, n>(0, next, 0, 0, weight.k); });
        along_k(stretch(kIntegerRows), [&](int p, int from, int k, const Ahead& ahead) {
            in_tiles<kIntegerRows>(rows, ahead, [&](auto n, int r) { i8_tile<n, 1>(p, 0, r, from, k); });
        });
    }

    template <int R, int P>
    void i8_tile(int p, int64_t next, int r, int from, int k) const {
        const uint8_t* w = panel_at(weight, panel + p * apart, from);
        if (weight.group) {
            tile_i8<R, P, true>(rounded(r, from), w, next, k, at(p, r), from > 0);
        } else {
            tile_i8<R, P, false>(rounded(r, from), w, next, k, at(p, r), from > 0);
        }
    }

    void i4() const {
#if GEMEL_AVX2
        if (rows >= kUnpackedFrom) return unpacked<Quads>();
#endif
        if (rows == 1) return together([&](auto n, int64_t next) { i4_tile<1, n>(0, next, 0, 0, weight.k); });
        along_k(stretch(kIntegerRows), [&](int p, int from, int k, const Ahead& ahead) {
            in_tiles<kIntegerRows>(rows, ahead, [&](auto n, int r) { i4_tile<n, 1>(p, 0, r, from, k); });
        });
    }

    template <int R, int P>
    void i4_tile(int p, int64_t next, int r, int from, int k) const {
        const uint8_t* w = panel_at(weight, panel + p * apart, from);
        if (weight.minima) {
            tile_i4<R, P, true>(rounded(r, from), w, next, weight.group, k, at(p, r), from > 0);
        } else {
            tile_i4<R, P, false>(rounded(r, from), w, next, weight.group, k, at(p, r), from > 0);
        }
    }

    // Low-bit weights times fp32 activations: the weights are widened first.
    void widened() const {
        const float* a = x.f32 + row * x.ld;
        if (rows <= kWidenedRows) {
            for (int p = 0; p < panels; p++) with_count<kWidenedRows>(rows, [&](auto n) { widened_in_registers<n>(a, p); });
            return;
        }
        alignas(64) float w[kWidened * NR];
        for (int p = 0; p < panels; p++) {
            for (int from = 0; from < weight.k; from += kWidened) {
                const int k = from + kWidened < weight.k ? kWidened : weight.k - from;
                widen(weight, panel + p * apart, from, k, [&](int i, gemel::f32 left, gemel::f32 right) {
                    store(w + i * NR, left);
                    store(w + i * NR + W, right);
                });
                in_tiles<kRows>(rows, Ahead{nullptr, 0}, [&](auto n, int r) { tile_f32<n>(a + r * x.ld + from, x.ld, w, NR, k, at(p, r), NR, from > 0); });
            }
        }
    }

    template <int R>
    void widened_in_registers(const float* a, int p) const {
        gemel::f32 left[R], right[R];
        for (int r = 0; r < R; r++) left[r] = right[r] = zero();
        widen(weight, panel + p * apart, 0, weight.k, [&](int i, gemel::f32 w0, gemel::f32 w1) {
            for (int r = 0; r < R; r++) {
                const gemel::f32 v = set1(a[r * x.ld + i]);
                left[r] = fma(v, w0, left[r]);
                right[r] = fma(v, w1, right[r]);
            }
        });
        for (int r = 0; r < R; r++) {
            store(at(p, r), left[r]);
            store(at(p, r) + W, right[r]);
        }
    }

    void multiply() const {
        if (weight.format == GEMEL_F32) return f32();
        if (weight.format == GEMEL_BF16) return bf16();
        if (!weight.quantize) return widened();
        return weight.format == GEMEL_I8 ? i8() : i4();
    }
};

// Up to W results into y, or added to it.
inline void put(float* y, f32 v, int count, bool added) {
    if (count == W) {
        store(y, added ? add(load(y), v) : v);
        return;
    }
    float lanes[W];
    store(lanes, v);
    for (int i = 0; i < count; i++) y[i] = added ? y[i] + lanes[i] : lanes[i];
}

// Up to W of the biases, the rest zero.
inline f32 some(const float* bias, int count) {
    if (count == W) return load(bias);
    float lanes[W] = {};
    for (int i = 0; i < count; i++) lanes[i] = bias[i];
    return load(lanes);
}

inline int between(int value, int most) { return value < 0 ? 0 : value > most ? most : value; }

// What remains after the sums: scales per row of the weight, bias, epilogue. y: the block's first row.
void finish(const Block& block, int epilogue, float* y, int64_t ldy) {
    const gemel_weight& weight = block.weight;
    const bool scaled = weight.format == GEMEL_I8 && !weight.group && weight.quantize;
    const int half = weight.n / 2;
    for (int p = 0; p < block.panels; p++) {
        const int panel = block.panel + p * block.apart;
        const int column0 = weight.paired ? panel * W : panel * NR, column1 = weight.paired ? half + column0 : column0 + W;
        const int count0 = between((weight.paired ? half : weight.n) - column0, W), count1 = between(weight.n - column1, W);
        f32 scale0 = set1(1.0f), scale1 = scale0, bias0 = zero(), bias1 = bias0;
        if (scaled) {
            const float* head = reinterpret_cast<const float*>(panel_at(weight, panel, 0) - head_bytes(weight));
            scale0 = load(head), scale1 = load(head + W);
        }
        if (weight.bias) bias0 = some(weight.bias + column0, count0), bias1 = some(weight.bias + column1, count1);
        for (int r = 0; r < block.rows; r++) {
            const float* sums = block.at(p, r);
            float* row = y + r * ldy;
            const f32 left = fma(load(sums), scale0, bias0), right = fma(load(sums + W), scale1, bias1);
            if (epilogue == GEMEL_SWIGLU) {
                put(row + column0, mul(silu(left), right), count0, false);
            } else {
                const bool gelus = epilogue == GEMEL_GELU, added = epilogue == GEMEL_ADD;
                put(row + column0, gelus ? gelu(left) : left, count0, added);
                put(row + column1, gelus ? gelu(right) : right, count1, added);
            }
        }
    }
}

}  // namespace

Form form(const gemel_weight& weight) {
    if (weight.format == GEMEL_BF16) return std::is_same_v<bf16_act, bf16> ? Form::bf16 : Form::f32;
    return weight.format == GEMEL_F32 || !weight.quantize ? Form::f32 : Form::i8;
}

// An odd number of 64-element units: rows of a tile then begin in different sets of a cache, also where k is a power of two.
int64_t stride(int k) { return ((k + 63) / 64 | 1) * 64; }

int64_t activation_bytes(Form form, int k, int rows) {
    if (form == Form::f32) return 0;
    const int64_t elements = rows * stride(k), groups = static_cast<int64_t>(rows) * (k / kGroup);
    return form == Form::bf16 ? elements * 2 : elements * (kWide ? 3 : 1) + groups * 12;
}

Activations arrange(Form form, int k, int rows, void* memory) {
    Activations x;
    x.ld = stride(k);
    if (form == Form::bf16) x.b16 = static_cast<bf16*>(memory);
    if (form == Form::i8) {
        const int64_t groups = static_cast<int64_t>(rows) * (k / kGroup);
        x.q = static_cast<int8_t*>(memory);
        if (kWide) x.wide = reinterpret_cast<int16_t*>(x.q + rows * x.ld);
        x.scale = reinterpret_cast<float*>(x.q + rows * x.ld * (kWide ? 3 : 1));
        x.sum = x.scale + groups;
        x.start = reinterpret_cast<int32_t*>(x.sum + groups);
    }
    return x;
}

void prepare_row(const gemel_weight& weight, const float* x, const Activations& into, int row) {
    const Form want = form(weight);
    if (want == Form::bf16) {
        bf16* to = into.b16 + row * into.ld;
        int i = 0;
        for (; i + W <= weight.k; i += W) store_bf16(to + i, load(x + i));
        for (; i < weight.k; i++) to[i] = to_bf16(x[i]);
    }
    if (want != Form::i8) return;
    const int groups = weight.k / kGroup;
    const int offset = weight.format == GEMEL_I8 ? kOffset : weight.minima ? 0 : 8;
    for (int g = 0; g < groups; g++, x += kGroup) {
        f32 size = zero();
        for (int i = 0; i < kGroup; i += W) size = max(size, max(load(x + i), sub(zero(), load(x + i))));
        const float most = largest(size);
        const bool vanishes = most < 1e-30f;  // 127 / most would overflow; nothing that small reaches a sum
        const int32_t total = round_group(x, vanishes ? 0.0f : 127.0f / most, into.q + row * into.ld + g * kGroup);
#if GEMEL_AVX2
        if (weight.format == GEMEL_I8) widen_group(into.q + row * into.ld + g * kGroup, into.wide + row * into.ld + g * kGroup);
#endif
        const int64_t at = static_cast<int64_t>(row) * groups + g;
        into.scale[at] = vanishes ? 0.0f : most / 127.0f;
        into.sum[at] = into.scale[at] * static_cast<float>(total);
        into.start[at] = -offset * total;
    }
}

int num_panels(const gemel_weight& weight) { return weight.paired ? (weight.n / 2 + W - 1) / W : (weight.n + NR - 1) / NR; }

void multiply(const gemel_weight& weight, const Activations& x, int row0, int row1, int panel0, int panel1, int epilogue, float* y,
              int64_t ldy) {
    alignas(64) float sums[kBlockRows * kBlockPanels * NR];
    for (int row = row0; row < row1; row += kBlockRows) {
        const int rows = std::min(kBlockRows, row1 - row);
        const auto block = [&](int panel, int panels, int apart) {
            const Block block{weight, x, row, rows, panel, panels, apart, sums};
            block.multiply();
            finish(block, epilogue, y + row * ldy, ldy);
        };
        int panel = panel0;
        if (rows == 1) {  // memory is fastest where panels are read side by side from places far apart
            const int apart = (panel1 - panel0) / kBlockPanels;
            for (; panel < panel0 + apart; panel++) block(panel, kBlockPanels, apart);
            panel = panel0 + apart * kBlockPanels;
        }
        for (; panel < panel1; panel += kBlockPanels) block(panel, std::min(kBlockPanels, panel1 - panel), 1);
    }
}

}  // namespace gemel

extern "C" void gemel_matmul(gemel_team* opaque, const gemel_weight* weight, const float* x, int32_t t, float* y, int32_t epilogue) {
    using namespace gemel;
    Team& team = *reinterpret_cast<Team*>(opaque);
    const Form want = form(*weight);
    const int64_t bytes = (activation_bytes(want, weight->k, t) + 63) / 64 * 64;
    const std::unique_ptr<void, void (*)(void*)> memory(bytes ? std::aligned_alloc(64, bytes) : nullptr, std::free);
    Activations activations = arrange(want, weight->k, t, memory.get());
    if (want == Form::f32) activations.f32 = x, activations.ld = weight->k;
    const int64_t ldy = epilogue == GEMEL_SWIGLU ? weight->n / 2 : weight->n;

    // A few pieces for each thread, so that a slow one does not keep the others waiting.
    const int panels = num_panels(*weight), down = (t + kBlockRows - 1) / kBlockRows, wanted = (6 * team.threads() + down - 1) / down;
    const int run = ((panels + wanted - 1) / wanted + kBlockPanels - 1) / kBlockPanels * kBlockPanels, across = (panels + run - 1) / run;
    team.run(2, [&](int rank) {
        if (want != Form::f32) {
            team.share(rank, t, [&](int row, int) { prepare_row(*weight, x + static_cast<int64_t>(row) * weight->k, activations, row); });
        }
        team.share(rank, down * across, [&](int item, int) {
            const int row = item / across * kBlockRows, panel = item % across * run;
            multiply(*weight, activations, row, std::min(row + kBlockRows, t), panel, std::min(panel + run, panels), epilogue, y, ldy);
        });
    });
}
