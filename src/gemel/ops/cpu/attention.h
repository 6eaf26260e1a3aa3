// Attention of one step over keys and values in pages, a piece at a time. No threads in here: the caller hands out pieces.
//
// A context is cut at fixed positions into chunks of kChunk tokens. What a query gets from one chunk depends on nothing but the query and
// the chunk, and chunks are folded together in order; so it makes no difference to the bits which queries are looked at together, who
// computed which chunk, or whether a chunk was read once for many sequences that begin alike.
#pragma once

#include <algorithm>
#include <vector>

#include "gemel.h"
#include "pages.h"

namespace gemel {

// Tokens that one thread attends from together: with all heads of a group they are about 96 queries. Half as many would keep their scores in
// the first cache, but unpack keys and values twice as often, which costs more.
inline int rows_at_once(int group) { return std::max(1, 96 / group); }

// What one step does with the pages, for one width of window; made once per step and used by all layers of that window.
class Plan {
   public:
    // `threads` only decides how finely work is cut. The tables of blocks must outlive the plan.
    Plan(const gemel_pages& pages, int num_heads, int window, int num_stretches, const gemel_stretch* stretches, int threads);

    // First: turn queries and keys of all rows and write keys and values. Then, after all are written: attend. Then fold.
    int num_writes() const { return static_cast<int>(spans_.size()) * num_kv_heads_; }
    int num_pieces() const { return static_cast<int>(pieces_.size()) * num_kv_heads_; }
    int num_folds() const { return static_cast<int>(folds_.size()) * num_kv_heads_; }  // 0 when every piece finished what it began
    int64_t partial_bytes() const;  // of memory that pieces share with folds
    static int64_t scratch_bytes(const gemel_pages& pages, int num_heads);  // of memory that each thread has for itself

    // qkv [t, ld] holds heads of queries, of keys, of values; queries and keys are normed and rotated in place. out [t, ld_out].
    void write(const gemel_attention& attention, float* qkv, int64_t ld, int item) const;
    void attend(const gemel_attention& attention, const float* qkv, int64_t ld, int piece, void* scratch, void* partials, float* out,
                int64_t ld_out) const;
    void fold(int item, const void* partials, float* out, int64_t ld_out) const;

    struct Span {  // rows of one sequence whose positions lie in one tile
        int row, position, count;
        const int32_t* blocks;
    };
    struct Row {
        int row, position;
        int64_t partial;  // where this row's results would be from the chunk at position 0; in units of one head
    };
    struct Piece {  // rows that have the same blocks in the same chunks
        int first_row, num_rows, first_chunk, end_chunk;
        bool whole;  // no row sees any other chunk: results are final
        const int32_t* blocks;
    };
    struct Fold {
        Row row;
        int first_chunk, end_chunk;
    };

   private:
    struct Short;

    int first_visible(int position) const { return window_ > 0 && position >= window_ ? position - window_ + 1 : 0; }
    void add_long(const gemel_stretch& stretch);
    void add_short(const std::vector<const gemel_stretch*>& stretches, int threads);
    template <class Format>
    void attend_as(const gemel_attention& attention, const float* qkv, int64_t ld, int item, void* scratch, float* partials, float* out,
                   int64_t ld_out) const;
    void add_piece(std::vector<Short>& sequences, const std::vector<int>& members, int first_chunk, int end_chunk);

    const Pages pages_;
    const int format_, head_width_, block_tokens_, num_kv_heads_, group_, window_;
    int64_t num_partials_ = 0;
    std::vector<Span> spans_;
    std::vector<Row> rows_;
    std::vector<Piece> pieces_;
    std::vector<Fold> folds_;
};

}  // namespace gemel
