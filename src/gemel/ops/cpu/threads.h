// A team of threads that goes through a program together: everyone runs the same function, meets at barriers, and takes the next piece of
// work from a counter.
//
// Waiting spins for a moment, because the next thing usually comes within microseconds, and then sleeps, because a thread that spins on a
// core that somebody else needs makes everybody late. Pieces are taken, not assigned: when a core is slow the other one does more.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gemel {

class Team {
   public:
    explicit Team(int threads);  // the caller is one of them
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int threads() const { return threads_; }

    // Everyone runs body(rank); returns when all have. One call at a time.
    void run(const std::function<void(int)>& body);

    // To be called inside `run`, by everyone.
    void barrier();

    // Inside `run`: call work(item) for all items 0 <= item < count, each by whoever is free, then meet. `work` gets (item, rank).
    template <class Work>
    void share(int rank, int count, const Work& work) {
        std::atomic<int>& next = counters_[turn_[rank].value++ & 1];
        for (int item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(item, rank);
        barrier();
    }

   private:
    struct alignas(64) Padded {
        int value = 0;
    };

    void work(int rank);
    template <class Ready>
    void wait(const Ready& ready);
    void wake();

    const int threads_;
    alignas(64) std::atomic<int> counters_[2] = {};  // two, so that the one not in use can be set back at each barrier
    std::vector<Padded> turn_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<uint32_t> jobs_{0};
    alignas(64) std::atomic<int> running_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    const std::function<void(int)>* body_ = nullptr;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::thread> workers_;
};

}  // namespace gemel
