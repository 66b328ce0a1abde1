// One row of planes to int8 values in column order, for planes_unpack and the tiles of planes_gemm.
#pragma once

#include <cstring>

#include "rows.hpp"
#include "unpack.hpp"

namespace taper::avx2 {

// Calls put(column, values, count) with the values of columns column .. column + count - 1, count 8, 16 or 32.
template <int kBits, class Put>
TAPER_INLINE inline void unpack_row(const PlaneLookup<kBits>& lookup, const PlanesView& w, int64_t row, Put put) {
  constexpr int64_t kAheadBytes = 1024;
  const int64_t begin = row * (w.cols / 8);
  // bytes of each plane from column / 8 + skip on; group g begins at column + pitch * g + skip
  auto block = [&](int64_t column, int64_t pitch, int64_t skip, int bytes) {
    __m256i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* line = w.planes[k] + begin + column / 8 + skip;
      _mm_prefetch(line + kAheadBytes, _MM_HINT_T0);
      if (bytes == 32) {
        p[k] = load_256(line);
      } else {
        p[k] = _mm256_castsi128_si256(bytes == 16 ? load_128(line) : _mm_cvtsi64_si128(load_64(line)));
      }
    }
    lookup(p, [&](int g, __m256i values) TAPER_INLINE { put(column + pitch * g + skip, values, bytes); });
  };
  int64_t column = 0;
  for (; column + 512 <= w.cols; column += 512) {
    block(column, 64, 0, 32);
    block(column, 64, 32, 32);
  }
  for (int width = 256; width >= 64; width /= 2) {
    if (w.cols & width) {
      block(column, width / 8, 0, width / 8);
      column += width;
    }
  }
}

}  // namespace taper::avx2
