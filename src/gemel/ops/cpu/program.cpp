// Runs whole steps: everybody goes through the same list of operations, shares the pieces of each, and meets before the next.
//
// Memory for activations belongs to the program and only grows. Between operations everything is fp32; a product brings its input into the
// form that its weight wants, and where a norm comes just before a product, it does so row by row while the row is still in the cache.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "attention.h"
#include "gemel.h"
#include "matmul.h"
#include "norm.h"
#include "threads.h"

namespace gemel {
namespace {

constexpr int kPiecesPerThread = 6; // enough that a slow core can be helped out, few enough that counting them costs nothing

constexpr int kSharesPerOp = 3;     // at most: attention writes, attends and folds

// Memory that grows and is never handed back. Fresh pages are only touched by who uses them.
class Memory {
   public:
    void* at_least(int64_t bytes) {
        if (bytes > size_) {
            size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
            memory_.reset(std::aligned_alloc(4096, static_cast<size_t>(size_)));
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    int64_t size_ = 0;
};

struct Slot {
    int rows_of, width;
    int64_t ld;
    Memory memory;
    float* data = nullptr;
    float* row(int64_t r) const { return data + r * ld; }
};

inline int pieces(int count, int size) { return (count + size - 1) / size; }

// Where the largest of a piece of one row of logits is; NaN when one of them is not finite.
struct Best {
    float value;
    int32_t index;
};

Best best_of(const float* logits, int begin, int end) {
    f32 top = set1(-std::numeric_limits<float>::infinity()), broken = zero();
    int i = begin;
    for (; i + W <= end; i += W) {
        const f32 v = load(logits + i);
        top = max(top, v);
        broken = fma(v, zero(), broken);  // nothing for finite numbers, NaN for others
    }
    float value = largest(top), check = sum(broken);
    for (; i < end; i++) {
        value = logits[i] > value ? logits[i] : value;
        check += logits[i] * 0.0f;
    }
    if (check != 0.0f) return {std::numeric_limits<float>::quiet_NaN(), begin};
    int index = begin;
    while (logits[index] != value) index++;
    return {value, index};
}

}  // namespace

class Program {
   public:
    Program(int threads, int num_slots, const gemel_slot* slots, int num_ops, const gemel_op* ops, const gemel_pages* pages)
        : team_(threads), slots_(num_slots), ops_(ops, ops + num_ops), pages_(*pages), scratch_(threads) {
        for (int i = 0; i < num_slots; i++) {
            slots_[i].rows_of = slots[i].rows;
            slots_[i].width = slots[i].width;
            slots_[i].ld = stride(slots[i].width);
        }
        for (const gemel_op& op : ops_) {
            if (op.label >= static_cast<int>(seconds_.size())) seconds_.resize(op.label + 1);
        }
    }

    void run(const gemel_step& step) {
        step_ = &step;
        reserve();
        team_.run(kSharesPerOp * static_cast<int>(ops_.size()), [this](int rank) {
            auto before = std::chrono::steady_clock::now();
            for (size_t i = 0; i < ops_.size(); i++) {
                execute(i, rank);
                if (rank == 0) {
                    const auto now = std::chrono::steady_clock::now();
                    seconds_[ops_[i].label] += std::chrono::duration<double>(now - before).count();
                    before = now;
                }
            }
        });
    }

    Team& team() { return team_; }

    void profile(int num_labels, double* seconds) {
        for (int i = 0; i < num_labels; i++) {
            seconds[i] = i < static_cast<int>(seconds_.size()) ? seconds_[i] : 0.0;
            if (i < static_cast<int>(seconds_.size())) seconds_[i] = 0.0;
        }
    }

   private:
    int rows_of(int rows_kind) const { return rows_kind ? step_->num_sampled : step_->num_tokens; }

    // Whether the product `next` reads what this norm writes, so that the norm can prepare its rows too.
    bool feeds(size_t i) const {
        if (ops_[i].kind != GEMEL_NORM || i + 1 == ops_.size()) return false;
        const gemel_op& next = ops_[i + 1];
        return (next.kind == GEMEL_LINEAR || next.kind == GEMEL_LOGITS) && next.from == ops_[i].to;
    }

