// Sums of four output rows at a time become output values.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/common/unroll.hpp"
#include "taper/kernels.hpp"

namespace taper::neon {
namespace {  // neon_i8mm compiles its own

constexpr int kRows = 4;

// 16 bytes, or 8 and zeros.
template <int kCount>
TAPER_INLINE inline uint8x16_t load_bytes(const void* p) {
  const auto* bytes = static_cast<const uint8_t*>(p);
  if constexpr (kCount == 16) return vld1q_u8(bytes);
  return vcombine_u8(vld1_u8(bytes), vdup_n_u8(0));
}

template <int kCount>
TAPER_INLINE inline int8x16_t load_values(const int8_t* p) {
  return vreinterpretq_s8_u8(load_bytes<kCount>(p));
}

// Four lanes of each of four rows to [a | b | c | d].
TAPER_INLINE inline int32x4_t fold(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
  return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

// The first `count` of four floats, zeros after them.
inline float32x4_t load_floats(const float* p, int count) {
  if (count == kRows) return vld1q_f32(p);
  float padded[kRows] = {};
  std::memcpy(padded, p, count * sizeof(float));
  return vld1q_f32(padded);
}

// Four exact sums as floats. high[i] and low[i] are the sums of the table's and of the low table's values with part i
// of the activations, high first; what the views lack is not read. A wide sum is below 2^46: exact as a double, and
// rounded once from there.
inline float32x4_t join(const PlanesView& w, const ActivationsView& x, const int32x4_t* high, const int32x4_t* low) {
  if (w.low_table == nullptr && x.low == nullptr) return vcvtq_f32_s32(high[0]);
  const auto join_half = [&](auto widen) {
    const auto join_parts = [&](const int32x4_t* parts) {
      const int64x2_t first = widen(parts[0]);
      return x.low == nullptr ? first : vaddq_s64(vshlq_n_s64(first, kInputShift), widen(parts[1]));
    };
    int64x2_t acc = join_parts(high);
    if (w.low_table != nullptr) acc = vaddq_s64(vshlq_n_s64(acc, kValueShift), join_parts(low));
    return vcvtq_f64_s64(acc);
  };
  const float64x2_t first = join_half([](int32x4_t v) { return vmovl_s32(vget_low_s32(v)); });
  const float64x2_t second = join_half([](int32x4_t v) { return vmovl_high_s32(v); });
  return vcvt_high_f32_f64(vcvt_f32_f64(first), second);
}

// The sums of rows row .. row + count - 1 (count <= kRows) and one token become output values.
inline void store_rows(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                       int count, const int32x4_t* high, const int32x4_t* low) {
  const float alpha = x.scale[token] * w.level_scale;
  const int64_t at = y.at(token, row);
  float32x4_t out = vmulq_f32(join(w, x, high, low), vmulq_n_f32(load_floats(w.row_scale + row, count), alpha));
  if (w.bias != nullptr) out = vaddq_f32(out, load_floats(w.bias + row, count));
  if (y.residual != nullptr) out = vaddq_f32(load_floats(y.residual + at, count), out);
  if (count == kRows) return vst1q_f32(y.out + at, out);
  float values[kRows];
  vst1q_f32(values, out);
  std::memcpy(y.out + at, values, count * sizeof(float));
}

}  // namespace
}  // namespace taper::neon
