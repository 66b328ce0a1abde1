// docs/numerics.md, "Sum of n floats".
#pragma once

#include <cmath>
#include <cstdint>

namespace taper::reference {

inline float tree(float* s) {
  for (int half = 8; half >= 1; half /= 2) {
    for (int l = 0; l < half; ++l) s[l] += s[l + half];
  }
  return s[0];
}

inline float sum16(const float* x, int64_t n) {
  float s[16] = {};
  for (int64_t i = 0; i < n; ++i) s[i % 16] += x[i];
  return tree(s);
}

template <class Y>
float dot16(const float* x, const Y& y, int64_t n) {
  float s[16] = {};
  for (int64_t i = 0; i < n; ++i) s[i % 16] = std::fma(x[i], y[i], s[i % 16]);
  return tree(s);
}

}  // namespace taper::reference
