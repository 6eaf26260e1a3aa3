#include "threads.h"

#include <chrono>

#include "gemel.h"

namespace gemel {
namespace {

// Longer than what a caller does between two steps at batch 1, so that decoding finds everybody awake.
constexpr auto kSpin = std::chrono::microseconds(200);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Team::Team(int threads) : threads_(threads), turn_(threads) {
    for (int rank = 1; rank < threads; rank++) workers_.emplace_back([this, rank] { work(rank); });
}

Team::~Team() {
    stop_ = true;
    jobs_.fetch_add(1);
    wake();
    for (std::thread& worker : workers_) worker.join();
}

template <class Ready>
void Team::wait(const Ready& ready) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 64; i++) {
            if (ready()) return;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    // Whoever changes what `ready` looks at checks `sleeping_` afterwards and takes the mutex to wake us: no change is missed.
    changed_.wait(lock, ready);
    sleeping_.fetch_sub(1);
}

void Team::wait_for(const std::atomic<int>& done, int count) {
    wait([&done, count] { return done.load() >= count; });
}

void Team::wake() {
    if (sleeping_.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
}

void Team::reset(int shares) {
    if (shares > num_shares_) {
        shares_ = std::make_unique<Share[]>(shares);
        num_shares_ = shares;
    }
    for (int i = 0; i < shares; i++) {
        shares_[i].next.store(0, std::memory_order_relaxed);
        shares_[i].done.store(0, std::memory_order_relaxed);
    }
}

void Team::run(int shares, const std::function<void(int)>& body) {
    reset(shares);  // nobody is inside
    body_ = &body;
    turn_[0].value = 0;
    uint32_t job = jobs_.load() + 1;
    if (job == 0) job = 1;  // 0 says that nothing is open
    open_ = job;
    jobs_ = job;
    wake();
    body(0);
    // Either a thread that comes now sees that the run is closed, or we see that it is inside.
    open_ = 0;
    wait([this] { return inside_.load() == 0; });
}

void Team::work(int rank) {
    uint32_t seen = 0;
    while (true) {
        wait([this, seen] { return jobs_.load() != seen; });
        seen = jobs_.load();
        if (stop_) return;
        inside_.fetch_add(1);
        if (open_.load() == seen) {
            turn_[rank].value = 0;
            (*body_)(rank);
        }
        if (inside_.fetch_sub(1) == 1) wake();
    }
}

}  // namespace gemel

extern "C" {

gemel_team* gemel_team_new(int32_t threads) { return reinterpret_cast<gemel_team*>(new gemel::Team(threads)); }

void gemel_team_free(gemel_team* team) { delete reinterpret_cast<gemel::Team*>(team); }

}  // extern "C"
