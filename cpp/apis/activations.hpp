// Activations as int8 rows, or two int8 parts, with one scale each, and what makes them.
#pragma once

#include <cstdint>
#include <memory>

#include "taper/kernels.hpp"

namespace taper {

constexpr int kNarrowMagnitudeBits = 7;  // sign and magnitude fit an int8
constexpr int kMaxMagnitudeBits = 15;    // of largest_activation both parts fit an int8

// Owns tokens rows of cols int8 (64-byte aligned), as many of low parts where it is wide, and a scale and sums for
// each.
class Activations {
 public:
  Activations() = default;  // of nothing yet
  // Throws std::invalid_argument unless tokens >= 1 and cols is a positive multiple of 64.
  Activations(int64_t tokens, int64_t cols, bool wide) { reshape(tokens, cols, wide); }

  // Throws as the constructor. What was there is lost; memory is kept where it is enough.
  void reshape(int64_t tokens, int64_t cols, bool wide);

  int64_t tokens() const { return tokens_; }
  int64_t cols() const { return cols_; }
  bool wide() const { return wide_; }
  int8_t* q() const { return reinterpret_cast<int8_t*>(memory_.get()); }
  int8_t* low() const { return wide_ ? q() + tokens_ * cols_ : nullptr; }
  float* scale() const { return reinterpret_cast<float*>(memory_.get() + tokens_ * cols_ * (wide_ ? 2 : 1)); }
  int32_t* sum() const { return reinterpret_cast<int32_t*>(scale() + tokens_); }
  int32_t* low_sum() const { return wide_ ? sum() + tokens_ : nullptr; }
  ActivationsView view() const { return {q(), scale(), sum(), tokens_, low(), low_sum()}; }
  QuantizedRow row(int64_t token) const {
    return {q() + token * cols_, scale() + token, sum() + token, wide_ ? low() + token * cols_ : nullptr,
            wide_ ? low_sum() + token : nullptr};
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const;
  };
  int64_t tokens_ = 0;
  int64_t cols_ = 0;
  bool wide_ = false;
  int64_t bytes_ = 0;  // of memory_
  std::unique_ptr<unsigned char[], Free> memory_;
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
