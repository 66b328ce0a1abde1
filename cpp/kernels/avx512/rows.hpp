// Four output rows at a time: their horizontal sums share the shuffles, and a block of 256, 128 or 64 columns of four
// rows fills two registers, one, or half of one.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels/common/unroll.hpp"
#include "taper/kernels.hpp"

namespace taper::avx512 {

inline constexpr int kRows = 4;

// Keeps a loaded value in its register: GCC would load it again for each of its uses, and 64-byte loads are fewer a
// cycle than vpdpbusd (1.3 against 2).
TAPER_INLINE inline __m512i in_register(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

// Lanes of rows a, b: 16 + 16 -> [a: 8 | b: 8].
inline __m512i fold_pair(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE));
}

// [a: 8 | b: 8], [c: 8 | d: 8] -> [a: 4 | b: 4 | c: 4 | d: 4].
inline __m512i fold_quad(__m512i ab, __m512i cd) {
  return _mm512_add_epi32(_mm512_shuffle_i64x2(ab, cd, 0x88), _mm512_shuffle_i64x2(ab, cd, 0xDD));
}

// [a: 4 | b: 4 | c: 4 | d: 4] -> [a: 2 | b: 2 | c: 2 | d: 2] in the lower half.
inline __m512i fold_halves(__m512i abcd) {
  const __m512i sums = _mm512_add_epi32(abcd, _mm512_shuffle_epi32(abcd, _MM_PERM_BADC));
  return _mm512_permutexvar_epi64(_mm512_set_epi64(0, 0, 0, 0, 6, 4, 2, 0), sums);
}

// [a: 2 | b: 2 | c: 2 | d: 2] in the lower half -> [a | b | c | d].
inline __m128i fold_last(__m512i abcd) {
  const __m256i lanes = _mm512_castsi512_si256(abcd);
  return _mm256_cvtepi64_epi32(_mm256_add_epi32(lanes, _mm256_srli_epi64(lanes, 32)));
}

// Exact sums as floats become output values of rows row .. row + count - 1 (count <= kRows).
inline void store_floats(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                         int count, __m128 acc) {
  const __mmask8 mask = static_cast<__mmask8>((1 << count) - 1);
  const __m128 alpha = _mm_set1_ps(x.scale[token] * w.level_scale);
  const __m128 scale = _mm_mul_ps(_mm_maskz_loadu_ps(mask, w.row_scale + row), alpha);
  __m128 out = _mm_mul_ps(acc, scale);
  if (w.bias != nullptr) out = _mm_add_ps(out, _mm_maskz_loadu_ps(mask, w.bias + row));
  const int64_t at = y.at(token, row);
  if (y.residual != nullptr) out = _mm_add_ps(_mm_maskz_loadu_ps(mask, y.residual + at), out);
  _mm_mask_storeu_ps(y.out + at, mask, out);
}

// Sums of u8 weights (w + 128) times activations that add up to `sum`, less what the 128 put in.
inline __m128i unflip(__m128i sums, int32_t sum) {
  return _mm_sub_epi32(sums, _mm_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(sum) * 128)));
}

inline void store_rows(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                       int count, __m128i sums) {
  store_floats(w, x, y, token, row, count, _mm_cvtepi32_ps(unflip(sums, x.sum[token])));
}

// The same for wide values or activations: high[i] and low[i] are the sums of the table's and of the low table's values
// with part i of the activations, high first. What the view lacks is not read.
inline void store_parts(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row,
                        int count, const __m128i* high, const __m128i* low) {
  const auto join = [&](const __m128i* parts) {
    const __m256i first = _mm256_cvtepi32_epi64(unflip(parts[0], x.sum[token]));
    if (x.low == nullptr) return first;
    const __m256i second = _mm256_cvtepi32_epi64(unflip(parts[1], x.low_sum[token]));
    return _mm256_add_epi64(_mm256_slli_epi64(first, kInputShift), second);
  };
  __m256i acc = join(high);
  if (w.low_table != nullptr) acc = _mm256_add_epi64(_mm256_slli_epi64(acc, kValueShift), join(low));
  store_floats(w, x, y, token, row, count, _mm256_cvtepi64_ps(acc));
}

}  // namespace taper::avx512
