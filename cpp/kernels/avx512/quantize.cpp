// A row of floats to int8 with one power-of-two scale (docs/numerics.md, "Activations").
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/common/exponent.hpp"

namespace taper::avx512 {
namespace {

__mmask16 lanes(int64_t n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << n) - 1); }

// max |x| by its bits: as integers finite < infinity < NaN, so nothing is lost on the way.
float max_magnitude(const float* x, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(n - i), x + i));
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

}  // namespace

void quantize(const float* x, int64_t n, int64_t cols, int magnitude_bits, const QuantizedRow& out) {
  const float a = max_magnitude(x, n);
  if (a == 0 || !std::isfinite(a)) return fill_zeros(cols, a == 0 ? 1 : std::numeric_limits<float>::quiet_NaN(), out);
  const int e = choose_exponent(a, magnitude_bits);
  const __m512 inverse = _mm512_set1_ps(std::ldexp(1.0f, -e));
  __m512i total = _mm512_setzero_si512(), low_total = _mm512_setzero_si512();
  for (int64_t i = 0; i < cols; i += 16) {  // cols is a multiple of 64; lanes past n are zero
    const __mmask16 mask = i < n ? lanes(n - i) : __mmask16{0};
    __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
    if (out.low != nullptr) {
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(values, _mm512_set1_epi32(128)), kInputShift);
      const __m512i low = _mm512_sub_epi32(values, _mm512_slli_epi32(high, kInputShift));
      low_total = _mm512_add_epi32(low_total, low);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out.low + i), _mm512_cvtepi32_epi8(low));
      values = high;
    }
    total = _mm512_add_epi32(total, values);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out.q + i), _mm512_cvtepi32_epi8(values));
  }
  *out.scale = std::ldexp(1.0f, e);
  *out.sum = _mm512_reduce_add_epi32(total);
  if (out.low != nullptr) *out.low_sum = _mm512_reduce_add_epi32(low_total);
}

}  // namespace taper::avx512
