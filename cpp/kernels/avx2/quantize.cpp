// A row of floats to int8 with one power-of-two scale (docs/numerics.md, "Activations").
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/common/exponent.hpp"

namespace taper::avx2 {
namespace {

// The first n of eight lanes (all where n >= 8).
__m256i first_lanes(int64_t n) {
  const int count = static_cast<int>(std::min<int64_t>(n, 8));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// max |x| by its bits: as integers finite < infinity < NaN, so nothing is lost on the way.
float max_magnitude(const float* x, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i most = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_maskload_ps(x + i, first_lanes(n - i)));
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) float lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
  // The order of the integers is the order of the floats except for NaN, which must win.
  float a = 0;
  for (float lane : lanes) a = lane > a || std::isnan(lane) ? lane : a;
  return a;
}

// Eight int32 lanes within int8.
void store_bytes(__m256i x, int8_t* out) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
}

// Four int32 lanes to their sum.
int32_t sum_lanes(__m256i x) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

}  // namespace

void quantize(const float* x, int64_t n, int64_t cols, int magnitude_bits, const QuantizedRow& out) {
  const float a = max_magnitude(x, n);
  if (a == 0 || !std::isfinite(a)) return fill_zeros(cols, a == 0 ? 1 : std::numeric_limits<float>::quiet_NaN(), out);
  const int e = choose_exponent(a, magnitude_bits);
  const __m256 inverse = _mm256_set1_ps(std::ldexp(1.0f, -e));
  __m256i total = _mm256_setzero_si256(), low_total = _mm256_setzero_si256();
  for (int64_t i = 0; i < cols; i += 8) {  // cols is a multiple of 64; lanes past n are zero
    const __m256 values = i < n ? _mm256_maskload_ps(x + i, first_lanes(n - i)) : _mm256_setzero_ps();
    __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
    if (out.low != nullptr) {
      const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(rounded, _mm256_set1_epi32(128)), kInputShift);
      const __m256i low = _mm256_sub_epi32(rounded, _mm256_slli_epi32(high, kInputShift));
      low_total = _mm256_add_epi32(low_total, low);
      store_bytes(low, out.low + i);
      rounded = high;
    }
    total = _mm256_add_epi32(total, rounded);
    store_bytes(rounded, out.q + i);
  }
  *out.scale = std::ldexp(1.0f, e);
  *out.sum = sum_lanes(total);
  if (out.low != nullptr) *out.low_sum = sum_lanes(low_total);
}

}  // namespace taper::avx2
