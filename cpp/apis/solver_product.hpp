// Float products of the solver: many lines, few terms.
#pragma once

#include <cstdint>

namespace taper {

constexpr int64_t kProductLines = 4;     // lines of a dense product come in multiples of this
constexpr int64_t kProductColumns = 16;  // lines of a result have room for a multiple of this
constexpr int64_t kProductTerms = 128;   // at most

// out (m, n) += a (m, k) b (k, n); the terms of an element are added in rising k, one fused multiply-add each. A sparse
// product leaves out the terms where a is zero, line by line: of the moves of a coordinate pass, four in five.
struct Product {
  float* out;
  int64_t out_stride;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t m, k, n;
};

void add_dense(const Product&);
void add_sparse(const Product&);

}  // namespace taper
