// A team of threads that goes through a program together: everyone runs the same function and takes the next piece of work from a counter.
//
// Nobody waits for a thread, only for work. A piece of work that is done is done, whoever did it, and a thread that the system has put aside
// is missed only while it holds a piece: the others take the rest and go on, and it catches up when it comes back. On a core that is shared
// with somebody else that is the difference between a slower step and a step that waits hundreds of times for its turn.
//
// Waiting spins for a moment, because the next thing usually comes within microseconds, and then sleeps, so that whoever is waited for
// finds a core.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
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

    // Everyone runs body(rank), which calls `share` at most `shares` times, and for all ranks alike. Returns when all work is done and
    // nobody is inside any more; a thread that did not wake up in time takes no part. One call at a time.
    void run(int shares, const std::function<void(int)>& body);

    // Inside `run`: calls work(item, rank) for all items 0 <= item < count, each by whoever is free, and returns when all are done.
    template <class Work>
    void share(int rank, int count, const Work& work) {
        Share& share = shares_[turn_[rank].value++];
        for (int item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            work(item, rank);
            if (share.done.fetch_add(1) == count - 1) wake();
        }
        if (share.done.load() < count) wait_for(share.done, count);
    }

   private:
    struct alignas(64) Share {
        std::atomic<int> next{0}, done{0};
    };
    struct alignas(64) Turn {
        int value = 0;
    };

    void work(int rank);
    void wait_for(const std::atomic<int>& done, int count);
    template <class Ready>
    void wait(const Ready& ready);
    void wake();
    void reset(int shares);

    const int threads_;
    std::unique_ptr<Share[]> shares_;
    int num_shares_ = 0;
    std::vector<Turn> turn_;
    alignas(64) std::atomic<uint32_t> jobs_{0};  // counts runs, and wakes
    alignas(64) std::atomic<uint32_t> open_{0};  // the run that may be entered, or 0
    alignas(64) std::atomic<int> inside_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    const std::function<void(int)>* body_ = nullptr;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::thread> workers_;
};

}  // namespace gemel
