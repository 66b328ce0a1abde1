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

// Checks a row's width against the heads.
void check_width(const QkvRows& rows, const AttentionShape& shape) {
  require(rows.tokens >= 1, "qkv has ", rows.tokens, " rows, expected at least 1");
  check_shape(shape);
  require(rows.width == shape.qkv_width(), "qkv has ", rows.width, " columns, expected ", shape.qkv_width(), " for ",
          rows.heads, " heads, ", shape.kv_heads, " KV heads and head_dim ", shape.head_dim);
}

void check_rows(const QkvRows& rows, const KvView& kv, int64_t position) {
  check_width(rows, {rows.heads, kv.kv_heads, kv.head_dim});
  require(position >= 0, "position is ", position, ", expected at least 0");
  require(position + rows.tokens <= kv.capacity, "positions ", position, "..", position + rows.tokens - 1,
          " are outside a KV cache of ", kv.capacity);
}

void check_rows(const QkvRows& rows, const PlanesTable& table, int64_t layer, int64_t position) {
  check_width(rows, {rows.heads, table.layout->kv_heads(), table.layout->head_dim()});
  require(layer >= 0 && layer < table.layout->layers(), "layer is ", layer, ", expected 0..",
          table.layout->layers() - 1);
  check_table(table, position, rows.tokens);
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

void AttentionWork::run(const Kernels& kernels, int64_t item, const float* q, int64_t q_stride, const CacheView* caches,
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
                            const CacheView& cache, float scale) {
  const Span& span = spans_[static_cast<size_t>(item.span)];
  const int64_t position = span.position + token, dim = shape_.head_dim, row = span.row + token;
  if (chunk * kAttentionChunk > position) return;
  if (split_ || chunk == 0) {
    const AttentionState own = state(row, split_ ? chunk : 0, item.first_head);
    return run_chunk(kernels, item, position, chunk, q, cache, scale, own);
  }
  thread_local std::vector<float> memory;
  memory.resize(std::max<size_t>(memory.size(), static_cast<size_t>(kAttentionHeads * (dim + 2))));
  const AttentionState alone{memory.data(), memory.data() + kAttentionHeads, memory.data() + 2 * kAttentionHeads};
  run_chunk(kernels, item, position, chunk, q, cache, scale, alone);
  kernels.attention_merge(item.heads, dim, alone, state(row, 0, item.first_head));
}

void AttentionWork::run_chunk(const Kernels& kernels, const Item& item, int64_t position, int64_t chunk, const float* q,
                              const CacheView& cache, float scale, const AttentionState& out) const {
  const int64_t begin = chunk * kAttentionChunk, dim = shape_.head_dim;
  const int64_t entries_seen = std::min(kAttentionChunk, position + 1 - begin);
  if (cache.table != nullptr) {
    PlanesAttentionArgs args{};
    args.q = q + item.first_head * dim;
    args.heads = item.heads;
    args.num_entries = entries_seen;
    args.scale = scale;
    set_parts(*cache.table, cache.layer, item.kv_head, chunk, position, args);
    return kernels.planes_attention(args, out);
  }
  const KvView& kv = cache.arrays;
  kernels.attention({q + item.first_head * dim, item.heads, entries(kv.keys, kv, item.kv_head, begin),
                     entries(kv.values, kv, item.kv_head, begin), kv.type, dim, entries_seen, scale},
                    out);
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

int64_t rows_of_one_thread(const CacheView& cache, int64_t position, int64_t rows) {
  constexpr int64_t kShared = 16;
  return cache.table == nullptr ? 1 : std::min(rows, kShared - position % kShared);
}

void store_token(const Kernels& kernels, float* qkv, int64_t heads, const CacheView& cache, int64_t position,
                 const float* cos, const float* sin) {
  if (cache.table == nullptr) return kernels.rope_store(qkv, heads, cache.arrays, position, cos, sin);
  const PlanesTable& table = *cache.table;
  const size_t block = static_cast<size_t>(position / kBlockEntries);
  uint8_t* lower = table.lower.empty() ? nullptr : table.lower[block];
  kernels.planes_store(qkv, heads, table.layout->format(cache.layer),
                       table.layout->block(cache.layer, table.upper[block], lower), position % kBlockEntries, cos, sin);
}

namespace {

void store_rows(float* qkv, const QkvRows& rows, const CacheView& cache, int64_t head_dim, int64_t position,
                const float* cos, const float* sin, int64_t num_table_rows) {
  require(head_dim % 2 == 0, "head_dim is ", head_dim, ", expected an even number");
  require(position + rows.tokens <= num_table_rows, "position ", position + rows.tokens - 1,
          " is outside RoPE tables of ", num_table_rows, " rows");
  const Kernels& table = kernels();
  const int64_t half = head_dim / 2;
  std::vector<int64_t> starts{0};
  while (starts.back() < rows.tokens) {
    const int64_t t = starts.back();
    starts.push_back(t + rows_of_one_thread(cache, position + t, rows.tokens - t));
  }
  const int64_t runs = static_cast<int64_t>(starts.size()) - 1;
  const Plan plan = plan_items(runs, rows.tokens * rows.width * kPsPerElement / runs, num_threads());
  parallel_for(runs, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = starts[static_cast<size_t>(begin)]; t < starts[static_cast<size_t>(end)]; ++t) {
      const int64_t p = position + t;
      store_token(table, qkv + t * rows.width, rows.heads, cache, p, cos + p * half, sin + p * half);
    }
  });
}

void attend_rows(const float* qkv, const QkvRows& rows, const AttentionShape& shape, const CacheView& cache,
                 int64_t position, float scale, float* out) {
  const Kernels& table = kernels();
  const int64_t width = rows.heads * shape.head_dim;
  AttentionWork work(shape);
  work.reset({{0, rows.tokens, position}});
  const int64_t products = rows.tokens * rows.heads * (position + rows.tokens) * shape.head_dim;
  const Plan items = plan_items(work.items(), products * kPsPerProduct / work.items(), num_threads());
  parallel_for(work.items(), items.chunk, items.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work.run(table, i, qkv, rows.width, &cache, scale);
  });
  const Plan plan = plan_items(rows.tokens, width * kPsPerElement, num_threads());
  parallel_for(rows.tokens, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work.finish(table, t, out + t * width);
  });
}

}  // namespace

void rope_store(float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, const float* cos, const float* sin,
                int64_t num_table_rows) {
  check_rows(rows, kv, position);
  store_rows(qkv, rows, {kv}, kv.head_dim, position, cos, sin, num_table_rows);
}

void rope_store(float* qkv, const QkvRows& rows, const PlanesTable& table, int64_t layer, int64_t position,
                const float* cos, const float* sin, int64_t num_table_rows) {
  check_rows(rows, table, layer, position);
  store_rows(qkv, rows, {{}, &table, layer}, table.layout->head_dim(), position, cos, sin, num_table_rows);
}

void attention(const float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, float scale, float* out) {
  check_rows(rows, kv, position);
  attend_rows(qkv, rows, {rows.heads, kv.kv_heads, kv.head_dim}, {kv}, position, scale, out);
}

void attention(const float* qkv, const QkvRows& rows, const PlanesTable& table, int64_t layer, int64_t position,
               float scale, float* out) {
  check_rows(rows, table, layer, position);
  attend_rows(qkv, rows, {rows.heads, table.layout->kv_heads(), table.layout->head_dim()}, {{}, &table, layer},
              position, scale, out);
}

}  // namespace taper
