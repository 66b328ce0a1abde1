// Sixteen floats in four registers; kernels/common/lanes.hpp is written over this.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace taper::neon {

struct Vec16 {
  struct F {
    float32x4_t a, b, c, d;
  };
  static constexpr int kLevels = 2;  // 2^kLevels vectors of a rotation stay in registers
  static constexpr int kHeads = 4;   // query heads that share a converted key or value, and
  static constexpr int kSums = 4;    // sums of four registers beside them

  static F zero() { return set(0.0f); }
  static F set(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {v, v, v, v};
  }
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
  static F load(const uint16_t* p) {
    const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(p)), high = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
            vcvt_high_f32_f16(high)};
  }
  static void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
  }
  static void store(uint16_t* p, F x) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
    vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
  }
  // The first n < 16 elements, zeros after them; only the ends of odd shapes come here.
  template <class T>
  static F load_first(const T* p, int64_t n) {
    T padded[16] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  template <class T>
  static void store_first(T* p, F x, int64_t n) {
    T padded[16];
    store(padded, x);
    std::memcpy(p, padded, n * sizeof(T));
  }

  static F add(F x, F y) {
    return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
  }
  static F sub(F x, F y) {
    return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)};
  }
  static F mul(F x, F y) {
    return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
  }
  static F div(F x, F y) {
    return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)};
  }
  static F fma(F x, F y, F z) {  // x * y + z
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
  }
  static F fnma(F x, F y, F z) {  // z - x * y
    return {vfmsq_f32(z.a, x.a, y.a), vfmsq_f32(z.b, x.b, y.b), vfmsq_f32(z.c, x.c, y.c), vfmsq_f32(z.d, x.d, y.d)};
  }
  static F max(F x, F y) {  // x > y ? x : y
    return {larger(x.a, y.a), larger(x.b, y.b), larger(x.c, y.c), larger(x.d, y.d)};
  }
  static F min(F x, F y) {  // x < y ? x : y
    return {smaller(x.a, y.a), smaller(x.b, y.b), smaller(x.c, y.c), smaller(x.d, y.d)};
  }
  static F rint(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b), vrndnq_f32(x.c), vrndnq_f32(x.d)}; }
  static F abs(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)}; }
  static float largest(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }  // without NaN
  static void largest_of_four(const F* x, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = largest(x[i]);
  }
  static bool all_zero(F x) {  // NaN is not
    const uint32x4_t zeros =
        vandq_u32(vandq_u32(vceqzq_f32(x.a), vceqzq_f32(x.b)), vandq_u32(vceqzq_f32(x.c), vceqzq_f32(x.d)));
    return vminvq_u32(zeros) != 0;
  }
  static F floor(F x) { return {vrndmq_f32(x.a), vrndmq_f32(x.b), vrndmq_f32(x.c), vrndmq_f32(x.d)}; }
  static F zero_where_less(F x, F limit, F y) {  // x < limit ? 0 : y
    return {zero_where(vcltq_f32(x.a, limit.a), y.a), zero_where(vcltq_f32(x.b, limit.b), y.b),
            zero_where(vcltq_f32(x.c, limit.c), y.c), zero_where(vcltq_f32(x.d, limit.d), y.d)};
  }
  static F power_of_two(F n) { return {power_of_two(n.a), power_of_two(n.b), power_of_two(n.c), power_of_two(n.d)}; }

  static F scaled(F x, F n) { return mul(x, power_of_two(n)); }  // x * 2^n

  // (a, b) -> (a + b, a - b) on lanes that are S apart.
  template <int S>
  static F butterfly(F x) {
    if constexpr (S == 8) {
      return {vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d), vsubq_f32(x.a, x.c), vsubq_f32(x.b, x.d)};
    } else if constexpr (S == 4) {
      return {vaddq_f32(x.a, x.b), vsubq_f32(x.a, x.b), vaddq_f32(x.c, x.d), vsubq_f32(x.c, x.d)};
    } else {
      butterflies<S>(x.a, x.b);
      butterflies<S>(x.c, x.d);
      return x;
    }
  }

  static float tree(F x) {
    const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }

 private:
  static float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
  static float32x4_t smaller(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
  static float32x4_t zero_where(uint32x4_t mask, float32x4_t y) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), mask));
  }
  static float32x4_t power_of_two(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }

  // Two registers at a time: the first lanes of their pairs side by side, then the second ones.
  template <int S>
  static void butterflies(float32x4_t& x, float32x4_t& y) {
    const float32x4_t first = even<S>(x, y), second = odd<S>(x, y);
    const float32x4_t sum = vaddq_f32(first, second), difference = vsubq_f32(first, second);
    x = even<S>(sum, difference);
    y = odd<S>(sum, difference);
  }
  template <int S>
  static float32x4_t even(float32x4_t x, float32x4_t y) {
    if constexpr (S == 1) return vtrn1q_f32(x, y);
    return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
  }
  template <int S>
  static float32x4_t odd(float32x4_t x, float32x4_t y) {
    if constexpr (S == 1) return vtrn2q_f32(x, y);
    return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
  }
};

}  // namespace taper::neon
