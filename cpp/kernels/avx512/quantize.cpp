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

void quantize(const float* x, int64_t n, int64_t cols, int magnitude_bits, int8_t* q, float* scale, int32_t* sum) {
  const float a = max_magnitude(x, n);
  if (a == 0 || !std::isfinite(a)) {
    std::memset(q, 0, static_cast<size_t>(cols));
    *scale = a == 0 ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    *sum = 0;
    return;
  }
  const int e = choose_exponent(a, magnitude_bits);
  const __m512 inverse = _mm512_set1_ps(std::ldexp(1.0f, -e));
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
    total = _mm512_add_epi32(total, values);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(values));
  }
  std::memset(q + n, 0, static_cast<size_t>(cols - n));
  *scale = std::ldexp(1.0f, e);
  *sum = _mm512_reduce_add_epi32(total);
}

}  // namespace taper::avx512
