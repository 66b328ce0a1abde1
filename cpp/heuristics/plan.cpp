#include "heuristics/plan.hpp"

#include <algorithm>

namespace taper {
namespace {

// AVX-512 on cached planes: 512 x 2048 weights take 10 / 16 / 22 us at 2 / 4 / 6 bits, and 4.2 us more for each token.
constexpr int64_t kPsPerBit = 3;
constexpr int64_t kPsPerToken = 4;

// Opening a phase to spinning workers costs about 0.5 us; a thread should have several times that to do.
constexpr int64_t kPsPerThread = 1'500'000;

// Chunks a thread: more even out a core that is taken away, fewer cost less at the shared counter.
constexpr int64_t kChunksPerThread = 8;
// A chunk of planes begins its streams anew: 2048 x 2048 at 2 bits on two threads take 32.3 / 32.8 / 33.5 / 35.4 us in
// 2 / 4 / 8 / 16 chunks a thread.
constexpr int64_t kMatmulChunksPerThread = 4;
// By the formula above, less than this is not cut further. 135 M shape, Xeon, two threads, 3 and 2 bits: 466 and 527
// tok/s in eight chunks each, 490 and 570 so.
constexpr int64_t kPsPerMatmulChunk = 12'000'000;
constexpr int64_t kRowAlignment = 16;   // output rows of one cache line
constexpr int64_t kGemmAlignment = 32;  // rows that a matrix kernel multiplies together

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int threads_for(int64_t ps, int max_threads) {
  return static_cast<int>(std::clamp<int64_t>(ps / kPsPerThread, 1, max_threads));
}

}  // namespace

MatmulPlan plan_matmul(int64_t rows, int64_t cols, int bits, int64_t inputs, int64_t gemm_inputs, int max_threads) {
  const int64_t ps = rows * cols * (kPsPerBit * bits + kPsPerToken * inputs);
  const int threads = threads_for(ps, max_threads);
  const int64_t chunks = std::clamp<int64_t>(ps / kPsPerMatmulChunk, threads, threads * kMatmulChunksPerThread);
  const int64_t even = ceil_div(rows, chunks);
  const bool gemm = inputs >= gemm_inputs;
  const int64_t alignment = gemm ? kGemmAlignment : kRowAlignment;
  return {gemm, {threads, ceil_div(even, alignment) * alignment}};
}

Plan plan_items(int64_t items, int64_t ps_each, int max_threads) {
  const int threads = threads_for(items * ps_each, max_threads);
  return {threads, ceil_div(items, threads * kChunksPerThread)};
}

}  // namespace taper
