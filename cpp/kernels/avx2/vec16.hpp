// Sixteen floats in two registers; kernels/common/lanes.hpp is written over this.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace taper::avx2 {

struct Vec16 {
  struct F {
    __m256 lo, hi;
  };
  static constexpr int kLevels = 2;  // 2^kLevels vectors of a rotation stay in registers
  static constexpr int kHeads = 4;   // query heads that share a converted key or value, and
  static constexpr int kSums = 6;    // pairs of registers of sums beside them

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F load(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static void store(float* p, F x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
  }
  static void store(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT));
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

  static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
  static F fnma(F a, F b, F c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }
  static F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }  // a > b ? a : b
  static F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }  // a < b ? a : b
  static F rint(F a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
  }
  static F abs(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
  }
  static float largest(F x) {  // without NaN
    const __m256 eight = _mm256_max_ps(x.lo, x.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static void largest_of_four(const F* x, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = largest(x[i]);
  }
  static bool all_zero(F x) {  // NaN is not
    const __m256 none = _mm256_setzero_ps();
    return _mm256_movemask_ps(
               _mm256_or_ps(_mm256_cmp_ps(x.lo, none, _CMP_NEQ_UQ), _mm256_cmp_ps(x.hi, none, _CMP_NEQ_UQ))) == 0;
  }
  static F floor(F a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
  static F zero_where_less(F x, F limit, F y) {  // x < limit ? 0 : y
    return {_mm256_and_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ), y.lo),
            _mm256_and_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ), y.hi)};
  }
  static F power_of_two(F n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }

  static F scaled(F x, F n) { return mul(x, power_of_two(n)); }  // x * 2^n

  // (a, b) -> (a + b, a - b) on lanes that are S apart.
  template <int S>
  static F butterfly(F x) {
    if constexpr (S == 8) return {_mm256_add_ps(x.lo, x.hi), _mm256_sub_ps(x.lo, x.hi)};
    if constexpr (S < 8) return {butterfly8<S>(x.lo), butterfly8<S>(x.hi)};
  }

  static float tree(F x) {
    const __m256 eight = _mm256_add_ps(x.lo, x.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

 private:
  static __m256 power_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }

  template <int S>
  static __m256 butterfly8(__m256 x) {
    constexpr int upper = S == 1 ? 0xaa : S == 2 ? 0xcc : 0xf0;
    __m256 swapped;
    if constexpr (S == 1) swapped = _mm256_permute_ps(x, 0xb1);
    if constexpr (S == 2) swapped = _mm256_permute_ps(x, 0x4e);
    if constexpr (S == 4) swapped = _mm256_permute2f128_ps(x, x, 0x01);
    return _mm256_blend_ps(_mm256_add_ps(x, swapped), _mm256_sub_ps(swapped, x), upper);
  }
};

}  // namespace taper::avx2
