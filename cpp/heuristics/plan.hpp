// Which kernel and how many threads for a shape.
#pragma once

#include <cstdint>

namespace taper {

struct Plan {
  int threads;
  int64_t chunk;  // elements of the split range that a thread takes at a time
};

struct MatmulPlan {
  bool gemm;  // unpack a tile of rows once for all tokens
  Plan rows;
};

// inputs: int8 rows of activations, two for each token whose activations are wide; gemm_inputs: that of the kernels.
MatmulPlan plan_matmul(int64_t rows, int64_t cols, int bits, int64_t inputs, int64_t gemm_inputs, int max_threads);

// Of attention, for each query head, entry and element of a head: keys and values together, AVX-512.
constexpr int64_t kPsPerProduct = 60;

// `items` pieces of work of about `ps_each` picoseconds on one core.
Plan plan_items(int64_t items, int64_t ps_each, int max_threads);

}  // namespace taper
