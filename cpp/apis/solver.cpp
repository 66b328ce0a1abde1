#include "apis/solver.hpp"

#include <cmath>

#include "apis/check.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

// Rows that one thread takes at a time: one group of solve_rows.
constexpr int64_t kChunkRows = 64;

void check(const SolverProblem& p) {
  require(p.min_bits >= 1 && p.min_bits <= p.max_bits && p.max_bits <= 8, "bits are ", p.min_bits, "..", p.max_bits,
          ", expected 1 <= min <= max <= 8");
  require(p.rows >= 1 && p.cols >= 1, "weights have shape (", p.rows, ", ", p.cols, "), expected at least (1, 1)");
  require(p.passes >= 0, "passes is ", p.passes, ", expected at least 0");
  for (int64_t i = 0; i < p.rows * p.cols; ++i)
    require(std::isfinite(p.weights[i]), "weight ", i, " is ", p.weights[i], ", expected a finite number");
  for (int64_t c = 0; c < p.cols; ++c) {
    const float h = p.hessian[c * p.cols + c], u = p.factor[c * p.cols + c], v = p.root[c * p.cols + c];
    require(std::isfinite(h) && h > 0.0f, "hessian[", c, ", ", c, "] is ", h, ", expected a positive number");
    require(std::isfinite(u) && u > 0.0f, "factor[", c, ", ", c, "] is ", u, ", expected a positive number");
    require(std::isfinite(v) && v > 0.0f, "root[", c, ", ", c, "] is ", v, ", expected a positive number");
  }
}

}  // namespace

void solve(const SolverProblem& problem, const SolverResult& result) {
  check(problem);
  parallel_for(problem.rows, kChunkRows, num_threads(),
               [&](int64_t begin, int64_t end) { solve_rows(problem, result, begin, end); });
}

}  // namespace taper
