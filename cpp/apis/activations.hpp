// Activations as int8 rows with one scale each, and what makes them.
#pragma once

#include <cstdint>
#include <memory>

#include "taper/kernels.hpp"

namespace taper {

constexpr int kMaxMagnitudeBits = 7;  // sign and magnitude fit an int8

// Owns tokens rows of cols int8 (64-byte aligned), and a scale and a sum for each.
class Activations {
 public:
  // Throws std::invalid_argument unless tokens >= 1 and cols is a positive multiple of 64.
  Activations(int64_t tokens, int64_t cols);

  int64_t tokens() const { return tokens_; }
  int64_t cols() const { return cols_; }
  int8_t* q() const { return reinterpret_cast<int8_t*>(memory_.get()); }
  float* scale() const { return reinterpret_cast<float*>(memory_.get() + tokens_ * cols_); }
  int32_t* sum() const { return reinterpret_cast<int32_t*>(memory_.get() + tokens_ * (cols_ + sizeof(float))); }
  ActivationsView view() const { return {q(), scale(), sum(), tokens_}; }

 private:
  struct Free {
    void operator()(unsigned char* memory) const;
  };
  int64_t tokens_;
  int64_t cols_;
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

// For each row of x (tokens, n): norm, rotation, int8. Fills all of `out`, whose cols are n padded.
void prepare(const float* x, int64_t n, const Norm& norm, const Rotation& rotation, int magnitude_bits,
             const Activations& out);

// The same for SwiGLU of gate_up (tokens, 2n), gate first.
void prepare_swiglu(const float* gate_up, int64_t n, const Rotation& rotation, int magnitude_bits,
                    const Activations& out);

}  // namespace taper
