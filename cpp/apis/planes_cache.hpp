// A KV cache as planes in paged blocks: where everything lies, and which planes a token reads of which block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "taper/kernels.hpp"

namespace taper {

// Magnitude bits of one layer that are stored, and how many of them lie in the upper part of a block.
struct StoredBits {
  int key, key_upper, value, value_upper;
};

// The parts of a block of kBlockEntries entries of all layers. Upper part: for each layer the keys' planes of its
// heads, then the values'; after all layers the exponents in the same order. Lower part: the planes that the upper one
// leaves.
class PlanesLayout {
 public:
  // Throws std::invalid_argument for a head_dim or bits that planes cannot hold.
  PlanesLayout(int64_t kv_heads, int64_t head_dim, std::vector<StoredBits> layers);

  int64_t layers() const { return static_cast<int64_t>(places_.size()); }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t head_dim() const { return head_dim_; }
  int64_t upper_bytes() const { return upper_bytes_; }  // multiples of 64
  int64_t lower_bytes() const { return lower_bytes_; }  // 0: there is no lower part
  const PlanesFormat& format(int64_t layer) const { return places_[static_cast<size_t>(layer)].format; }
  // One layer of a block; lower may be null.
  PlanesBlock block(int64_t layer, uint8_t* upper, uint8_t* lower) const;

 private:
  struct Place {
    PlanesFormat format;
    int64_t keys, values, key_exponents, value_exponents;  // in the upper part
    int64_t low_keys, low_values;
  };

  int64_t kv_heads_, head_dim_;
  int64_t upper_bytes_ = 0, lower_bytes_ = 0;
  std::vector<Place> places_;
};

// Magnitude bits that are read of one layer: of recent blocks and of old ones.
struct ReadBits {
  uint8_t key, value, old_key, old_value;
};

// The blocks of one sequence. What they point to belongs to the caller.
struct PlanesTable {
  const PlanesLayout* layout = nullptr;
  std::vector<uint8_t*> upper, lower;  // lower: null where it was given up
  const ReadBits* bits = nullptr;      // (layers)
  int64_t window = 0;

  // A block is old for a token when all its entries lie at least `window` before it.
  bool is_old(int64_t block, int64_t position) const {
    return position - (block * kBlockEntries + kBlockEntries - 1) >= window;
  }
};

// Throws std::invalid_argument unless tokens at position .. position + tokens - 1 can be written and read.
void check_table(const PlanesTable& table, int64_t position, int64_t tokens);

// What one KV head's query heads read of chunk `chunk` at `position`: fills keys, values and next_keys.
void set_parts(const PlanesTable& table, int64_t layer, int64_t kv_head, int64_t chunk, int64_t position,
               PlanesAttentionArgs& args);

}  // namespace taper
