// RoPE, the KV cache and attention for rows of several sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "apis/planes_cache.hpp"
#include "taper/kernels.hpp"

namespace taper {

// cos, sin (num_positions, half) of position * inv_freq (half), times the attention factor.
void rope_tables(const double* inv_freq, int64_t half, int64_t num_positions, double attention_factor, float* cos,
                 float* sin);

struct AttentionShape {
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;

  int64_t group() const { return heads / kv_heads; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Throws std::invalid_argument unless all are positive and heads a multiple of kv_heads.
void check_shape(const AttentionShape& shape);

// One layer of a sequence's cache: arrays, or planes where `table` is not null.
struct CacheView {
  KvView arrays{};
  const PlanesTable* table = nullptr;
  int64_t layer = 0;
};

// Consecutive tokens of one sequence: rows row .. row + tokens - 1 of the activations.
struct Span {
  int64_t row;
  int64_t tokens;
  int64_t position;  // of the first token; token t sees the entries 0 .. position + t of its cache
};

// Attention of some spans, cut into items that may run at the same time; then a finish for each row. Where rows are few
// the chunks of a long context are items of their own, whose states the finish merges in rising order; else an item
// takes a tile of rows over all their chunks. Both give the same bytes.
class AttentionWork {
 public:
  explicit AttentionWork(const AttentionShape& shape) : shape_(shape) {}

  // Forgets the last spans. Where they begin and end, and nothing else, decides about the items.
  void reset(const std::vector<Span>& spans);

  int64_t items() const { return static_cast<int64_t>(items_.size()); }
  int64_t rows() const { return static_cast<int64_t>(chunks_of_row_.size()); }

  // q: rows of `q_stride` floats that begin with the query heads, after RoPE; caches: one for each span.
  void run(const Kernels& kernels, int64_t item, const float* q, int64_t q_stride, const CacheView* caches,
           float scale);

  // out (heads * head_dim): the attention of one row, when all items are done.
  void finish(const Kernels& kernels, int64_t row, float* out);

 private:
  struct Item {
    int64_t span, first_token, last_token, kv_head, first_head, heads, first_chunk, last_chunk;
  };

  void add_items(int64_t span, const Span& of);
  void run_row(const Kernels& kernels, const Item& item, int64_t token, int64_t chunk, const float* q,
               const CacheView& cache, float scale);
  void run_chunk(const Kernels& kernels, const Item& item, int64_t position, int64_t chunk, const float* q,
                 const CacheView& cache, float scale, const AttentionState& out) const;
  AttentionState state(int64_t row, int64_t part, int64_t head);

  AttentionShape shape_;
  std::vector<Span> spans_;
  std::vector<Item> items_;
  std::vector<int64_t> chunks_of_row_;
  bool split_ = false;  // chunks are items
  int64_t parts_ = 1;   // states of a row
  std::vector<float> states_;
};

// Rows of queries, keys and values of consecutive tokens: (tokens, qkv_width).
struct QkvRows {
  int64_t tokens;
  int64_t width;
  int64_t heads;
};

// Rotates queries in place and stores rotated keys, and values. cos, sin: whole tables of num_table_rows.
void rope_store(float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, const float* cos, const float* sin,
                int64_t num_table_rows);

// The same over planes.
void rope_store(float* qkv, const QkvRows& rows, const PlanesTable& table, int64_t layer, int64_t position,
                const float* cos, const float* sin, int64_t num_table_rows);

// One token of a sequence into its block.
void store_token(const Kernels& kernels, float* qkv, int64_t heads, const CacheView& cache, int64_t position,
                 const float* cos, const float* sin);

// Rows up to which one thread may store on its own from `position` on: entries of sixteen share bytes of planes.
int64_t rows_of_one_thread(const CacheView& cache, int64_t position, int64_t rows);

// out (tokens, heads * head_dim).
void attention(const float* qkv, const QkvRows& rows, const KvView& kv, int64_t position, float scale, float* out);
void attention(const float* qkv, const QkvRows& rows, const PlanesTable& table, int64_t layer, int64_t position,
               float scale, float* out);

}  // namespace taper
