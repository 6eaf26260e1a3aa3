#include "pages.h"

#include <algorithm>
#include <cmath>

namespace gemel {
namespace {

// Both writers below go by pairs of lines. `width` is that of what is given; lines and columns beyond it are padding.
//
// Tokens from, from + 1, ... from + count - 1 of a tile; rows of `ld` floats.

void write_keys(float* tile, int width, int from, int count, const float* k, int64_t ld) {
    for (int h = 0; h < width; h++) {
        for (int t = 0; t < count; t++) tile[h * kTile + from + t] = k[t * ld + h];
    }
    if (width & 1) std::fill_n(tile + width * kTile + from, count, 0.0f);
}

void write_keys(bf16* tile, int width, int from, int count, const float* k, int64_t ld) {
    for (int h = 0; h < width; h += 2, tile += 2 * kTile) {
        for (int t = 0; t < count; t++) {
            tile[2 * (from + t)] = to_bf16(k[t * ld + h]);
            tile[2 * (from + t) + 1] = h + 1 < width ? to_bf16(k[t * ld + h + 1]) : bf16{0};
        }
    }
}

void write_values(float* tile, int width, int columns, int from, int count, const float* v, int64_t ld) {
    for (int column = 0; column < columns; column += kTile, tile += kTile * kTile) {
        const auto bytes = sizeof(float) * static_cast<size_t>(std::min(kTile, width - column));
        for (int t = 0; t < count; t++) std::memcpy(tile + (from + t) * kTile, v + t * ld + column, bytes);
        if ((from + count) & 1) std::fill_n(tile + (from + count) * kTile, kTile, 0.0f);
    }
}

void write_values(bf16* tile, int width, int, int from, int count, const float* v, int64_t ld) {
    for (int pair = from / 2; pair <= (from + count - 1) / 2; pair++) {
        const int first = 2 * pair - from, second = first + 1;  // rows of v
        for (int h = 0; h < width; h++) {
            bf16* both = tile + h / kTile * kTile * kTile + (pair * kTile + h % kTile) * 2;
            if (first >= 0) both[0] = to_bf16(v[first * ld + h]);
            both[1] = second < count ? to_bf16(v[second * ld + h]) : bf16{0};
        }
    }
}

// Rounds to 127 steps of the largest; returns the step. One element that is not finite spoils the token, as it would in floating point.
template <class Place>
float quantize(const float* x, int width, const Place& place) {
    float largest = 0.0f, poison = 0.0f;
    for (int h = 0; h < width; h++) {
        largest = std::max(largest, std::fabs(x[h]));
        poison += x[h] * 0.0f;
    }
    const float factor = largest > 0.0f && poison == 0.0f ? 127.0f / largest : 0.0f;
    for (int h = 0; h < width; h++) place(h) = poison == 0.0f ? static_cast<int8_t>(std::lrintf(x[h] * factor)) : int8_t{0};
    return largest / 127.0f + poison;
}

}  // namespace

void Pages::write(int layer, const int32_t* blocks, int head, int64_t token, int count, const float* k, const float* v,
                  int64_t ld) const {
    const int from = static_cast<int>(token % kTile);
    char *key_tile = keys(layer, blocks, head, token), *value_tile = values(layer, blocks, head, token);
    if (pages_.format == GEMEL_F32) {
        write_keys(reinterpret_cast<float*>(key_tile), pages_.width, from, count, k, ld);
        write_values(reinterpret_cast<float*>(value_tile), pages_.width, columns_, from, count, v, ld);
    } else if (pages_.format == GEMEL_BF16) {
        write_keys(reinterpret_cast<bf16*>(key_tile), pages_.width, from, count, k, ld);
        write_values(reinterpret_cast<bf16*>(value_tile), pages_.width, columns_, from, count, v, ld);
    } else {
        auto *key_numbers = reinterpret_cast<int8_t*>(key_tile), *value_numbers = reinterpret_cast<int8_t*>(value_tile);
        float *key_scale = key_scales(key_tile), *value_scale = value_scales(value_tile);
        for (int t = 0; t < count; t++) {
            int8_t *key_line = key_numbers + from + t, *value_line = value_numbers + (from + t) * kTile;
            key_scale[from + t] = quantize(k + t * ld, pages_.width, [&](int h) -> int8_t& { return key_line[h * kTile]; });
            value_scale[from + t] = quantize(v + t * ld, pages_.width, [&](int h) -> int8_t& {
                return value_line[h / kTile * kTile * kTile + h % kTile];
            });
        }
        if ((from + count) & 1) value_scale[from + count] = 0.0f;
    }
}

}  // namespace gemel

extern "C" {

int64_t gemel_pages_bytes(const gemel_pages* pages) { return pages->layers * pages->blocks * gemel::Pages(*pages).block_bytes(); }

void gemel_pages_copy(const gemel_pages* pages, int32_t count, const int32_t* from, const int32_t* to) {
    const int64_t bytes = gemel::Pages(*pages).block_bytes();
    char* data = static_cast<char*>(pages->data);
    for (int64_t layer = 0; layer < pages->layers; layer++) {
        char* blocks = data + layer * pages->blocks * bytes;
        for (int32_t i = 0; i < count; i++) std::memcpy(blocks + to[i] * bytes, blocks + from[i] * bytes, static_cast<size_t>(bytes));
    }
}

}  // extern "C"
