// Activations as int8 rows, or two int8 parts, with one scale each, and what makes them.
#pragma once

#include <cstdint>

#include "heuristics/plan.hpp"
#include "runtime/pages.hpp"
#include "taper/kernels.hpp"

namespace taper {

constexpr int kNarrowMagnitudeBits = 7;  // sign and magnitude fit an int8
constexpr int kMaxMagnitudeBits = 15;    // of largest_activation both parts fit an int8

// Owns tokens rows of cols int8 (64-byte aligned), as many of low parts where it is wide, both once more where they are
// packed, and a scale and sums for each.
class Activations {
 public:
  Activations() = default;  // of nothing yet
  // Throws std::invalid_argument unless tokens >= 1 and cols is a positive multiple of 64.
  Activations(int64_t tokens, int64_t cols, bool wide, bool packed = false) { reshape(tokens, cols, wide, packed); }

  // Throws as the constructor. What was there is lost; memory is kept where it is enough.
  void reshape(int64_t tokens, int64_t cols, bool wide, bool packed = false);

  int64_t tokens() const { return tokens_; }
  int64_t cols() const { return cols_; }
  bool wide() const { return wide_; }
  int8_t* q() const { return reinterpret_cast<int8_t*>(memory_.get()); }
  int8_t* low() const { return wide_ ? q() + tokens_ * cols_ : nullptr; }
  bool packed() const { return packed_; }
  // Of q, or of the low parts.
  int8_t* packed(bool low) const { return q() + parts() * tokens_ * cols_ + (low ? packed_bytes() : 0); }
  float* scale() const { return reinterpret_cast<float*>(packed(false) + (packed_ ? parts() * packed_bytes() : 0)); }
  int32_t* sum() const { return reinterpret_cast<int32_t*>(scale() + tokens_); }
  int32_t* low_sum() const { return wide_ ? sum() + tokens_ : nullptr; }
  ActivationsView view() const {
    return {q(),
            scale(),
            sum(),
            tokens_,
            low(),
            low_sum(),
            packed_ ? packed(false) : nullptr,
            packed_ && wide_ ? packed(true) : nullptr};
  }
  QuantizedRow row(int64_t token) const {
    return {q() + token * cols_, scale() + token, sum() + token, wide_ ? low() + token * cols_ : nullptr,
            wide_ ? low_sum() + token : nullptr};
  }

 private:
  int64_t parts() const { return wide_ ? 2 : 1; }
  int64_t packed_bytes() const { return (tokens_ + kPackedTokens - 1) / kPackedTokens * kPackedTokens * cols_; }

  int64_t tokens_ = 0;
  int64_t cols_ = 0;
  bool wide_ = false, packed_ = false;
  int64_t bytes_ = 0;  // of memory_
  Pages<unsigned char> memory_;
};

struct Rotation {
  const float* signs;  // (n) of +-1, or null for no rotation
  int64_t block;       // power of two that divides n
};

struct Norm {
  bool enabled;
  const float* gain;  // (n) or null
  float eps;
};

// Whether so many tokens are packed, once for all rows of a matrix. A few are not: packing them in groups of sixteen
// would take them from the threads that prepare them one by one, and costs the kernel less.
bool packs(const Kernels& kernels, int64_t tokens);

// Tokens [begin, end), begin a multiple of kPackedTokens, where `out` is packed.
void pack_rows(const Kernels& kernels, const Activations& out, int64_t begin, int64_t end);

// Rows of x in pieces, whole groups of kPackedTokens where they are packed.
Plan plan_prepare(const Activations& out, int64_t ps_each);

// One row of x (n): norm, rotation, integers into row `token` of `out`. Checks nothing.
void prepare_row(const Kernels& kernels, const float* x, int64_t n, const Norm& norm, const Rotation& rotation,
                 int magnitude_bits, const Activations& out, int64_t token);

// For each row of x (tokens, n): norm, rotation, integers. Fills all of `out`, whose cols are n padded and which is
// wide exactly for magnitude_bits above 7.
void prepare(const float* x, int64_t n, const Norm& norm, const Rotation& rotation, int magnitude_bits,
             const Activations& out);

// The same for SwiGLU of gate_up (tokens, 2n), gate first.
void prepare_swiglu(const float* gate_up, int64_t n, const Rotation& rotation, int magnitude_bits,
                    const Activations& out);

}  // namespace taper
