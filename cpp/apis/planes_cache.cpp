#include "apis/planes_cache.hpp"

#include <algorithm>

#include "apis/check.hpp"

namespace taper {
namespace {

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void check_bits(const char* name, int bits, int upper) {
  require(bits >= 1 && bits <= kMaxPlanesBits, name, " have ", bits, " magnitude bits, expected 1..", kMaxPlanesBits);
  require(upper >= 1 && upper <= bits, name, " have ", upper, " of ", bits, " bits in the upper part, expected 1..",
          bits);
}

}  // namespace

PlanesLayout::PlanesLayout(int64_t kv_heads, int64_t head_dim, std::vector<StoredBits> layers)
    : kv_heads_(kv_heads), head_dim_(head_dim) {
  require(kv_heads >= 1, "kv_heads is ", kv_heads, ", expected at least 1");
  require(head_dim >= kPlanesDimUnit && head_dim <= kMaxPlanesDim && head_dim % kPlanesDimUnit == 0, "head_dim is ",
          head_dim, ", expected a multiple of ", kPlanesDimUnit, " up to ", kMaxPlanesDim);
  require(!layers.empty(), "a cache needs at least one layer");
  const int64_t plane = kv_heads * plane_bytes(head_dim);
  const int64_t exponents = kv_heads * (head_dim / planes_group(head_dim)) * kExponentBytes;
  for (const StoredBits& bits : layers) {
    check_bits("keys", bits.key, bits.key_upper);
    check_bits("values", bits.value, bits.value_upper);
    Place place{{kv_heads, head_dim, bits.key, bits.key_upper, bits.value, bits.value_upper}, 0, 0, 0, 0, 0, 0};
    place.keys = upper_bytes_;
    place.values = place.keys + (1 + bits.key_upper) * plane;
    upper_bytes_ = place.values + (1 + bits.value_upper) * plane;
    place.low_keys = lower_bytes_;
    place.low_values = place.low_keys + (bits.key - bits.key_upper) * plane;
    lower_bytes_ = place.low_values + (bits.value - bits.value_upper) * plane;
    places_.push_back(place);
  }
  for (Place& place : places_) {
    place.key_exponents = upper_bytes_;
    place.value_exponents = upper_bytes_ + exponents;
    upper_bytes_ += 2 * exponents;
  }
  upper_bytes_ = aligned(upper_bytes_);
  lower_bytes_ = aligned(lower_bytes_);
}

PlanesBlock PlanesLayout::block(int64_t layer, uint8_t* upper, uint8_t* lower) const {
  const Place& place = places_[static_cast<size_t>(layer)];
  return {upper + place.keys,          lower == nullptr ? nullptr : lower + place.low_keys,
          upper + place.values,        lower == nullptr ? nullptr : lower + place.low_values,
          upper + place.key_exponents, upper + place.value_exponents};
}

void check_table(const PlanesTable& table, int64_t position, int64_t tokens) {
  const PlanesLayout& layout = *table.layout;
  const int64_t blocks = static_cast<int64_t>(table.upper.size());
  require(position >= 0 && tokens >= 1 && position + tokens <= blocks * kBlockEntries, "positions ", position, "..",
          position + tokens - 1, " are outside the ", blocks, " blocks of a KV cache");
  require(table.window >= 0, "window is ", table.window, ", expected at least 0");
  bool reads_lower = false, old_reads_lower = false;
  for (int64_t l = 0; l < layout.layers(); ++l) {
    const PlanesFormat& format = layout.format(l);
    const ReadBits& bits = table.bits[l];
    for (const int read : {bits.key, bits.old_key}) {
      require(read >= 1 && read <= format.key_bits, "keys of layer ", l, " are read at ", read, " bits, expected 1..",
              format.key_bits);
    }
    for (const int read : {bits.value, bits.old_value}) {
      require(read >= 1 && read <= format.value_bits, "values of layer ", l, " are read at ", read,
              " bits, expected 1..", format.value_bits);
    }
    reads_lower |= bits.key > format.key_upper || bits.value > format.value_upper;
    old_reads_lower |= bits.old_key > format.key_upper || bits.old_value > format.value_upper;
  }
  if (layout.lower_bytes() == 0) return;
  for (int64_t b = 0; b * kBlockEntries < position + tokens; ++b) {
    const bool written = (b + 1) * kBlockEntries > position;
    const bool needed = written || (table.is_old(b, position) ? old_reads_lower : reads_lower);
    require(table.lower[static_cast<size_t>(b)] != nullptr || !needed, "block ", b,
            " has given up its lower planes, which position ", position, written ? " writes" : " reads");
  }
}

void set_parts(const PlanesTable& table, int64_t layer, int64_t kv_head, int64_t chunk, int64_t position,
               PlanesAttentionArgs& args) {
  const PlanesFormat& format = table.layout->format(layer);
  const int64_t plane = plane_bytes(format.head_dim);
  const int64_t exponents = kv_head * (format.head_dim / planes_group(format.head_dim)) * kExponentBytes;
  const ReadBits& bits = table.bits[layer];
  args.format = format;
  const int64_t first = chunk * kChunkBlocks, end = position / kBlockEntries + 1;
  for (int64_t b = first; b < std::min(first + 2 * kChunkBlocks, end); ++b) {
    const bool old = table.is_old(b, position);
    uint8_t* lower = table.lower.empty() ? nullptr : table.lower[static_cast<size_t>(b)];
    const PlanesBlock block = table.layout->block(layer, table.upper[static_cast<size_t>(b)], lower);
    const uint8_t* low_keys =
        lower == nullptr ? nullptr : block.low_keys + kv_head * (format.key_bits - format.key_upper) * plane;
    const uint8_t* low_values =
        lower == nullptr ? nullptr : block.low_values + kv_head * (format.value_bits - format.value_upper) * plane;
    const PlanesPart keys{block.keys + kv_head * (1 + format.key_upper) * plane, low_keys,
                          block.key_exponents + exponents, old ? bits.old_key : bits.key};
    if (b >= first + kChunkBlocks) {
      args.next_keys[b - first - kChunkBlocks] = keys;
      continue;
    }
    args.keys[b - first] = keys;
    args.values[b - first] = {block.values + kv_head * (1 + format.value_upper) * plane, low_values,
                              block.value_exponents + exponents, old ? bits.old_value : bits.value};
  }
}

}  // namespace taper
