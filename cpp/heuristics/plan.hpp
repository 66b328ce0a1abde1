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

// inputs: int8 rows of activations, two for each token whose activations are wide.
MatmulPlan plan_matmul(int64_t rows, int64_t cols, int bits, int64_t inputs, int max_threads);

struct AttentionPlan {
  int64_t heads;  // query heads of one KV head that a piece of work takes
  Plan items;
};

// Each query head multiplies about `products` numbers.
AttentionPlan plan_attention(int64_t tokens, int64_t kv_heads, int64_t group, int64_t products, int max_threads);

// `items` pieces of work of about `ps_each` picoseconds on one core.
Plan plan_items(int64_t items, int64_t ps_each, int max_threads);

}  // namespace taper
