// Choice of nested codes with error feedback at every width at once (taper.quantize.solver explains the method).
#pragma once

#include <cstdint>

namespace taper {

// One matrix W of (rows, cols) whose inputs have the second moments H; levels = max_bits - min_bits + 1 widths.
struct SolverProblem {
  const float* weights;     // (rows, cols)
  const float* hessian;     // (cols, cols), damped, symmetric
  const float* factor;      // (cols, cols), upper triangular F with F^T F = hessian^-1
  const float* root;        // (cols, cols), lower triangular, the transpose of F^-1: hessian = root^T root
  const float* values;      // 2^min_bits + ... + 2^max_bits values, level after level, in code order
  const float* importance;  // (levels), weight of a level's squared error
  int64_t rows;
  int64_t cols;
  int min_bits;
  int max_bits;
  int passes;         // coordinate-descent passes after the sweep
  bool refit_scales;  // least-squares scales before each pass and after the last
};

struct SolverResult {
  uint8_t* codes;   // (rows, cols), max_bits wide
  float* scales;    // (levels, rows): in, the first guess; out, refitted and rounded to float16
  float* errors;    // (levels, rows): (w - q) H (w - q)^T
  float* energies;  // (rows): w H w^T
};

// Rows are independent, so the result does not depend on the number of threads.
void solve(const SolverProblem&, const SolverResult&);

// Rows [begin, end) on the calling thread; no checks.
void solve_rows(const SolverProblem&, const SolverResult&, int64_t begin, int64_t end);

}  // namespace taper