    // All memory of the step, and the plans of attention, before anybody starts.
    void reserve() {
        for (Slot& slot : slots_) {
            slot.data = static_cast<float*>(slot.memory.at_least(rows_of(slot.rows_of) * slot.ld * static_cast<int64_t>(sizeof(float))));
        }
        int64_t prepared = 0, partial = 0, scratch = 0;
        plans_.clear();
        windows_.clear();
        for (const gemel_op& op : ops_) {
            if (op.kind == GEMEL_LINEAR || op.kind == GEMEL_LOGITS) {
                prepared = std::max(prepared, activation_bytes(form(op.weight), op.weight.k, rows_of(slots_[op.from].rows_of)));
            } else if (op.kind == GEMEL_ATTEND) {
                const Plan& plan = plan_for(op.attention);
                partial = std::max(partial, plan.partial_bytes());
                scratch = std::max(scratch, Plan::scratch_bytes(pages_, op.attention.num_heads));
            }
        }
        prepared_ = prepared_memory_.at_least(prepared);
        partials_ = partial_memory_.at_least(partial);
        for (Memory& memory : scratch_) memory.at_least(scratch);
        best_.resize(static_cast<size_t>(step_->num_sampled) * (kPiecesPerThread * team_.threads() + 1));
    }

    const Plan& plan_for(const gemel_attention& attention) {
        for (size_t i = 0; i < windows_.size(); i++) {
            if (windows_[i] == attention.window) return *plans_[i];
        }
        windows_.push_back(attention.window);
        plans_.push_back(std::make_unique<Plan>(pages_, attention.num_heads, attention.window, step_->num_stretches, step_->stretches,
                                                team_.threads()));
        return *plans_.back();
    }

    void execute(size_t i, int rank) {
        switch (ops_[i].kind) {
            case GEMEL_EMBED: return embed(ops_[i], rank);
            case GEMEL_NORM: return norm(i, rank);
            case GEMEL_LINEAR: return linear(i, rank);
            case GEMEL_ATTEND: return attend(ops_[i], rank);
            case GEMEL_SELECT: return select(ops_[i], rank);
            case GEMEL_LOGITS: return logits(i, rank);
        }
    }

    // Calls each(row) for all rows of a slot, in runs of rows shared among threads.
    template <class Each>
    void share_rows(int rank, int rows, const Each& each) {
        const int run = std::max(1, pieces(rows, kPiecesPerThread * team_.threads()));
        team_.share(rank, pieces(rows, run), [&](int item, int) {
            for (int row = item * run; row < std::min(rows, (item + 1) * run); row++) each(row);
        });
    }

    void embed(const gemel_op& op, int rank) {
        const Slot& to = slots_[op.to];
        share_rows(rank, step_->num_tokens, [&](int row) {
            float* out = to.row(row);
            look_up(op, op.table, step_->tokens[row], to.width, out, false);
            if (op.positions) look_up(op, op.positions, step_->positions[row], to.width, out, true);
        });
    }

    static void look_up(const gemel_op& op, const void* table, int64_t index, int width, float* out, bool add) {
        if (op.format == GEMEL_F32) {
            const float* from = static_cast<const float*>(table) + index * width;
            for (int i = 0; i < width; i++) out[i] = (add ? out[i] : 0.0f) + from[i];
        } else {
            const bf16* from = static_cast<const bf16*>(table) + index * width;
            for (int i = 0; i < width; i++) out[i] = (add ? out[i] : 0.0f) + from_bf16(from[i]);
        }
    }

    void norm(size_t i, int rank) {
        const gemel_op& op = ops_[i];
        const Slot &from = slots_[op.from], &to = slots_[op.to];
        const bool prepares = feeds(i);
        const Activations into = prepares ? arranged(ops_[i + 1]) : Activations{};
        share_rows(rank, rows_of(from.rows_of), [&](int row) {
            if (op.shift) {
                layer_norm(from.row(row), op.scale, op.shift, op.eps, from.width, to.row(row));
            } else {
                rms_norm(from.row(row), op.scale, op.eps, from.width, to.row(row));
            }
            if (prepares) prepare_row(ops_[i + 1].weight, to.row(row), into, row);
        });
    }

    Activations arranged(const gemel_op& op) const {
        const Slot& from = slots_[op.from];
        Activations x = arrange(form(op.weight), op.weight.k, rows_of(from.rows_of), prepared_);
        if (form(op.weight) == Form::f32) {
            x.f32 = from.data;
            x.ld = from.ld;
        }
        return x;
    }

    // The product's input in its form, unless the norm before it has seen to that.
    Activations input(size_t i, int rank) {
        const gemel_op& op = ops_[i];
        const Activations x = arranged(op);
        if (form(op.weight) != Form::f32 && !(i > 0 && feeds(i - 1))) {
            const Slot& from = slots_[op.from];
            share_rows(rank, rows_of(from.rows_of), [&](int row) { prepare_row(op.weight, from.row(row), x, row); });
        }
        return x;
    }

    // How many panels one piece of a product has.
    int panels_of_piece(int rows, const gemel_weight& weight) const {
        const int wanted = pieces(kPiecesPerThread * team_.threads(), std::max(1, pieces(rows, kBlockRows)));
        return pieces(num_panels(weight), std::min(num_panels(weight), wanted));
    }

