// The shared exponent of a row of activations (docs/numerics.md, "Activations"). Internal linkage: each instruction set
// compiles its own.
#pragma once

#include <algorithm>
#include <cmath>

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

}  // namespace
}  // namespace taper
