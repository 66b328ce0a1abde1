#include "apis/attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "apis/check.hpp"
#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

constexpr int64_t kPsPerElement = 200;  // of qkv in rope_store

void check_rows(const QkvRows& rows, const KvView& kv, int64_t position) {
  require(rows.tokens >= 1, "qkv has ", rows.tokens, " rows, expected at least 1");
  require(kv.kv_heads >= 1 && kv.head_dim >= 1, "a KV cache has ", kv.kv_heads, " heads of ", kv.head_dim,
          " elements, expected at least 1 of 1");
  require(rows.heads >= 1 && rows.heads % kv.kv_heads == 0, "heads is ", rows.heads, ", expected a multiple of the ",
          kv.kv_heads, " KV heads");
  const int64_t width = (rows.heads + 2 * kv.kv_heads) * kv.head_dim;
  require(rows.width == width, "qkv has ", rows.width, " columns, expected ", width, " for ", rows.heads, " heads, ",
          kv.kv_heads, " KV heads and head_dim ", kv.head_dim);
  require(position >= 0, "position is ", position, ", expected at least 0");
  require(position + rows.tokens <= kv.capacity, "positions ", position, "..", position + rows.tokens - 1,
          " are outside a KV cache of ", kv.capacity);
}

}  // namespace

void rope_tables(const double* inv_freq, int64_t half, int64_t num_positions, double attention_factor, float* cos,
                 float* sin) {
  require(num_positions >= 1, "num_positions is ", num_positions, ", expected at least 1");
  for (int64_t p = 0; p < num_positions; ++p) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(p) * inv_freq[i];
      cos[p * half + i] = static_cast<float>(std::cos(angle) * attention_factor);
      sin[p * half + i] = static_cast<float>(std::sin(angle) * attention_factor);
    }
  }
}

void rope_store(float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, const float* cos, const float* sin,
                int64_t num_table_rows) {
  check_rows(rows, kv, position);
  require(kv.head_dim % 2 == 0, "head_dim is ", kv.head_dim, ", expected an even number");
  require(position + rows.tokens <= num_table_rows, "position ", position + rows.tokens - 1,
          " is outside RoPE tables of ", num_table_rows, " rows");
  const Kernels& table = kernels();
  const int64_t half = kv.head_dim / 2;
  const Plan plan = plan_items(rows.tokens, rows.width * kPsPerElement, num_threads());
  parallel_for(rows.tokens, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t p = position + t;
      table.rope_store(qkv + t * rows.width, rows.heads, kv, p, cos + p * half, sin + p * half);
    }
  });
}

void attention(const float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, float scale, float* out) {
  check_rows(rows, kv, position);
  const Kernels& table = kernels();
  const int64_t group = rows.heads / kv.kv_heads, num_entries = position + rows.tokens, dim = kv.head_dim;
  const AttentionPlan plan = plan_attention(rows.tokens, kv.kv_heads, group, num_entries * dim, num_threads());
  const int64_t parts = (group + plan.heads - 1) / plan.heads;
  const int64_t head_bytes = kv.capacity * dim * (kv.type == KvType::f16 ? 2 : 4);
  // Piece i as a call with one token and one KV head. Tokens of one KV head follow each other, so that its keys and
  // values stay in the cache.
  const auto piece = [&](int64_t i, float* scratch) -> AttentionArgs {
    const int64_t token = i % rows.tokens, kv_head = i / rows.tokens / parts;
    const int64_t first = i / rows.tokens % parts * plan.heads, head = kv_head * group + first;
    const KvView one{static_cast<char*>(kv.keys) + kv_head * head_bytes,
                     static_cast<char*>(kv.values) + kv_head * head_bytes,
                     kv.type,
                     1,
                     kv.capacity,
                     dim};
    return {qkv + token * rows.width + head * dim,   rows.width,       one,
            std::min(plan.heads, group - first),     position + token, scale,
            out + (token * rows.heads + head) * dim, scratch};
  };
  const int64_t count = rows.tokens * kv.kv_heads * parts;
  parallel_for(count, plan.items.chunk, plan.items.threads, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), attention_scratch(plan.heads, num_entries, dim)));
    for (int64_t i = begin; i < end; ++i) table.attention(piece(i, scratch.data()), 0, 0);
  });
}

}  // namespace taper
