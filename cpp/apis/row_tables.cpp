#include "apis/row_tables.hpp"

#include <cmath>

#include "apis/check.hpp"
#include "apis/row_tables_rows.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

constexpr int64_t kChunkRows = 1;  // a row takes a millisecond

void check(const RowTablesProblem& p) {
  require(p.min_bits >= 1 && p.min_bits <= p.max_bits && p.max_bits <= 8, "bits are ", p.min_bits, "..", p.max_bits,
          ", expected 1 <= min <= max <= 8");
  require(p.rows >= 1 && p.cols >= 1, "weights have shape (", p.rows, ", ", p.cols, "), expected at least (1, 1)");
  require(p.sensitivity_rows == 1 || p.sensitivity_rows == p.rows, "sensitivity has ", p.sensitivity_rows,
          " rows, expected 1 or ", p.rows);
  require(p.cells >= 1, "cells is ", p.cells, ", expected at least 1");
  for (int64_t i = 0; i < p.rows * p.cols; ++i)
    require(std::isfinite(p.weights[i]), "weight ", i, " is ", p.weights[i], ", expected a finite number");
  for (int64_t i = 0; i < p.sensitivity_rows * p.cols; ++i)
    require(std::isfinite(p.sensitivity[i]) && p.sensitivity[i] >= 0.0f, "sensitivity ", i, " is ", p.sensitivity[i],
            ", expected a finite number of at least 0");
  for (int i = 0; i <= p.max_bits - p.min_bits; ++i)
    require(std::isfinite(p.importance[i]) && p.importance[i] > 0.0f, "importance ", i, " is ", p.importance[i],
            ", expected a positive number");
}

void fit_row(const RowTablesProblem& p, const RowTablesResult& result, int64_t index) {
  const float* sensitivity = p.sensitivity + (p.sensitivity_rows == 1 ? 0 : index * p.cols);
  const SortedRow row(p.weights + index * p.cols, sensitivity, p.cols);
  const RowTree tree = p.greedy ? greedy_tree(row, p, p.seed + static_cast<uint64_t>(index)) : joint_tree(row, p);
  uint8_t* codes = result.codes + index * p.cols;
  for (size_t leaf = 0; leaf + 1 < tree.edges.size(); ++leaf)
    for (int64_t i = tree.edges[leaf]; i < tree.edges[leaf + 1]; ++i) codes[row.column(i)] = static_cast<uint8_t>(leaf);
  const int64_t count = (int64_t{2} << p.max_bits) - (int64_t{1} << p.min_bits);
  float* values = result.values + index * count;
  for (int bits = p.min_bits; bits <= p.max_bits; ++bits)
    for (double value : tree.levels[bits]) *values++ = static_cast<float>(value);
}

}  // namespace

void fit_row_tables(const RowTablesProblem& problem, const RowTablesResult& result) {
  check(problem);
  parallel_for(problem.rows, kChunkRows, num_threads(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fit_row(problem, result, row);
  });
}

}  // namespace taper
