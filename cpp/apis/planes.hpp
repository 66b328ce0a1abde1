// Linear layers over bit planes.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "apis/activations.hpp"
#include "taper/kernels.hpp"

namespace taper {

constexpr int kMaxBits = 8;
constexpr int64_t kColumnAlignment = 64;
// Products of int8 parts, at most 127 * 128 each, then add up within int32.
constexpr int64_t kMaxCols = 131072;
constexpr int kNarrowValue = 127;
// The largest whose parts 128 * high + low are within -127..127 and -64..63, and the least width that may have it.
constexpr int kWideValue = 127 * 128 + 63;
constexpr int kLeastWideBits = 7;

inline int64_t padded_cols(int64_t features) {
  return (features + kColumnAlignment - 1) / kColumnAlignment * kColumnAlignment;
}

// The values of one width: `shared` by all rows, or int8 `tables` of each row, of which the caller keeps the memory.
struct LevelValues {
  std::vector<int16_t> shared;
  const int8_t* tables = nullptr;
  int64_t stride = 0;  // bytes from one row's table to the next
  int64_t size = 0;    // values of a row
};

// What a matrix is made of. The arrays belong to the caller and outlive the matrix.
struct PlanesParts {
  std::vector<const uint8_t*> planes;  // each (rows, cols / 8)
  int64_t rows = 0;
  int64_t in_features = 0;
  std::map<int, LevelValues> values;  // bits -> 2^bits values
  std::map<int, float> level_scales;  // the same keys
  const float* row_scales = nullptr;  // (num_scale_rows, rows)
  int64_t num_scale_rows = 0;
  const float* bias = nullptr;  // (num_bias_rows, rows) or null
  int64_t num_bias_rows = 0;
};

// A weight matrix that is read at any width from min_bits() to max_bits().
class PlanedMatrix {
 public:
  // Throws std::invalid_argument for parts that contradict each other.
  explicit PlanedMatrix(PlanesParts parts);
  PlanedMatrix(const PlanedMatrix&) = delete;  // views point into it
  PlanedMatrix& operator=(const PlanedMatrix&) = delete;

  int64_t rows() const { return parts_.rows; }
  int64_t cols() const { return cols_; }
  int64_t in_features() const { return parts_.in_features; }
  int min_bits() const { return min_bits_; }
  int max_bits() const { return min_bits_ + static_cast<int>(views_.size()) - 1; }

  // out (tokens, rows) = activations times the matrix at `bits`, plus bias, plus residual (or null).
  void matmul(const Activations& activations, int bits, const float* residual, float* out) const;

  // What a kernel reads at `bits`. Throws std::invalid_argument outside min_bits()..max_bits().
  const PlanesView& view(int bits) const;

  // out (in_features): one dequantised row, still rotated. Checks nothing.
  void read_row(const Kernels& kernels, int64_t index, const PlanesView& weights, float* out) const;

  // out (count, in_features): dequantised rows, still rotated.
  void read_rows(const int64_t* indices, int64_t count, int bits, float* out) const;

  // Bytes that one pass at `bits` reads: planes, row scales and, where there are any, biases and tables.
  int64_t bytes_read(int bits) const;

 private:
  struct alignas(64) Table {
    std::array<int8_t, 256> values{}, low{};
    bool wide = false;
  };

  PlanesView made_view(int bits) const;

  PlanesParts parts_;
  int64_t cols_;
  int min_bits_;
  std::vector<Table> tables_;      // by bits - min_bits
  std::vector<PlanesView> views_;  // likewise, ready: a step asks for hundreds whose parts have left the caches
};

// Cuts codes (rows, in_features) of `parent_bits` into planes[p] (rows, padded_cols / 8), most significant first.
void pack_planes(const uint8_t* codes, int64_t rows, int64_t in_features, int parent_bits, uint8_t* const* planes);

// The first `bits` bits of every code: the inverse of pack_planes for as many planes as are given.
void unpack_codes(const uint8_t* const* planes, int bits, int64_t rows, int64_t in_features, uint8_t* codes);

}  // namespace taper
