// Sixteen int32 sums and 64 bytes; kernels/common/planes_attention.hpp is written over this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/avx2/vec16.hpp"
#include "kernels/common/planes_bits.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::avx2 {

struct Ints {
  struct Pair {
    __m256i lo, hi;
  };
  using Bytes = Pair;
  using Sums = Pair;
  static constexpr int kSums = 8;

  static Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static int32_t sum_of(const int8_t*, int64_t) { return 0; }  // products are signed here
  static Sums start(int32_t) { return zero(); }
  static Bytes load_keys(const int8_t* p) {
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static Bytes load_values(const int8_t* p) { return load_keys(p); }
  static Sums key_dot(Sums sums, Bytes keys, int32_t four) {
    const __m256i q = _mm256_set1_epi32(four);
    return {add_products(sums.lo, _mm256_abs_epi8(keys.lo), _mm256_sign_epi8(q, keys.lo)),
            add_products(sums.hi, _mm256_abs_epi8(keys.hi), _mm256_sign_epi8(q, keys.hi))};
  }
  static Sums value_dot(Sums sums, Bytes values, int32_t four) {
    const __m256i p = _mm256_set1_epi32(four);
    return {add_products(sums.lo, p, values.lo), add_products(sums.hi, p, values.hi)};
  }
  static Vec16::F to_float(Sums sums) { return {_mm256_cvtepi32_ps(sums.lo), _mm256_cvtepi32_ps(sums.hi)}; }

  static void to_bytes(Vec16::F x, int8_t* q) {
    alignas(32) int32_t v[16];
    round(x, v);
    for (int l = 0; l < 16; ++l) q[l] = static_cast<int8_t>(v[l]);
  }
  static void to_block(const Vec16::F* x, int8_t* q) {
    unroll<4>([&](auto i) TAPER_INLINE { to_bytes(x[i], q + 16 * i); });
  }
  static void exponents(const uint8_t* words, uint8_t* out) { unpack_exponents(words, out); }

  template <int kPlanes, bool kHalf, bool kKeys>
  static void unpack(const uint8_t* const* planes, int64_t at, int8_t* out) {
    unroll<2>([&](auto h) TAPER_INLINE { unpack_half<kPlanes, kHalf>(planes, at + 32 * h, out + 32 * h); });
  }

 private:
  static void round(Vec16::F x, int32_t* v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(v), _mm256_cvtps_epi32(x.lo));
    _mm256_store_si256(reinterpret_cast<__m256i*>(v + 8), _mm256_cvtps_epi32(x.hi));
  }

  // Four products are at most 2 * 127 * 127 a pair, which int16 holds.
  static __m256i add_products(__m256i sums, __m256i not_negative, __m256i any) {
    const __m256i pairs = _mm256_maddubs_epi16(not_negative, any);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  // Half of each word of a line, as in avx512/ints.hpp; the matrices' least significant plane comes first.
  template <int kPlanes, bool kHalf>
  static void unpack_half(const uint8_t* const* planes, int64_t at, int8_t* out) {
    __m256i p[8];
    unroll<8>([&](auto i) TAPER_INLINE { p[i] = _mm256_setzero_si256(); });
    p[7] = load(planes[0] + at);
    constexpr int kLast = kPlanes - 1 + (kHalf ? 1 : 0);
    unroll<kPlanes>([&](auto j) TAPER_INLINE { p[kLast - j] = load(planes[1 + j] + at); });
    __m256i pairs[8], quads[8];
    unroll<4>([&](auto i) TAPER_INLINE {
      pairs[2 * i] = _mm256_unpacklo_epi8(p[2 * i], p[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_epi8(p[2 * i], p[2 * i + 1]);
    });
    unroll<4>([&](auto n) TAPER_INLINE {
      constexpr int i = n / 2, k = n % 2;
      quads[4 * i + 2 * k] = _mm256_unpacklo_epi16(pairs[4 * i + k], pairs[4 * i + 2 + k]);
      quads[4 * i + 2 * k + 1] = _mm256_unpackhi_epi16(pairs[4 * i + k], pairs[4 * i + 2 + k]);
    });
    unroll<4>([&](auto k) TAPER_INLINE {
      store<kHalf>(_mm256_unpacklo_epi32(quads[k], quads[4 + k]), out + 128 * k);
      store<kHalf>(_mm256_unpackhi_epi32(quads[k], quads[4 + k]), out + 128 * k + 64);
    });
  }

  static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

  // One step of the transpose of 8 x 8 bits: exchanges blocks that lie kShift bits apart.
  template <int kShift>
  static __m256i exchange(__m256i x, uint64_t mask) {
    const __m256i moved = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, kShift)),
                                           _mm256_set1_epi64x(static_cast<int64_t>(mask)));
    return _mm256_xor_si256(_mm256_xor_si256(x, moved), _mm256_slli_epi64(moved, kShift));
  }

  template <bool kHalf>
  static void store(__m256i matrices, int8_t* out) {
    __m256i v = exchange<7>(matrices, kTransposeBits);
    v = exchange<28>(exchange<14>(v, kTransposePairs), kTransposeNibbles);
    __m256i magnitude = _mm256_and_si256(v, _mm256_set1_epi8(127));
    if (kHalf) magnitude = _mm256_or_si256(magnitude, _mm256_set1_epi8(1));
    const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), v);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out),
                       _mm256_sub_epi8(_mm256_xor_si256(magnitude, negative), negative));
  }
};

}  // namespace taper::avx2
