// RoPE and attention over a KV cache.
#pragma once

#include <cstdint>

#include "taper/kernels.hpp"

namespace taper {

// Fused query, key and value rows of consecutive tokens: (tokens, (heads + 2 kv_heads) * head_dim).
struct QkvRows {
  int64_t tokens;
  int64_t width;
  int64_t heads;
};

// cos, sin (num_positions, half): of position * inv_freq, times attention_factor, in double before rounding.
void rope_tables(const double* inv_freq, int64_t half, int64_t num_positions, double attention_factor, float* cos,
                 float* sin);

// Rotates the queries in qkv in place and stores rotated keys and values at position, position + 1, ...
// cos, sin: (num_table_rows, head_dim / 2), indexed by position.
void rope_store(float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, const float* cos, const float* sin,
                int64_t num_table_rows);

// out (tokens, heads * head_dim): token t attends to the entries 0 .. position + t.
void attention(const float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, float scale, float* out);

}  // namespace taper
