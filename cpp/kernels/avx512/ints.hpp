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
  static Bytes load_keys(const int8_t* p) { return _mm512_load_si512(p); }
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
  static void to_block(const __m512* x, int8_t* q) {
    __m512i pairs[2];
    unroll<2>([&](auto i) TAPER_INLINE {
      pairs[i] = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2 * i]), _mm512_cvtps_epi32(x[2 * i + 1]));
    });
    const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_store_si512(q, _mm512_permutexvar_epi32(fours, _mm512_packs_epi16(pairs[0], pairs[1])));
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
  // matrix and the unit vectors is its transpose, and its constant sets the half, and of keys the bit of 128.
  template <int kPlanes, bool kHalf, bool kKeys>
  static void unpack(const uint8_t* const* planes, int64_t at, int8_t* out) {
    // With the half, -(2 m + 1) is 2 ~m + 1: planes with the sign's bits turned over are a two's complement.
    const __m512i signs = _mm512_loadu_si512(planes[0] + at);
    constexpr int kFirst = 8 - kPlanes - (kHalf ? 1 : 0);
    __m512i p[8] = {signs};
    unroll<7>([&](auto i) TAPER_INLINE {
      constexpr int j = i + 1 - kFirst;
      p[i + 1] = kHalf && j < 0 ? signs : _mm512_setzero_si512();
      if constexpr (j >= 0 && j < kPlanes) {
        const __m512i plane = _mm512_loadu_si512(planes[1 + j] + at);
        p[i + 1] = kHalf ? _mm512_xor_si512(plane, signs) : plane;
      }
    });
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
      store<kHalf, kKeys>(_mm512_unpacklo_epi32(quads[k], quads[4 + k]), out + 128 * k);
      store<kHalf, kKeys>(_mm512_unpackhi_epi32(quads[k], quads[4 + k]), out + 128 * k + 64);
    });
  }

 private:
  // As assembly, whose sums are one register read and written: GCC 12 copies those of the intrinsic to another register
  // and back, two moves a product, and spills some. Keys take 10.5 instead of 11.5 ticks an entry, values 13.6 of 14.8.
  static Sums add_products(Sums sums, __m512i unsigned_bytes, __m512i bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(bytes));
    return sums;
  }

  // Without a half: of values m or, where the sign is set, 128 + m, whose negative is 128 - (128 + m). Of keys 128 + m
  // or m, which becomes 128 - m.
  template <bool kHalf, bool kKeys>
  static void store(__m512i matrices, int8_t* out) {
    const __m512i units = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
    const __m512i v = _mm512_gf2p8affine_epi64_epi8(units, matrices, (kKeys ? 128 : 0) + (kHalf ? 1 : 0));
    if constexpr (kHalf) return _mm512_store_si512(out, v);
    const __mmask64 upper = _mm512_movepi8_mask(v), negative = kKeys ? _knot_mask64(upper) : upper;
    _mm512_store_si512(out, _mm512_mask_sub_epi8(v, negative, _mm512_set1_epi8(-128), v));
  }
};

}  // namespace taper::avx512
