// Rows in and out of the Anda format: a mask of 64 bytes is a word of a plane.
#include "kernels/common/anda.hpp"

#include <immintrin.h>

#include "kernels/avx512/avx512.hpp"
#include "kernels/avx512/vec16.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::avx512 {
namespace {

struct MasksWord {
  static uint32_t largest(const float* x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    if (i < n) {
      const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1);
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(rest, x + i), magnitude));
    }
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
  }

  static uint32_t largest(const uint16_t* x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) most = _mm512_max_epi16(most, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    if (i < n) {
      const __mmask32 rest = static_cast<__mmask32>((uint64_t{1} << (n - i)) - 1);
      most = _mm512_max_epi16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(rest, x + i), magnitude));
    }
    const __m512i pairs =
        _mm512_max_epi32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(pairs));
  }

  static __m512 power(const lanes::OnePower& p, int64_t) { return _mm512_set1_ps(p.value); }
  static __m512 power(const lanes::Powers& p, int64_t i) { return _mm512_loadu_ps(p.values + i); }

  // Words of 16 bits in the order of packs, `kHigh` byte of each, in the order of values: a byte a value.
  template <bool kHigh>
  TAPER_INLINE static __m512i bytes(__m512i first, __m512i second) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto byte = [](__m512i v) TAPER_INLINE {
      return kHigh ? _mm512_srli_epi16(v, 8) : _mm512_and_si512(v, _mm512_set1_epi16(0xff));
    };
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(byte(first), byte(second)));
  }

  // The upper `count` bits of each byte, uppermost first.
  TAPER_INLINE static void put(__m512i bytes, int count, uint64_t* words) {
    for (int j = 0; j < count; ++j) {
      words[j * kAndaWordsAtAddress] = _cvtmask64_u64(_mm512_movepi8_mask(bytes));
      bytes = _mm512_add_epi8(bytes, bytes);
    }
  }

  template <class T, class P>
  TAPER_INLINE static void pack(const T* x, int64_t count, const P& factors, int magnitude_bits, bool truncate,
                                uint64_t* words) {
    // The limit comes before the rounding, which leaves a whole number what it is.
    const __m512 limit = _mm512_set1_ps(static_cast<float>((1 << magnitude_bits) - 1));
    __m512i m[4];
    uint64_t signs = 0;
    unroll<4>([&](auto k) TAPER_INLINE {
      constexpr int64_t kFirst = 16 * k;
      const __m512 v = count >= kFirst + 16 ? Vec16::load(x + kFirst)
                       : count > kFirst     ? Vec16::load_first(x + kFirst, count - kFirst)
                                            : _mm512_setzero_ps();
      signs |= static_cast<uint64_t>(_mm512_movepi32_mask(_mm512_castps_si512(v))) << kFirst;
      const __m512 scaled = _mm512_min_ps(_mm512_mul_ps(_mm512_abs_ps(v), power(factors, kFirst)), limit);
      m[k] = truncate ? _mm512_cvttps_epi32(scaled) : _mm512_cvtps_epi32(scaled);
    });
    const __m128i to_top = _mm_cvtsi32_si128(16 - magnitude_bits);
    const __m512i first = _mm512_sll_epi16(_mm512_packus_epi32(m[0], m[1]), to_top);
    const __m512i second = _mm512_sll_epi16(_mm512_packus_epi32(m[2], m[3]), to_top);
    words[0] = signs;
    put(bytes<true>(first, second), magnitude_bits < 8 ? magnitude_bits : 8, words + kAndaWordsAtAddress);
    if (magnitude_bits > 8) put(bytes<false>(first, second), magnitude_bits - 8, words + 9 * kAndaWordsAtAddress);
  }

  // `count` planes as bytes, the last at bit 0.
  TAPER_INLINE static __m512i get(const uint64_t* words, int count) {
    __m512i found = _mm512_setzero_si512(), bit = _mm512_set1_epi8(static_cast<char>(1u << (count - 1)));
    for (int j = 0; j < count; ++j) {
      found = _mm512_mask_add_epi8(found, _cvtu64_mask64(words[j * kAndaWordsAtAddress]), found, bit);
      bit = _mm512_srli_epi16(bit, 1);
    }
    return found;
  }

  template <class T, class P>
  TAPER_INLINE static void unpack(const uint64_t* words, int bits, const P& units, int64_t count, T* x) {
    const int more = bits > 8 ? bits - 8 : 0;
    const __m512i high = get(words + kAndaWordsAtAddress, bits - more);
    const __m512i low = more == 0 ? high : get(words + 9 * kAndaWordsAtAddress, more);
    const __m128i shift = _mm_cvtsi32_si128(more);
    const uint64_t signs = words[0];
    unroll<4>([&](auto k) TAPER_INLINE {
      constexpr int64_t kFirst = 16 * k;
      __m512i m = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(high, k));
      if (more != 0) {
        m = _mm512_or_si512(_mm512_sll_epi32(m, shift), _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(low, k)));
      }
      const __m512i value = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(m), power(units, kFirst)));
      const __m512 found = _mm512_castsi512_ps(_mm512_mask_xor_epi32(
          value, static_cast<__mmask16>(signs >> kFirst), value, _mm512_set1_epi32(static_cast<int>(0x80000000u))));
      if (count >= kFirst + 16) {
        Vec16::store(x + kFirst, found);
      } else if (count > kFirst) {
        Vec16::store_first(x + kFirst, found, count - kFirst);
      }
    });
  }
};

}  // namespace

bool anda_exponents(const void* x, const AndaRow& row, uint8_t* exponents) {
  return lanes::anda_exponents<MasksWord>(x, row, exponents);
}

void anda_pack(const void* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words) {
  lanes::anda_pack<MasksWord>(x, row, exponents, truncate, words);
}

void anda_unpack(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, void* x) {
  lanes::anda_unpack<MasksWord>(words, row, exponents, bits, x);
}

}  // namespace taper::avx512
