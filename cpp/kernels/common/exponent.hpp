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

// 2^e, for e within -126..127.
inline float power_of_two(int e) {
  const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Least e >= kLeastExponent with rint(a * 2^-e) <= Q, the largest of so many bits, for finite a > 0. With a = m * 2^k,
// 1/2 <= m < 1, the choice e = k - bits gives a value below 2^bits, which is too large from Q + 1/2 on, a tie whose
// even neighbour is above Q: `beyond` of the mantissa's steps below 2^bits. What is subnormal is below the least
// exponent.
inline int choose_exponent(float a, int magnitude_bits) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  const int k = static_cast<int>(bits >> 23) - 126;
  const int halves = 2 * ((1 << magnitude_bits) - largest_activation(magnitude_bits)) - 1;
  const uint32_t beyond = static_cast<uint32_t>(halves) << (23 - magnitude_bits);
  const bool rounds_up = (bits & 0x7fffffu) >= 0x800000u - beyond;
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
