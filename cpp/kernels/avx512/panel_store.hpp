// What matrix kernels do with the sums of sixteen rows and one token.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "taper/kernels.hpp"

namespace taper::avx512 {

inline int parts_of(const PlanesView& w) { return w.low_table == nullptr ? 1 : 2; }
inline int parts_of(const ActivationsView& x) { return x.low == nullptr ? 1 : 2; }

// Sums of sixteen rows, by part of the values and of the activations, high first. What a view lacks is not read.
struct PartSums {
  const int32_t* at[2][2];
};

// Eight rows of wide values or activations, from `lane`: exact sums, rounded once.
inline __m256 join_parts(const PlanesView& w, const ActivationsView& x, const PartSums& sums, int lane) {
  const auto load = [&](const int32_t* part) {
    return _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(part + lane)));
  };
  const auto join = [&](const int32_t* const* parts) {
    const __m512i high = load(parts[0]);
    return x.low == nullptr ? high : _mm512_add_epi64(_mm512_slli_epi64(high, kInputShift), load(parts[1]));
  };
  __m512i acc = join(sums.at[0]);
  if (w.low_table != nullptr) acc = _mm512_add_epi64(_mm512_slli_epi64(acc, kValueShift), join(sums.at[1]));
  return _mm512_cvtepi64_ps(acc);
}

// Output values of one token and the rows row .. row + count - 1 (count <= 16).
inline void store_panel(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                        int64_t count, const PartSums& sums) {
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  __m512 acc;
  if (w.low_table == nullptr && x.low == nullptr) {
    acc = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums.at[0][0]));
  } else {
    acc = _mm512_castps256_ps512(join_parts(w, x, sums, 0));
    acc = _mm512_insertf32x8(acc, join_parts(w, x, sums, 8), 1);
  }
  const __m512 alpha = _mm512_set1_ps(x.scale[token] * w.level_scale);
  __m512 out = _mm512_mul_ps(acc, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, w.row_scale + row), alpha));
  if (w.bias != nullptr) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(mask, w.bias + row));
  const int64_t at = y.at(token, row);
  if (y.residual != nullptr) out = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y.residual + at), out);
  _mm512_mask_storeu_ps(y.out + at, mask, out);
}

}  // namespace taper::avx512
