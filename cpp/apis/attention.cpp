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
constexpr int64_t kTileRows = 16;       // that share the chunk of keys and values in the cache
// Rows up to which chunks are items: their states are 8.5 KB a row and chunk (32 heads of 64).
constexpr int64_t kSplitRows = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_rows(const QkvRows& rows, const KvView& kv, int64_t position) {
  require(rows.tokens >= 1, "qkv has ", rows.tokens, " rows, expected at least 1");
  const AttentionShape shape{rows.heads, kv.kv_heads, kv.head_dim};
  check_shape(shape);
  const int64_t width = shape.qkv_width();
  require(rows.width == width, "qkv has ", rows.width, " columns, expected ", width, " for ", rows.heads, " heads, ",
          kv.kv_heads, " KV heads and head_dim ", kv.head_dim);
  require(position >= 0, "position is ", position, ", expected at least 0");
  require(position + rows.tokens <= kv.capacity, "positions ", position, "..", position + rows.tokens - 1,
          " are outside a KV cache of ", kv.capacity);
}

// Entries from `position` on of one KV head.
const void* entries(const void* data, const KvView& kv, int64_t kv_head, int64_t position) {
  const int64_t bytes = kv.type == KvType::f16 ? 2 : 4;
  return static_cast<const char*>(data) + (kv_head * kv.capacity + position) * kv.head_dim * bytes;
}

}  // namespace

void check_shape(const AttentionShape& shape) {
  require(shape.kv_heads >= 1 && shape.head_dim >= 1, "a KV cache has ", shape.kv_heads, " heads of ", shape.head_dim,
          " elements, expected at least 1 of 1");
  require(shape.heads >= 1 && shape.heads % shape.kv_heads == 0, "heads is ", shape.heads,
          ", expected a multiple of the ", shape.kv_heads, " KV heads");
}

void AttentionWork::reset(const std::vector<Span>& spans) {
  spans_ = spans;
  items_.clear();
  chunks_of_row_.clear();
  int64_t most = 0;
  for (const Span& span : spans) {
    for (int64_t t = 0; t < span.tokens; ++t) {
      chunks_of_row_.push_back(ceil_div(span.position + t + 1, kAttentionChunk));
      most = std::max(most, chunks_of_row_.back());
    }
  }
  split_ = rows() <= kSplitRows;
  parts_ = split_ ? most : 1;
  for (size_t i = 0; i < spans.size(); ++i) add_items(static_cast<int64_t>(i), spans[i]);
  states_.resize(static_cast<size_t>(rows() * parts_ * shape_.heads * (shape_.head_dim + 2)));
}

void AttentionWork::add_items(int64_t span, const Span& of) {
  const int64_t runs = ceil_div(shape_.group(), kAttentionHeads), heads = ceil_div(shape_.group(), runs);
  const int64_t chunks = ceil_div(of.position + of.tokens, kAttentionChunk), tile = split_ ? of.tokens : kTileRows;
  for (int64_t kv_head = 0; kv_head < shape_.kv_heads; ++kv_head) {
    for (int64_t first = 0; first < shape_.group(); first += heads) {
      const int64_t head = kv_head * shape_.group() + first, count = std::min(heads, shape_.group() - first);
      for (int64_t t = 0; t < of.tokens; t += tile) {
        const int64_t end = std::min(t + tile, of.tokens);
        for (int64_t chunk = 0; chunk < chunks; chunk += split_ ? 1 : chunks) {
          items_.push_back({span, t, end, kv_head, head, count, chunk, split_ ? chunk + 1 : chunks});
        }
      }
    }
  }
}

AttentionState AttentionWork::state(int64_t row, int64_t part, int64_t head) {
  const int64_t heads = shape_.heads;
  float* at = states_.data() + (row * parts_ + part) * heads * (shape_.head_dim + 2);
  return {at + head, at + heads + head, at + 2 * heads + head * shape_.head_dim};
}

void AttentionWork::run(const Kernels& kernels, int64_t item, const float* q, int64_t q_stride, const KvView* caches,
                        float scale) {
  const Item& work = items_[static_cast<size_t>(item)];
  const Span& span = spans_[static_cast<size_t>(work.span)];
  for (int64_t chunk = work.first_chunk; chunk < work.last_chunk; ++chunk) {
    for (int64_t t = work.first_token; t < work.last_token; ++t) {
      run_row(kernels, work, t, chunk, q + (span.row + t) * q_stride, caches[work.span], scale);
    }
  }
}

void AttentionWork::run_row(const Kernels& kernels, const Item& item, int64_t token, int64_t chunk, const float* q,
                            const KvView& kv, float scale) {
  const Span& span = spans_[static_cast<size_t>(item.span)];
  const int64_t begin = chunk * kAttentionChunk, seen = span.position + token + 1, dim = shape_.head_dim;
  if (begin >= seen) return;
  const AttentionArgs args{q + item.first_head * dim,
                           item.heads,
                           entries(kv.keys, kv, item.kv_head, begin),
                           entries(kv.values, kv, item.kv_head, begin),
                           kv.type,
                           dim,
                           std::min(kAttentionChunk, seen - begin),
                           scale};
  const int64_t row = span.row + token;
  if (split_ || chunk == 0) return kernels.attention(args, state(row, split_ ? chunk : 0, item.first_head));
  thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), static_cast<size_t>(kAttentionHeads * (dim + 2))));
  const AttentionState alone{memory.data(), memory.data() + kAttentionHeads, memory.data() + 2 * kAttentionHeads};
  kernels.attention(args, alone);
  kernels.attention_merge(item.heads, dim, alone, state(row, 0, item.first_head));
}

void AttentionWork::finish(const Kernels& kernels, int64_t row, float* out) {
  const AttentionState whole = state(row, 0, 0);
  const int64_t parts = split_ ? chunks_of_row_[static_cast<size_t>(row)] : 1;
  for (int64_t part = 1; part < parts; ++part) {
    kernels.attention_merge(shape_.heads, shape_.head_dim, state(row, part, 0), whole);
  }
  kernels.attention_finish(shape_.heads, shape_.head_dim, whole, out);
}

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
  const int64_t width = rows.heads * kv.head_dim;
  AttentionWork work({rows.heads, kv.kv_heads, kv.head_dim});
  work.reset({{0, rows.tokens, position}});
  const int64_t products = rows.tokens * rows.heads * (position + rows.tokens) * kv.head_dim;
  const Plan items = plan_items(work.items(), products * kPsPerProduct / work.items(), num_threads());
  parallel_for(work.items(), items.chunk, items.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work.run(table, i, qkv, rows.width, &kv, scale);
  });
  const Plan plan = plan_items(rows.tokens, width * kPsPerElement, num_threads());
  parallel_for(rows.tokens, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work.finish(table, t, out + t * width);
  });
}

}  // namespace taper
