// One row of planes to bytes in column order, for planes_unpack and the tiles of planes_gemm.
#pragma once

#include "taper/kernels.hpp"
#include "unpack.hpp"

namespace taper::avx512 {

// out: (cols) bytes of the lookup's table.
template <int kBits>
void unpack_row(const PlaneLookup<kBits>& lookup, const PlanesView& w, int64_t row, uint8_t* out) {
  constexpr int64_t kAheadBytes = 1024;
  const int64_t begin = row * (w.cols / 8);
  int64_t column = 0;
  auto block = [&](int64_t width, __mmask64 mask) {
    __m512i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* line = w.planes[k] + begin + column / 8;
      _mm_prefetch(line + kAheadBytes, _MM_HINT_T0);
      p[k] = _mm512_maskz_loadu_epi8(mask, line);
    }
    const auto fields = lookup.gather(p);
    unroll<kGroups>([&](auto g) TAPER_INLINE {
      _mm512_mask_storeu_epi8(out + column + width / 8 * g, mask, lookup.template find<g>(fields));
    });
    column += width;
  };
  while (column + 512 <= w.cols) block(512, ~__mmask64{0});
  for (int64_t width = 256; width >= 64; width /= 2) {
    if (w.cols & width) block(width, (__mmask64{1} << (width / 8)) - 1);
  }
}

}  // namespace taper::avx512
