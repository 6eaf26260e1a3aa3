// Where keys and values lie: pages, one per layer, block and kv head, in tiles of 16 tokens, in the order in which products read them.
//
// Both kinds of tile are made of lines of 16 numbers, and a product goes from line to line:
//
//     key tile      [width][16]             a line per element, its numbers those of 16 tokens: scores of 16 tokens are vectors
//     value tile    [columns / 16][16][16]  for every 16 columns a line per token
//
// In BF16 two lines lie interleaved, [..., lines / 2][16][2], because products take pairs. In I8 the tile is followed by 16 fp32 scales, one
// per token. `width` is rounded up to a multiple of 2 here and `columns` to one of 16. What was never written is never used, with one
// exception that writing takes care of: where a pair of tokens has only its first, the second reads as zero.
#pragma once

#include "gemel.h"
#include "simd.h"

namespace gemel {

constexpr int kTile = 16;    // tokens that lie together in a page
constexpr int kChunk = 128;  // tokens whose scores are looked at together

class Pages {
   public:
    explicit Pages(const gemel_pages& pages)
        : pages_(pages), width_((pages.width + 1) / 2 * 2), columns_((pages.width + kTile - 1) / kTile * kTile) {
        const int64_t item = pages.format == GEMEL_F32 ? 4 : pages.format == GEMEL_BF16 ? 2 : 1;
        const int64_t scales = pages.format == GEMEL_I8 ? kTile * int64_t{sizeof(float)} : 0;
        key_bytes_ = (width_ * kTile * item + 63) / 64 * 64 + scales;
        value_bytes_ = columns_ * kTile * item + scales;
    }

    int width() const { return width_; }      // elements of a key, even
    int columns() const { return columns_; }  // elements of a value, a multiple of 16
    int64_t key_bytes() const { return key_bytes_; }
    int64_t value_bytes() const { return value_bytes_; }
    int64_t block_bytes() const { return pages_.heads * page_bytes(); }  // of one layer

    // The tile that holds position `token` of a sequence whose table of blocks this is.
    char* keys(int layer, const int32_t* blocks, int head, int64_t token) const {
        return page(layer, blocks, head, token) + token % pages_.block_tokens / kTile * key_bytes_;
    }
    char* values(int layer, const int32_t* blocks, int head, int64_t token) const {
        return page(layer, blocks, head, token) + pages_.block_tokens / kTile * key_bytes_ +
               token % pages_.block_tokens / kTile * value_bytes_;
    }

    // Of a tile of I8: the scales of its tokens.
    float* key_scales(char* tile) const { return reinterpret_cast<float*>(tile + key_bytes_) - kTile; }
    float* value_scales(char* tile) const { return reinterpret_cast<float*>(tile + value_bytes_) - kTile; }

    // Write keys and values (rows of `ld` floats) of `count` tokens that lie in one tile, beginning at position `token`.
    void write(int layer, const int32_t* blocks, int head, int64_t token, int count, const float* k, const float* v, int64_t ld) const;

   private:
    int64_t page_bytes() const { return pages_.block_tokens / kTile * (key_bytes_ + value_bytes_); }
    char* page(int layer, const int32_t* blocks, int head, int64_t token) const {
        const int64_t block = layer * pages_.blocks + blocks[token / pages_.block_tokens];
        return static_cast<char*>(pages_.data) + (block * pages_.heads + head) * page_bytes();
    }

    const gemel_pages pages_;
    const int width_, columns_;
    int64_t key_bytes_, value_bytes_;
};

}  // namespace gemel
