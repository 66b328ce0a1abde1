// A row of floats to int8 with one power-of-two scale (docs/numerics.md, "Activations").
#include <arm_neon.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/common/exponent.hpp"

namespace taper::neon {
namespace {

constexpr int64_t kStep = 16;

// Elements i .. i + 15, zeros past n.
float32x4x4_t load_floats(const float* x, int64_t i, int64_t n) {
  if (i + kStep <= n) return {vld1q_f32(x + i), vld1q_f32(x + i + 4), vld1q_f32(x + i + 8), vld1q_f32(x + i + 12)};
  float padded[kStep] = {};
  if (i < n) std::memcpy(padded, x + i, static_cast<size_t>(n - i) * sizeof(float));
  return {vld1q_f32(padded), vld1q_f32(padded + 4), vld1q_f32(padded + 8), vld1q_f32(padded + 12)};
}

// max |x| by its bits: as integers finite < infinity < NaN, so nothing is lost on the way.
float max_magnitude(const float* x, int64_t n) {
  uint32x4_t most = vdupq_n_u32(0);
  for (int64_t i = 0; i < n; i += kStep) {
    const float32x4x4_t values = load_floats(x, i, n);
    for (const float32x4_t v : values.val) most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(v)));
  }
  const uint32_t bits = vmaxvq_u32(most);
  float a;
  std::memcpy(&a, &bits, sizeof(a));
  return a;
}

// Sixteen int32 within int8.
void store_bytes(const int32x4_t (&x)[4], int8_t* out) {
  const int16x8_t low = vmovn_high_s32(vmovn_s32(x[0]), x[1]), high = vmovn_high_s32(vmovn_s32(x[2]), x[3]);
  vst1q_s8(out, vmovn_high_s16(vmovn_s16(low), high));
}

}  // namespace

void quantize(const float* x, int64_t n, int64_t cols, int magnitude_bits, const QuantizedRow& out) {
  const float a = max_magnitude(x, n);
  if (a == 0 || !std::isfinite(a)) return fill_zeros(cols, a == 0 ? 1 : std::numeric_limits<float>::quiet_NaN(), out);
  const int e = choose_exponent(a, magnitude_bits);
  const float inverse = std::ldexp(1.0f, -e);
  int32x4_t total = vdupq_n_s32(0), low_total = vdupq_n_s32(0);
  for (int64_t i = 0; i < cols; i += kStep) {  // cols is a multiple of 64; lanes past n are zero
    const float32x4x4_t values = load_floats(x, i, n);
    int32x4_t high[4], low[4] = {};
    for (int k = 0; k < 4; ++k) {
      high[k] = vcvtnq_s32_f32(vmulq_n_f32(values.val[k], inverse));
      if (out.low != nullptr) {
        const int32x4_t rounded = high[k];
        high[k] = vshrq_n_s32(vaddq_s32(rounded, vdupq_n_s32(128)), kInputShift);
        low[k] = vsubq_s32(rounded, vshlq_n_s32(high[k], kInputShift));
        low_total = vaddq_s32(low_total, low[k]);
      }
      total = vaddq_s32(total, high[k]);
    }
    store_bytes(high, out.q + i);
    if (out.low != nullptr) store_bytes(low, out.low + i);
  }
  *out.scale = std::ldexp(1.0f, e);
  *out.sum = vaddvq_s32(total);
  if (out.low != nullptr) *out.low_sum = vaddvq_s32(low_total);
}

}  // namespace taper::neon
