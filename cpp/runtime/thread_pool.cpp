#include "runtime/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "runtime/cores.hpp"

namespace taper {
namespace {

// A decode step leaves gaps of 5-20 us between native calls; 4000 pauses are 40-160 us, so that a worker
// stays awake within a step and sleeps between requests.
constexpr int kSpins = 4000;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

thread_local bool inside_range = false;

struct Range {
  const std::function<void(int64_t, int64_t)>* body = nullptr;
  int64_t count = 0;
  int64_t chunk = 1;
  int threads = 1;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work() {
    inside_range = true;
    try {
      for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < count;) {
        (*body)(begin, std::min(begin + chunk, count));
      }
    } catch (...) {
      next.store(count);
      if (!failed.exchange(true)) error = std::current_exception();
    }
    inside_range = false;
  }
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_; }
  std::mutex& mutex() { return mutex_; }

  // The caller holds mutex(). A worker announces itself in `active_` before it looks at `open_`, and the caller closes
  // before it reads `active_` (both sequentially consistent), so a worker that comes late finds the range closed and
  // the caller never waits for one that has not begun.
  void run(int64_t count, int64_t chunk, int threads, const std::function<void(int64_t, int64_t)>& body) {
    start_workers();
    range_.body = &body;
    range_.count = count;
    range_.chunk = chunk;
    range_.threads = threads;
    range_.next.store(0);
    range_.failed.store(false);
    range_.error = nullptr;
    open_.store(true);
    announce();
    range_.work();
    open_.store(false);
    for (int spins = 0; active_.load() != 0; ++spins) spins < kSpins ? pause_cpu() : static_cast<void>(sched_yield());
    if (range_.failed.load()) std::rethrow_exception(range_.error);
  }

  void stop() {
    stopping_.store(true);
    announce();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

 private:
  void start_workers() {
    while (static_cast<int>(workers_.size()) < threads_ - 1) {
      const int index = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, index, seen = epoch_.load()] { serve(index, seen); });
    }
  }

  void announce() {
    epoch_.fetch_add(1);
    if (sleeping_.load() != 0) epoch_.notify_all();
  }

  void serve(int index, int seen) {
    while (true) {
      wait_for_news(seen);
      seen = epoch_.load();
      if (stopping_.load()) return;
      active_.fetch_add(1);
      if (open_.load() && index < range_.threads) range_.work();
      active_.fetch_sub(1);
    }
  }

  void wait_for_news(int seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (epoch_.load(std::memory_order_relaxed) != seen) return;
      pause_cpu();
    }
    sleeping_.fetch_add(1);
    epoch_.wait(seen);
    sleeping_.fetch_sub(1);
  }

  const int threads_;
  std::mutex mutex_;  // held while a range runs or the pool changes
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<int> epoch_{0};
  alignas(64) std::atomic<int> active_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> open_{false};
  std::atomic<bool> stopping_{false};
  Range range_;
};

int checked_threads(int count, const char* what) {
  if (count >= 1 && count <= kMaxThreads) return count;
  throw std::invalid_argument(std::string(what) + " is " + std::to_string(count) + ", expected 1.." +
                              std::to_string(kMaxThreads));
}

int initial_threads() {
  const char* text = std::getenv("TAPER_NUM_THREADS");
  if (text == nullptr || *text == '\0') return available_cores();
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  if (*end != '\0' || count < 1 || count > kMaxThreads) {
    throw std::invalid_argument("TAPER_NUM_THREADS is '" + std::string(text) + "', expected a number from 1 to " +
                                std::to_string(kMaxThreads));
  }
  return static_cast<int>(count);
}

std::mutex pool_mutex;  // guards `pool`, which is replaced but never destroyed at exit: workers may still spin in it
Pool* pool = nullptr;

// A forked child has none of the workers. The parent's pool is idle at the fork, and the child abandons it.
void before_fork() {
  pool_mutex.lock();
  if (pool != nullptr) pool->mutex().lock();
}

void after_fork_in_parent() {
  if (pool != nullptr) pool->mutex().unlock();
  pool_mutex.unlock();
}

void after_fork_in_child() {
  if (pool != nullptr) pool = new Pool(pool->threads());
  pool_mutex.unlock();
}

Pool& current_pool() {
  if (pool == nullptr) {
    pool = new Pool(initial_threads());
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  }
  return *pool;
}

}  // namespace

int num_threads() {
  std::lock_guard lock(pool_mutex);
  return current_pool().threads();
}

void set_num_threads(int count) {
  checked_threads(count, "the number of threads");
  std::lock_guard lock(pool_mutex);
  Pool& old = current_pool();
  if (old.threads() == count) return;
  {
    std::lock_guard idle(old.mutex());
    old.stop();
    pool = new Pool(count);
  }
  delete &old;
}

void parallel_for(int64_t count, int64_t chunk, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  if (threads > 1 && count > chunk && !inside_range) {
    std::unique_lock guard(pool_mutex);
    Pool& shared = current_pool();
    std::unique_lock idle(shared.mutex(), std::try_to_lock);
    guard.unlock();
    if (idle.owns_lock()) return shared.run(count, chunk, std::min(threads, shared.threads()), body);
  }
  body(0, count);
}

}  // namespace taper
