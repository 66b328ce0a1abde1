// Rows in and out of the Anda format: a comparison of 32 values with a bit is half a word of its plane.
#include <immintrin.h>

#include "kernels/avx512/avx512.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::avx512 {
namespace {

__mmask16 there(int64_t count, int64_t first) {
  const int64_t left = count - first;
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

// Of sixteen values; their signs are added to `signs`.
__m512i magnitudes(const float* x, int64_t count, const float* factors, __m512 limit, bool truncate, int64_t i,
                   uint64_t* signs) {
  const __m512 v = _mm512_maskz_loadu_ps(there(count, i), x + i);
  *signs |= static_cast<uint64_t>(_mm512_movepi32_mask(_mm512_castps_si512(v))) << i;
  const __m512 scaled = _mm512_min_ps(_mm512_mul_ps(_mm512_abs_ps(v), _mm512_loadu_ps(factors + i)), limit);
  return truncate ? _mm512_cvttps_epi32(scaled) : _mm512_cvtps_epi32(scaled);
}

// 32 values as int16, in order.
__m512i words_of(__m512i first, __m512i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)), _mm512_cvtepi32_epi16(second), 1);
}

}  // namespace

void anda_pack(const float* x, int64_t count, const float* factors, int magnitude_bits, bool truncate,
               uint64_t* words) {
  // The limit comes before the rounding, which leaves a whole number what it is.
  const __m512 limit = _mm512_set1_ps(static_cast<float>((1 << magnitude_bits) - 1));
  uint64_t signs = 0;
  __m512i m[4];
  unroll<4>([&](auto i) TAPER_INLINE { m[i] = magnitudes(x, count, factors, limit, truncate, 16 * i, &signs); });
  const __m512i low = words_of(m[0], m[1]), high = words_of(m[2], m[3]);
  words[0] = signs;
  for (int j = 0; j < magnitude_bits; ++j) {
    const __m512i bit = _mm512_set1_epi16(static_cast<short>(1u << (magnitude_bits - 1 - j)));
    words[1 + j] = static_cast<uint64_t>(_mm512_test_epi16_mask(high, bit)) << 32 | _mm512_test_epi16_mask(low, bit);
  }
}

void anda_unpack(const uint64_t* words, int magnitude_bits, const float* units, int64_t count, float* x) {
  __m512i half[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int j = 0; j < magnitude_bits; ++j) {
    const __m512i bit = _mm512_set1_epi16(static_cast<short>(1u << (magnitude_bits - 1 - j)));
    unroll<2>([&](auto h) TAPER_INLINE {
      half[h] = _mm512_mask_or_epi32(half[h], 0xffff, half[h],
                                     _mm512_maskz_mov_epi16(static_cast<__mmask32>(words[1 + j] >> 32 * h), bit));
    });
  }
  unroll<4>([&](auto i) TAPER_INLINE {
    const __m256i sixteen = _mm512_extracti64x4_epi64(half[i / 2], i % 2);
    const __m512 value =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(sixteen)), _mm512_loadu_ps(units + 16 * i));
    const __mmask16 negative = static_cast<__mmask16>(words[0] >> 16 * i);
    const __m512 sign = _mm512_castsi512_ps(_mm512_maskz_set1_epi32(negative, static_cast<int>(0x80000000u)));
    _mm512_mask_storeu_ps(x + 16 * i, there(count, 16 * i), _mm512_xor_ps(value, sign));
  });
}

uint32_t largest_bits(const float* x, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(there(n, i), x + i);
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
  }
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
}

}  // namespace taper::avx512
