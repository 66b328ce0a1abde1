// Sixteen floats in one register; kernels/common/lanes.hpp is written over this.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace taper::avx512 {

struct Vec16 {
  using F = __m512;
  static constexpr int kLevels = 4;  // 2^kLevels vectors of a rotation stay in registers
  static constexpr int kHeads = 8;   // query heads that share a converted key or value, and
  static constexpr int kSums = 16;   // registers of sums beside them

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // The first n < 16 elements, zeros after them.
  static F load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static F load_first(const uint16_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_first(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static void store_first(uint16_t* p, F x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // a > b ? a : b
  static F min(F a, F b) { return _mm512_min_ps(a, b); }  // a < b ? a : b
  static F rint(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }  // without NaN
  // Four such numbers, of x[0] .. x[3].
  static void largest_of_four(const F* x, float* out) {
    const F a = max(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const F b = max(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const F four = max(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
  }
  static bool all_zero(F x) { return _mm512_cmp_ps_mask(x, zero(), _CMP_NEQ_UQ) == 0; }  // NaN is not
  static F zero_where_less(F x, F limit, F y) {                                          // x < limit ? 0 : y
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
  }
  static F scaled(F x, F n) { return _mm512_scalef_ps(x, n); }  // x * 2^n

  // (a, b) -> (a + b, a - b) on lanes that are S apart.
  template <int S>
  static F butterfly(F x) {
    constexpr int upper = S == 1 ? 0xaaaa : S == 2 ? 0xcccc : S == 4 ? 0xf0f0 : 0xff00;
    F swapped;
    if constexpr (S == 1) swapped = _mm512_permute_ps(x, 0xb1);
    if constexpr (S == 2) swapped = _mm512_permute_ps(x, 0x4e);
    if constexpr (S == 4) swapped = _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (S == 8) swapped = _mm512_shuffle_f32x4(x, x, 0x4e);
    // swapped + x or swapped - x: the product with 1 or -1 is exact, so this rounds as the sum does.
    return _mm512_fmadd_ps(x, _mm512_mask_blend_ps(upper, _mm512_set1_ps(1), _mm512_set1_ps(-1)), swapped);
  }

  static float tree(F x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace taper::avx512
