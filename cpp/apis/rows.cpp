#include "apis/rows.hpp"

#include <algorithm>

#include "apis/check.hpp"
#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

constexpr int64_t kPsPerElement = 300;  // SwiGLU; the others take less
constexpr int64_t kExpPiece = 4096;     // elements, a multiple of every vector width

// Runs body(table, token) for every row.
template <class Body>
void for_each_row(int64_t tokens, int64_t n, const Body& body) {
  require(tokens >= 1 && n >= 1, "an array has shape (", tokens, ", ", n, "), expected at least (1, 1)");
  const Kernels& table = kernels();
  const Plan plan = plan_items(tokens, n * kPsPerElement, num_threads());
  parallel_for(tokens, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(table, t);
  });
}

}  // namespace

void check_block(int64_t n, int64_t block) {
  require(block >= 1 && (block & (block - 1)) == 0, "rotation block is ", block, ", expected a power of two");
  require(n % block == 0, "rotation block ", block, " does not divide ", n, " features");
}

void rms_norm(const float* x, int64_t tokens, int64_t n, const float* gain, float eps, float* y) {
  for_each_row(tokens, n, [&](const Kernels& table, int64_t t) { table.rms_norm(x + t * n, gain, eps, n, y + t * n); });
}

void rotate(const float* x, int64_t tokens, int64_t n, const Rotation& rotation, bool inverse, float* y) {
  check_block(n, rotation.block);
  for_each_row(tokens, n, [&](const Kernels& table, int64_t t) {
    std::copy(x + t * n, x + (t + 1) * n, y + t * n);
    table.rotate(y + t * n, rotation.signs, n, rotation.block, inverse);
  });
}

void swiglu(const float* gate_up, int64_t tokens, int64_t n, float* y) {
  for_each_row(tokens, n, [&](const Kernels& table, int64_t t) {
    table.swiglu(gate_up + t * 2 * n, gate_up + t * 2 * n + n, n, y + t * n);
  });
}

void exp(const float* x, int64_t count, float* y) {
  const Kernels& table = kernels();
  const Plan plan = plan_items((count + kExpPiece - 1) / kExpPiece, kExpPiece * kPsPerElement, num_threads());
  parallel_for(count, plan.chunk * kExpPiece, plan.threads,
               [&](int64_t begin, int64_t end) { table.exp(x + begin, end - begin, y + begin); });
}

}  // namespace taper
