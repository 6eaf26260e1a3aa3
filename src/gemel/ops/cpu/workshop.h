// What the operations of training work with: a team of threads, and memory that outlives a call.
//
// Scratch of a few megabytes from the system is zeroed page by page when it is first touched, which can cost as much as what is computed in
// it. So it is kept, grows to what the largest call needs, and lies in large pages where the system has them.
#pragma once

#include <cstddef>
#include <vector>

#include "threads.h"

namespace gemel {

class Memory {
   public:
    Memory() = default;
    Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory();

    // At least so many numbers, aligned to a page; what was there is lost when it has to grow.
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(at_least(static_cast<size_t>(count) * sizeof(T)));
    }

   private:
    void* at_least(size_t bytes);
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

struct Workshop {
    explicit Workshop(int threads) : team(threads), own(static_cast<size_t>(threads)) {}

    Team team;
    std::vector<Memory> own;  // of each thread
    Memory shared[4];         // of all; an operation says what it keeps in which
};

}  // namespace gemel
