// Who looks at what: how the rows of a step are cut into pieces.
//
//     a long stretch (prefill, or a chunk of it)    pieces of a few rows, each over all chunks that they see
//     short stretches (decoding, speculation)       per chunk, rows of all sequences that have the same blocks there form one piece, so
//                                                   that a prefix which many share is read once for all of them
//
// Sequences are sorted by their tables of blocks. Then those that have the same blocks up to some chunk lie side by side, and it is enough
// to know how many chunks each has in common with the next.
#include <algorithm>

#include "attention.h"

namespace gemel {
namespace {

constexpr int kLong = 17;             // rows; stretches below are read together with others
constexpr int kPiecesPerThread = 16;  // as many as keep the threads busy to the end

// The blocks of positions [chunk, chunk + 1) * kChunk below `end`, as indices into the table.
struct Blocks {
    int first, last;
    Blocks(int chunk, int end, int block_tokens)
        : first(chunk * kChunk / block_tokens), last((std::min(end, (chunk + 1) * kChunk) - 1) / block_tokens) {}
};

}  // namespace

// A short stretch, and which chunks it sees.
struct Plan::Short {
    const gemel_stretch* stretch;
    int end;  // position behind its last row
    int first_chunk, end_chunk;
    int common = 0;  // so many chunks at the beginning have the same blocks as those of the next one
    int64_t partial = -1;

    // Whether both have the same blocks in this chunk.
    bool shares(const Short& other, int chunk, int block_tokens) const {
        const Blocks mine(chunk, end, block_tokens), theirs(chunk, other.end, block_tokens);
        return mine.last == theirs.last &&
               std::equal(stretch->blocks + mine.first, stretch->blocks + mine.last + 1, other.stretch->blocks + theirs.first);
    }
};

Plan::Plan(const gemel_pages& pages, int num_heads, int window, int num_stretches, const gemel_stretch* stretches, int threads)
    : pages_(pages),
      format_(pages.format),
      head_width_(pages.width),
      block_tokens_(pages.block_tokens),
      num_kv_heads_(pages.heads),
      group_(num_heads / pages.heads),
      window_(window) {
    std::vector<const gemel_stretch*> few;
    for (int i = 0; i < num_stretches; i++) {
        const gemel_stretch& stretch = stretches[i];
        const int end = stretch.start + stretch.count;
        for (int position = stretch.start, next; position < end; position = next) {
            next = std::min(end, position / kTile * kTile + kTile);
            spans_.push_back({stretch.row + position - stretch.start, position, next - position, stretch.blocks});
        }
        if (stretch.count >= kLong) {
            add_long(stretch);
        } else if (stretch.count > 0) {
            few.push_back(&stretch);
        }
    }
    if (!few.empty()) add_short(few, threads);
}

void Plan::add_long(const gemel_stretch& stretch) {
    const int rows = rows_at_once(group_);
    // The last rows see most and take longest: first, so that no thread is left alone with one of them in the end.
    for (int end = stretch.count; end > 0; end -= rows) {
        const int begin = std::max(0, end - rows), last = stretch.start + end - 1;
        pieces_.push_back({static_cast<int>(rows_.size()), end - begin, first_visible(stretch.start + begin) / kChunk, last / kChunk + 1, true,
                           stretch.blocks});
        for (int i = begin; i < end; i++) rows_.push_back({stretch.row + i, stretch.start + i, -1});
    }
}

void Plan::add_short(const std::vector<const gemel_stretch*>& stretches, int threads) {
    std::vector<Short> sequences;
    int num_chunks = 0, total = 0;
    for (const gemel_stretch* stretch : stretches) {
        const int end = stretch->start + stretch->count;
        sequences.push_back({stretch, end, first_visible(stretch->start) / kChunk, (end - 1) / kChunk + 1});
        num_chunks = std::max(num_chunks, sequences.back().end_chunk);
    }
    std::sort(sequences.begin(), sequences.end(), [this](const Short& a, const Short& b) {
        return std::lexicographical_compare(a.stretch->blocks, a.stretch->blocks + (a.end - 1) / block_tokens_ + 1, b.stretch->blocks,
                                            b.stretch->blocks + (b.end - 1) / block_tokens_ + 1);
    });
    for (size_t i = 0; i + 1 < sequences.size(); i++) {
        Short &one = sequences[i], &next = sequences[i + 1];
        while (one.common < std::min(one.end_chunk, next.end_chunk) && one.shares(next, one.common, block_tokens_)) one.common++;
    }
    // Runs of consecutive chunks in which the same sequences share their blocks.
    struct Run {
        std::vector<int> members;
        int first_chunk, end_chunk;
    };
    std::vector<Run> runs;
    std::vector<int> latest(sequences.size(), -1);  // run of each sequence that it is the first member of
    std::vector<int> members;
    for (int chunk = 0; chunk < num_chunks; chunk++) {
        for (size_t i = 0; i < sequences.size();) {
            members.clear();
            do {
                if (sequences[i].first_chunk <= chunk && chunk < sequences[i].end_chunk) members.push_back(static_cast<int>(i));
            } while (sequences[i++].common > chunk);
            if (members.empty()) continue;
            int& run = latest[static_cast<size_t>(members.front())];
            total++;
            if (run >= 0 && runs[static_cast<size_t>(run)].members == members) {
                runs[static_cast<size_t>(run)].end_chunk = chunk + 1;
            } else {
                run = static_cast<int>(runs.size());
                runs.push_back({members, chunk, chunk + 1});
            }
        }
    }
    const int length = std::max(1, total * num_kv_heads_ / (kPiecesPerThread * threads));  // chunks of a piece
    for (const Run& run : runs) {
        for (int chunk = run.first_chunk; chunk < run.end_chunk; chunk += length) {
            add_piece(sequences, run.members, chunk, std::min(run.end_chunk, chunk + length));
        }
    }
}

void Plan::add_piece(std::vector<Short>& sequences, const std::vector<int>& members, int first_chunk, int end_chunk) {
    const int first_row = static_cast<int>(rows_.size());
    int num_rows = 0;
    bool whole = true;
    for (int member : members) {
        const Short& sequence = sequences[static_cast<size_t>(member)];
        num_rows += sequence.stretch->count;
        whole = whole && sequence.first_chunk == first_chunk && sequence.end_chunk == end_chunk;
    }
    whole = whole && num_rows <= rows_at_once(group_);
    for (int member : members) {
        Short& sequence = sequences[static_cast<size_t>(member)];
        const int num_heads = num_kv_heads_ * group_, chunks = sequence.end_chunk - sequence.first_chunk;
        const bool begins = !whole && sequence.partial < 0;
        if (begins) {
            sequence.partial = num_partials_;
            num_partials_ += int64_t{chunks} * num_heads * sequence.stretch->count;
        }
        for (int i = 0; i < sequence.stretch->count; i++) {
            const int64_t partial = sequence.partial + (int64_t{i} * chunks - sequence.first_chunk) * num_heads;
            rows_.push_back({sequence.stretch->row + i, sequence.stretch->start + i, partial});
            if (begins) folds_.push_back({rows_.back(), sequence.first_chunk, sequence.end_chunk});
        }
    }
    pieces_.push_back({first_row, num_rows, first_chunk, end_chunk, whole, sequences[static_cast<size_t>(members.front())].stretch->blocks});
}

}  // namespace gemel
