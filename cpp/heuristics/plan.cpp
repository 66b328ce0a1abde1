#include "heuristics/plan.hpp"

#include <algorithm>

namespace taper {
namespace {

// From this many tokens on, unpacking a tile of rows once is cheaper than unpacking in registers for every group.
constexpr int64_t kGemmTokens = 8;

// Waking the spinning workers and waiting for them costs 1-2 us; a thread should have several times that to do.
// A core unpacks about 16 weights and runs about 8 vectorised float operations in a nanosecond.
constexpr int64_t kWeightsPerThread = 64 * 1024;
constexpr int64_t kOperationsPerThread = 32 * 1024;

// Chunks a thread: more even out a core that is taken away, fewer cost less at the shared counter.
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kRowAlignment = 16;  // output rows of one cache line

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int threads_for(int64_t work, int64_t work_per_thread, int max_threads) {
  return static_cast<int>(std::clamp<int64_t>(work / work_per_thread, 1, max_threads));
}

}  // namespace

MatmulPlan plan_matmul(int64_t rows, int64_t cols, int bits, int64_t tokens, int max_threads) {
  const int64_t work = rows * cols * std::max<int64_t>(bits / 2, 1) / 2 * tokens;
  const int threads = threads_for(work, kWeightsPerThread, max_threads);
  const int64_t even = ceil_div(rows, threads * kChunksPerThread);
  return {tokens >= kGemmTokens, {threads, ceil_div(even, kRowAlignment) * kRowAlignment}};
}

Plan plan_items(int64_t items, int64_t operations_each, int max_threads) {
  const int threads = threads_for(items * operations_each, kOperationsPerThread, max_threads);
  return {threads, ceil_div(items, threads * kChunksPerThread)};
}

}  // namespace taper
