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

thread_local bool inside_piece = false;

// The open phase in one word: its number, its pieces, and the next of them. A thread takes a piece by an exchange of
// the whole word, so one that slept through a phase, or through the end of a program, cannot take a piece of another.
class Ticket {
 public:
  Ticket(uint64_t word) : word_(word) {}
  Ticket(uint64_t phase, int64_t pieces) : word_(phase << 24 | static_cast<uint64_t>(pieces) << 12) {}

  uint64_t word() const { return word_; }
  uint64_t phase() const { return word_ >> 24; }  // of all programs together; 40 bits last for years
  int64_t pieces() const { return word_ >> 12 & 0xfff; }
  int64_t next() const { return word_ & 0xfff; }
  bool open() const { return next() < pieces(); }
  uint64_t taken() const { return word_ + 1; }

 private:
  uint64_t word_;
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_; }
  std::mutex& mutex() { return mutex_; }

  // The caller holds mutex().
  void run(Program& program, int64_t phases, int threads) {
    start_workers();
    program_ = &program;
    phases_ = phases;
    phase_ = -1;
    limit_.store(threads, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    finished_.store(false, std::memory_order_relaxed);
    advance();
    for (int spins = 0; !finished_.load(std::memory_order_acquire);) {
      if (work()) {
        spins = 0;
      } else {
        ++spins < kSpins ? pause_cpu() : static_cast<void>(sched_yield());
      }
    }
    if (error_) std::rethrow_exception(error_);
  }

  void stop() {
    stopping_.store(true);
    wake();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

 private:
  void start_workers() {
    while (static_cast<int>(workers_.size()) < threads_ - 1) {
      const int index = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, index] { serve(index); });
    }
  }

  // Takes and runs one piece of the open phase, and opens the next phase after the last of them. Returns whether there
  // was one to take.
  bool work() {
    Ticket ticket(ticket_.load(std::memory_order_acquire));
    do {
      if (!ticket.open()) return false;
      uint64_t word = ticket.word();
      if (ticket_.compare_exchange_weak(word, ticket.taken(), std::memory_order_acq_rel)) break;
      ticket = Ticket(word);
    } while (true);
    // From here on the phase cannot end, so that its program can be looked at.
    run_piece(ticket.next());
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == ticket.pieces()) advance();
    return true;
  }

  void run_piece(int64_t piece) {
    if (failed_.load(std::memory_order_relaxed)) return;
    guarded([&] { program_->run(phase_, piece); });
  }

  template <class Body>
  void guarded(const Body& body) {
    inside_piece = true;
    try {
      body();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    inside_piece = false;
  }

  // Opens the next phase of several pieces; those of one it runs itself. Only the caller before the first phase and the
  // thread that finished the last piece of a phase come here.
  void advance() {
    while (++phase_ < phases_ && !failed_.load(std::memory_order_relaxed)) {
      int64_t pieces = 0;
      guarded([&] { pieces = program_->begin(phase_); });
      if (pieces == 1) {
        run_piece(0);
      } else if (pieces > 1) {
        done_.store(0, std::memory_order_relaxed);
        publish(Ticket(Ticket(ticket_.load(std::memory_order_relaxed)).phase() + 1, pieces));
        return;
      }
    }
    finished_.store(true, std::memory_order_release);
  }

  void publish(Ticket ticket) {
    ticket_.store(ticket.word());
    if (sleeping_.load() != 0) wake();
  }

  void wake() {
    epoch_.fetch_add(1);
    epoch_.notify_all();
  }

  void serve(int index) {
    while (!stopping_.load(std::memory_order_relaxed)) {
      const uint64_t seen = ticket_.load(std::memory_order_acquire);
      if (index < limit_.load(std::memory_order_relaxed) && work()) continue;
      wait_for_news(seen);
    }
  }

  // Whoever sleeps says so before it looks for news a last time, and news comes before the look at the sleepers (all
  // sequentially consistent), so none is missed.
  void wait_for_news(uint64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (ticket_.load(std::memory_order_relaxed) != seen || stopping_.load(std::memory_order_relaxed)) return;
      pause_cpu();
    }
    const int epoch = epoch_.load();
    sleeping_.fetch_add(1);
    if (ticket_.load() == seen && !stopping_.load()) epoch_.wait(epoch);
    sleeping_.fetch_sub(1);
  }

  const int threads_;
  std::mutex mutex_;  // held while a program runs or the pool changes
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};  // pieces of the open phase
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<int> epoch_{0};  // rises to wake the sleepers
  std::atomic<bool> stopping_{false};
  std::atomic<int> limit_{1};  // threads that the program may use
  std::atomic<bool> finished_{true};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  Program* program_ = nullptr;
  int64_t phases_ = 0;
  int64_t phase_ = 0;  // of the program, the one that is open
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

void run_program(Program& program, int64_t phases, int threads) {
  if (threads > 1 && !inside_piece) {
    std::unique_lock guard(pool_mutex);
    Pool& shared = current_pool();
    std::unique_lock idle(shared.mutex(), std::try_to_lock);
    guard.unlock();
    if (idle.owns_lock() && shared.threads() > 1)
      return shared.run(program, phases, std::min(threads, shared.threads()));
  }
  for (int64_t phase = 0; phase < phases; ++phase) {
    const int64_t pieces = program.begin(phase);
    for (int64_t piece = 0; piece < pieces; ++piece) program.run(phase, piece);
  }
}

void parallel_for(int64_t count, int64_t chunk, int threads, const std::function<void(int64_t, int64_t)>& body) {
  class Range final : public Program {
   public:
    Range(int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& body)
        : count_(count), chunk_(chunk), body_(body) {}
    int64_t begin(int64_t) override { return (count_ + chunk_ - 1) / chunk_; }
    void run(int64_t, int64_t piece) override { body_(piece * chunk_, std::min((piece + 1) * chunk_, count_)); }

   private:
    const int64_t count_, chunk_;
    const std::function<void(int64_t, int64_t)>& body_;
  };
  if (count <= 0) return;
  if (threads <= 1 || count <= chunk || inside_piece) return body(0, count);
  Range range(count, std::max(chunk, (count + kMaxPieces - 1) / kMaxPieces), body);
  run_program(range, 1, threads);
}

}  // namespace taper
