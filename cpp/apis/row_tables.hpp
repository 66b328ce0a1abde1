// Nested tables of each row's own values: a joint tree, or greedy splits as in Any-Precision LLM.
#pragma once

#include <cstdint>

namespace taper {

struct RowTablesProblem {
  const float* weights;      // (rows, cols), finite
  const float* sensitivity;  // (sensitivity_rows, cols), finite, not negative
  int64_t sensitivity_rows;  // 1 or rows
  const float* importance;   // (max_bits - min_bits + 1), positive
  int64_t rows;
  int64_t cols;
  int min_bits;
  int max_bits;
  int64_t cells;  // of a row in the joint tree's programme
  bool greedy;
  uint64_t seed;  // of the greedy start
};

struct RowTablesResult {
  uint8_t* codes;  // (rows, cols), max_bits wide
  float* values;   // (rows, sum of 2^bits over the widths), from the least width up
};

// Throws std::invalid_argument for parts that contradict each other. The result does not depend on the threads.
void fit_row_tables(const RowTablesProblem& problem, const RowTablesResult& result);

}  // namespace taper
