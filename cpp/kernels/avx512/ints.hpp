// Sixteen int32 sums and 64 bytes; kernels/common/planes_attention.hpp is written over this.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/common/unroll.hpp"

namespace taper::avx512 {

struct Ints {
  using Bytes = __m512i;
  using Sums = __m512i;
  static constexpr int kSums = 16;  // registers of sums

  static Sums zero() { return _mm512_setzero_si512(); }
  static int32_t sum_of(const int8_t* q, int64_t n) {
    const __mmask64 there = n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
    return _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(zero(), _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(there, q)));
  }
  // Keys go in as k + 128: vpdpbusd multiplies unsigned with signed bytes.
  static Sums start(int32_t sum_of_q) { return _mm512_set1_epi32(-128 * sum_of_q); }
  static Bytes load_keys(const int8_t* p) { return _mm512_xor_si512(_mm512_load_si512(p), _mm512_set1_epi8(-128)); }
  static Bytes load_values(const int8_t* p) { return _mm512_load_si512(p); }
  static Sums key_dot(Sums sums, Bytes keys, int32_t four) { return add_products(sums, keys, _mm512_set1_epi32(four)); }
  static Sums value_dot(Sums sums, Bytes values, int32_t four) {
    return add_products(sums, _mm512_set1_epi32(four), values);
  }
  static __m512 to_float(Sums sums) { return _mm512_cvtepi32_ps(sums); }

  static void to_bytes(__m512 x, int8_t* q) {
    const __m512i v = _mm512_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(v));
  }
  static void exponents(const uint8_t* words, uint8_t* out) {
    __m512i e = _mm512_setzero_si512();
    unroll<5>([&](auto j) TAPER_INLINE {
      uint64_t word;
      std::memcpy(&word, words + 8 * j, sizeof word);
      e = _mm512_mask_add_epi8(e, _cvtu64_mask64(word), e, _mm512_set1_epi8(16 >> j));
    });
    _mm512_store_si512(out, e);
  }

  // Planes interleaved byte by byte give eight bytes, one a plane, for each eight values; gf2p8affineqb with such a
  // matrix and the unit vectors is its transpose, and its constant sets the half.
  template <int kPlanes, bool kHalf>
  static void unpack(const uint8_t* const* planes, int64_t at, int8_t* out) {
    __m512i p[8];
    unroll<8>([&](auto i) TAPER_INLINE { p[i] = _mm512_setzero_si512(); });
    p[0] = _mm512_loadu_si512(planes[0] + at);
    constexpr int kFirst = 8 - kPlanes - (kHalf ? 1 : 0);
    unroll<kPlanes>([&](auto j) TAPER_INLINE { p[kFirst + j] = _mm512_loadu_si512(planes[1 + j] + at); });
    __m512i pairs[8], quads[8];
    unroll<4>([&](auto i) TAPER_INLINE {
      pairs[2 * i] = _mm512_unpacklo_epi8(p[2 * i], p[2 * i + 1]);
      pairs[2 * i + 1] = _mm512_unpackhi_epi8(p[2 * i], p[2 * i + 1]);
    });
    // quads[4 i + k]: planes 4 i .. 4 i + 3, positions 4 k .. 4 k + 3 of each sixteen
    unroll<4>([&](auto n) TAPER_INLINE {
      constexpr int i = n / 2, k = n % 2;
      quads[4 * i + 2 * k] = _mm512_unpacklo_epi16(pairs[4 * i + k], pairs[4 * i + 2 + k]);
      quads[4 * i + 2 * k + 1] = _mm512_unpackhi_epi16(pairs[4 * i + k], pairs[4 * i + 2 + k]);
    });
    unroll<4>([&](auto k) TAPER_INLINE {
      store<kHalf>(_mm512_unpacklo_epi32(quads[k], quads[4 + k]), out + 128 * k);
      store<kHalf>(_mm512_unpackhi_epi32(quads[k], quads[4 + k]), out + 128 * k + 64);
    });
  }

 private:
  // As assembly, whose sums are one register read and written: GCC 12 copies those of the intrinsic to another register
  // and back, two moves a product, and spills some. Keys take 10.5 instead of 11.5 ticks an entry, values 13.6 of 14.8.
  static Sums add_products(Sums sums, __m512i unsigned_bytes, __m512i bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(bytes));
    return sums;
  }

  template <bool kHalf>
  static void store(__m512i matrices, int8_t* out) {
    const __m512i units = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
    const __m512i v = _mm512_gf2p8affine_epi64_epi8(units, matrices, kHalf ? 1 : 0);
    const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi8(127));
    _mm512_store_si512(out, _mm512_mask_sub_epi8(magnitude, _mm512_movepi8_mask(v), _mm512_setzero_si512(), magnitude));
  }
};

}  // namespace taper::avx512
