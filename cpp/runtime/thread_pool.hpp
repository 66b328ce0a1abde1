// Threads that work through one program at a time.
#pragma once

#include <cstdint>
#include <functional>

namespace taper {

constexpr int kMaxThreads = 1024;

// Threads that a program may use, the caller's included. At first TAPER_NUM_THREADS, or available_cores().
// Throws std::invalid_argument when TAPER_NUM_THREADS is no number from 1 to kMaxThreads.
int num_threads();

// Throws std::invalid_argument outside 1..kMaxThreads.
void set_num_threads(int count);

// Phases that follow each other, each of pieces that may run at the same time and in any order.
class Program {
 public:
  virtual ~Program() = default;
  // Pieces of a phase, 0 to leave it out and at most kMaxPieces. Called once for each phase in order, when every piece
  // of those before it has been run.
  virtual int64_t begin(int64_t phase) = 0;
  virtual void run(int64_t phase, int64_t piece) = 0;
};

constexpr int64_t kMaxPieces = 4095;

// Runs all phases of a program on up to `threads` threads. A phase of one piece is run by the thread that finished the
// one before it. No thread is waited for that holds no piece: one that the system has taken off its core costs what it
// had begun and no more. Runs on the caller alone with threads == 1, inside a piece of another program, or while
// another caller's program is running. After the first exception no further piece is run, and it is thrown again here.
void run_program(Program& program, int64_t phases, int threads);

// Calls body(begin, end) for pieces of [0, count) of `chunk` elements, or more where they would be more than
// kMaxPieces, until all are done: a program of one phase. One chunk, or one thread, is one call.
void parallel_for(int64_t count, int64_t chunk, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace taper
