#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/reference/reference.hpp"
#include "kernels/reference/sum16.hpp"

namespace taper::reference {
namespace {

float power_of_two(int exponent) { return std::ldexp(1.0f, exponent); }

// The least e >= -100 with rint(a * 2^-e) <= limit.
int shared_exponent(float a, float limit) {
  int e = -100;
  while (std::nearbyint(a * power_of_two(-e)) > limit) ++e;
  return e;
}

}  // namespace

float exp32(float x) {
  if (std::isnan(x)) return x;
  if (x < -87.0f) return 0.0f;
  const float bounded = std::min(x, 88.0f);
  const float n = std::nearbyint(bounded * 1.44269504f);
  float r = std::fma(n, -0.693145752f, bounded);
  r = std::fma(n, -1.42860677e-6f, r);
  float p = 1.0f / 720.0f;
  for (const float coefficient : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) {
    p = std::fma(p, r, coefficient);
  }
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

float weight32(float x) {
  if (std::isnan(x)) return x;
  const float t = std::max(x * 1.44269504f, -100.0f), n = std::nearbyint(t), r = t - n;
  float p = 0.00132647273f;
  for (const float coefficient : {0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f}) {
    p = std::fma(p, r, coefficient);
  }
  return p * power_of_two(static_cast<int>(n));
}

void exp(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = exp32(x[i]);
}

void rms_norm(const float* x, const float* gain, float eps, int64_t n, float* y) {
  const float inv = 1.0f / std::sqrt(dot16(x, x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) {
    y[i] = x[i] * inv;
    if (gain != nullptr) y[i] = y[i] * gain[i];
  }
}

void rotate(float* x, const float* signs, int64_t n, int64_t block, bool inverse) {
  const float c = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  if (!inverse) {
    for (int64_t i = 0; i < n; ++i) x[i] *= signs[i];
  }
  for (int64_t s = 1; s < block; s *= 2) {
    for (int64_t i = 0; i < n; ++i) {
      if (i / s % 2 != 0) continue;
      const float a = x[i], b = x[i + s];
      x[i] = a + b;
      x[i + s] = a - b;
    }
  }
  for (int64_t i = 0; i < n; ++i) x[i] *= c;
  if (inverse) {
    for (int64_t i = 0; i < n; ++i) x[i] *= signs[i];
  }
}

void quantize(const float* x, int64_t n, int64_t cols, int magnitude_bits, const QuantizedRow& out) {
  float a = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    a = std::max(a, std::fabs(x[i]));
  }
  std::fill(out.q, out.q + cols, int8_t{0});
  *out.sum = 0;
  if (out.low != nullptr) {
    std::fill(out.low, out.low + cols, int8_t{0});
    *out.low_sum = 0;
  }
  if (!finite || a == 0.0f) {
    *out.scale = finite ? 1.0f : std::nanf("");
    return;
  }
  const int e = shared_exponent(a, static_cast<float>(largest_activation(magnitude_bits)));
  for (int64_t i = 0; i < n; ++i) {
    const int value = static_cast<int>(std::nearbyint(x[i] * power_of_two(-e)));
    const int high = out.low == nullptr ? value : (value + 128) >> kInputShift;
    out.q[i] = static_cast<int8_t>(high);
    *out.sum += high;
    if (out.low != nullptr) {
      out.low[i] = static_cast<int8_t>(value - (high << kInputShift));
      *out.low_sum += out.low[i];
    }
  }
  *out.scale = power_of_two(e);
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] / (1.0f + exp32(-gate[i])) * up[i];
}

}  // namespace taper::reference
