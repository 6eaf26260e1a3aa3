// Attention of one step over keys and values in pages, a piece at a time. No threads in here: the caller hands out pieces.
//
// A context is cut at fixed positions into chunks of kChunk tokens. What a query gets from one chunk depends on nothing but the query and
// the chunk, and chunks are folded together in order; so it makes no difference to the bits which queries are looked at together, who
// computed which chunk, or whether a chunk was read once for many sequences that begin alike.
#pragma once

#include <vector>

#include "gemel.h"
#include "tile.h"

namespace gemel {

constexpr int kTile = 16;    // tokens that lie together in a page
constexpr int kChunk = 128;  // tokens

// What one step does with the pages, for one width of window; made once per step and used by all layers of that window.
class Plan {
   public:
    Plan(const gemel_pages& pages, int num_heads, int window, int num_stretches, const gemel_stretch* stretches);

    // First: turn queries and keys of all rows and write keys and values. Then, after all are written: attend. Then fold.
    int num_writes() const;
    int num_pieces() const;
    int num_folds() const;   // 0 when every piece finished what it began
    int64_t partial_bytes() const;  // of memory that pieces share with folds
    static int64_t scratch_bytes(const gemel_pages& pages, int num_heads);  // of memory that each thread has for itself

    void write(const gemel_attention& attention, float* qkv, int64_t ld, int item) const;
    void attend(const gemel_attention& attention, const float* qkv, int64_t ld, int piece, void* scratch, void* partials, float* out,
                int64_t ld_out) const;
    void fold(int item, const void* partials, float* out, int64_t ld_out) const;

   private:
    // left to attention.cpp's author
};

}  // namespace gemel