    // Calls each(row0, row1, panel0, panel1) for rectangles that cover the product.
    template <class Each>
    void share_product(int rank, int rows, const gemel_weight& weight, const Each& each) {
        const int panels = num_panels(weight), run = panels_of_piece(rows, weight), across = pieces(panels, run);
        team_.share(rank, pieces(rows, kBlockRows) * across, [&](int item, int) {
            const int row0 = item / across * kBlockRows, panel0 = item % across * run;
            each(row0, std::min(rows, row0 + kBlockRows), panel0, std::min(panels, panel0 + run));
        });
    }

    void linear(size_t i, int rank) {
        const gemel_op& op = ops_[i];
        const Slot &from = slots_[op.from], &to = slots_[op.to];
        const Activations x = input(i, rank);
        share_product(rank, rows_of(from.rows_of), op.weight, [&](int row0, int row1, int panel0, int panel1) {
            multiply(op.weight, x, row0, row1, panel0, panel1, op.epilogue, to.data, to.ld);
        });
    }

    void logits(size_t i, int rank) {
        const gemel_op& op = ops_[i];
        const int rows = step_->num_sampled, vocabulary = op.weight.n;
        const int run = panels_of_piece(rows, op.weight), across = pieces(num_panels(op.weight), run);
        const Activations x = input(i, rank);
        share_product(rank, rows, op.weight, [&](int row0, int row1, int panel0, int panel1) {
            multiply(op.weight, x, row0, row1, panel0, panel1, GEMEL_STORE, step_->logits, vocabulary);
            for (int row = row0; row < row1; row++) {
                const float* row_logits = step_->logits + static_cast<int64_t>(row) * vocabulary;
                best_[row * across + panel0 / run] = best_of(row_logits, panel0 * NR, std::min(panel1 * NR, vocabulary));
            }
        });
        share_rows(rank, rows, [&](int row) {
            Best top = best_[row * across];
            for (int piece = 1; piece < across && !std::isnan(top.value); piece++) {
                const Best& next = best_[row * across + piece];
                if (!(next.value <= top.value)) top = next;
            }
            step_->largest[row] = top.value;
            step_->argmax[row] = top.index;
        });
    }

    void attend(const gemel_op& op, int rank) {
        const Plan& plan = plan_of(op.attention.window);
        const Slot &from = slots_[op.from], &to = slots_[op.to];
        team_.share(rank, plan.num_writes(), [&](int item, int) { plan.write(op.attention, from.data, from.ld, item); });
        team_.share(rank, plan.num_pieces(), [&](int piece, int me) {
            plan.attend(op.attention, from.data, from.ld, piece, scratch_[me].at_least(0), partials_, to.data, to.ld);
        });
        if (plan.num_folds()) {
            team_.share(rank, plan.num_folds(), [&](int item, int) { plan.fold(item, partials_, to.data, to.ld); });
        }
    }

    const Plan& plan_of(int window) const {
        size_t i = 0;
        while (windows_[i] != window) i++;
        return *plans_[i];
    }

    void select(const gemel_op& op, int rank) {
        const Slot &from = slots_[op.from], &to = slots_[op.to];
        share_rows(rank, step_->num_sampled, [&](int row) {
            std::memcpy(to.row(row), from.row(step_->sampled[row]), sizeof(float) * static_cast<size_t>(from.width));
        });
    }

    Team team_;
    std::vector<Slot> slots_;
    const std::vector<gemel_op> ops_;
    const gemel_pages pages_;
    const gemel_step* step_ = nullptr;
    std::vector<std::unique_ptr<Plan>> plans_;
    std::vector<int> windows_;
    Memory prepared_memory_, partial_memory_;
    void *prepared_ = nullptr, *partials_ = nullptr;
    std::vector<Memory> scratch_;
    std::vector<Best> best_;
    std::vector<double> seconds_;
};

}  // namespace gemel

extern "C" {

gemel_program* gemel_program_new(int32_t threads, int32_t num_slots, const gemel_slot* slots, int32_t num_ops, const gemel_op* ops,
                                 const gemel_pages* pages) {
    return reinterpret_cast<gemel_program*>(new gemel::Program(threads, num_slots, slots, num_ops, ops, pages));
}

void gemel_program_free(gemel_program* program) { delete reinterpret_cast<gemel::Program*>(program); }

void gemel_program_run(gemel_program* program, const gemel_step* step) { reinterpret_cast<gemel::Program*>(program)->run(*step); }

gemel_team* gemel_program_team(gemel_program* program) {
    return reinterpret_cast<gemel_team*>(&reinterpret_cast<gemel::Program*>(program)->team());
}

void gemel_program_profile(gemel_program* program, int32_t num_labels, double* seconds) {
    reinterpret_cast<gemel::Program*>(program)->profile(num_labels, seconds);
}

const char* gemel_variant(void) { return GEMEL_VARIANT; }

}  // extern "C"
