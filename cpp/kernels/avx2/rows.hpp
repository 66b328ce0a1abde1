// Four output rows at a time: their horizontal sums share the shuffles, and a block of 128 or 64 columns of four rows
// fills two registers or one.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels/common/unroll.hpp"
#include "taper/kernels.hpp"

namespace taper::avx2 {

inline constexpr int kRows = 4;

TAPER_INLINE inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TAPER_INLINE inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
TAPER_INLINE inline int64_t load_64(const void* p) {
  return _mm_cvtsi128_si64(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}

// Lanes of rows a, b: 8 + 8 -> [a: 4 | b: 4].
TAPER_INLINE inline __m256i fold_pair(__m256i a, __m256i b) {
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// [a: 4 | b: 4], [c: 4 | d: 4] -> [a: 2 | c: 2 | b: 2 | d: 2].
TAPER_INLINE inline __m256i fold_quad(__m256i ab, __m256i cd) {
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

// [a: 2 | c: 2 | b: 2 | d: 2] -> [a | b | c | d].
TAPER_INLINE inline __m128i fold_last(__m256i acbd) {
  const __m256i sums = _mm256_add_epi32(acbd, _mm256_srli_epi64(acbd, 32));
  return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6)));
}

// Exact sums as floats become output values of rows row .. row + count - 1 (count <= kRows).
inline void store_floats(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                         int count, __m128 acc) {
  const __m128i mask = _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3));
  const __m128 alpha = _mm_set1_ps(x.scale[token] * w.level_scale);
  const __m128 scale = _mm_mul_ps(_mm_maskload_ps(w.row_scale + row, mask), alpha);
  __m128 out = _mm_mul_ps(acc, scale);
  if (w.bias != nullptr) out = _mm_add_ps(out, _mm_maskload_ps(w.bias + row, mask));
  const int64_t at = y.at(token, row);
  if (y.residual != nullptr) out = _mm_add_ps(_mm_maskload_ps(y.residual + at, mask), out);
  _mm_maskstore_ps(y.out + at, mask, out);
}

inline void store_rows(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                       int count, __m128i sums) {
  store_floats(w, x, y, token, row, count, _mm_cvtepi32_ps(sums));
}

// The same for wide values or activations: high[i] and low[i] are the sums of the table's and of the low table's values
// with part i of the activations, high first. What the view lacks is not read.
inline void store_parts(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                        int count, const __m128i* high, const __m128i* low) {
  const auto join = [&](const __m128i* parts) {
    const __m256i first = _mm256_cvtepi32_epi64(parts[0]);
    if (x.low == nullptr) return first;
    return _mm256_add_epi64(_mm256_slli_epi64(first, kInputShift), _mm256_cvtepi32_epi64(parts[1]));
  };
  __m256i acc = join(high);
  if (w.low_table != nullptr) acc = _mm256_add_epi64(_mm256_slli_epi64(acc, kValueShift), join(low));
  alignas(32) int64_t sums[kRows];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums), acc);
  store_floats(w, x, y, token, row, count,
               _mm_setr_ps(static_cast<float>(sums[0]), static_cast<float>(sums[1]), static_cast<float>(sums[2]),
                           static_cast<float>(sums[3])));
}

}  // namespace taper::avx2
