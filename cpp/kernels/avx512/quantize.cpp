// A row of floats to int8 with one power-of-two scale (docs/numerics.md, "Activations"), 64 columns at a time.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/common/exponent.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::avx512 {
namespace {

constexpr int kVectors = 4;  // of 16 floats: 64 columns

// Sixteen floats from column i of n on, zeros past the end.
TAPER_INLINE inline __m512 load(const float* x, int64_t i, int64_t n) {
  if (i + 16 <= n) return _mm512_loadu_ps(x + i);
  return i < n ? _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << (n - i)) - 1), x + i) : _mm512_setzero_ps();
}

// max |x| by its bits: as integers finite < infinity < NaN, so nothing is lost on the way.
float max_magnitude(const float* x, int64_t n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most[kVectors] = {};
  for (int64_t i = 0; i < n; i += 16 * kVectors) {
    unroll<kVectors>([&](auto k) TAPER_INLINE {
      const __m512i bits = _mm512_castps_si512(load(x, i + 16 * k, n));
      most[k] = _mm512_max_epi32(most[k], _mm512_and_si512(bits, magnitude));
    });
  }
  const int32_t bits =
      _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3])));
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

// Rounded integers of 64 columns as int16: first [0..15, 32..47] and so on, in an order that bytes() puts right.
struct Words {
  __m512i low, high;
};

TAPER_INLINE inline Words round(const float* x, int64_t i, int64_t n, __m512 inverse) {
  __m512i v[kVectors];
  unroll<kVectors>([&](auto k)
                       TAPER_INLINE { v[k] = _mm512_cvtps_epi32(_mm512_mul_ps(load(x, i + 16 * k, n), inverse)); });
  return {_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3])};
}

// Both packs work within 128 bits: there lie four columns of each of the four vectors.
TAPER_INLINE inline __m512i bytes(const Words& words) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words.low, words.high));
}

// Stores 64 columns and adds them to the sum.
TAPER_INLINE inline __m512i store(int8_t* out, __m512i values, __m512i sum) {
  _mm512_storeu_si512(out, values);
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), values);
}

__m512i high_part(__m512i words) {
  return _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(1 << (kInputShift - 1))), kInputShift);
}

}  // namespace

void quantize(const float* x, int64_t n, int64_t cols, int magnitude_bits, const QuantizedRow& out) {
  const float a = max_magnitude(x, n);
  if (a == 0 || !std::isfinite(a)) return fill_zeros(cols, a == 0 ? 1 : std::numeric_limits<float>::quiet_NaN(), out);
  const int e = choose_exponent(a, magnitude_bits);
  const __m512 inverse = _mm512_set1_ps(std::ldexp(1.0f, -e));
  __m512i total = _mm512_setzero_si512(), low_total = _mm512_setzero_si512();
  for (int64_t i = 0; i < cols; i += 16 * kVectors) {  // cols is a multiple of 64
    const Words words = round(x, i, n, inverse);
    if (out.low == nullptr) {
      total = store(out.q + i, bytes(words), total);
      continue;
    }
    const Words high{high_part(words.low), high_part(words.high)};
    const Words low{_mm512_sub_epi16(words.low, _mm512_slli_epi16(high.low, kInputShift)),
                    _mm512_sub_epi16(words.high, _mm512_slli_epi16(high.high, kInputShift))};
    total = store(out.q + i, bytes(high), total);
    low_total = store(out.low + i, bytes(low), low_total);
  }
  *out.scale = std::ldexp(1.0f, e);
  *out.sum = _mm512_reduce_add_epi32(total);
  if (out.low != nullptr) *out.low_sum = _mm512_reduce_add_epi32(low_total);
}

}  // namespace taper::avx512
