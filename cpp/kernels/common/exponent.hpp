// What every quantiser of a row of activations shares (docs/numerics.md, "Activations"). Internal linkage: each
// instruction set compiles its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "taper/kernels.hpp"

namespace taper {
namespace {

constexpr int kLeastExponent = -100;

// Least e >= kLeastExponent with rint(a * 2^-e) <= 2^bits - 1, for finite a > 0. With a = m * 2^k, 1/2 <= m < 1, the
// choice e = k - bits gives a value below 2^bits, which rounding can still lift to 2^bits.
inline int choose_exponent(float a, int magnitude_bits) {
  int k;
  const float m = std::frexp(a, &k);
  const bool rounds_up = std::rint(std::ldexp(m, magnitude_bits)) >= std::ldexp(1.0f, magnitude_bits);
  return std::max(kLeastExponent, k - magnitude_bits + (rounds_up ? 1 : 0));
}

// A row without a magnitude, or without a finite one.
inline void fill_zeros(int64_t cols, float scale, const QuantizedRow& out) {
  std::memset(out.q, 0, static_cast<size_t>(cols));
  *out.scale = scale;
  *out.sum = 0;
  if (out.low == nullptr) return;
  std::memset(out.low, 0, static_cast<size_t>(cols));
  *out.low_sum = 0;
}

}  // namespace
}  // namespace taper
