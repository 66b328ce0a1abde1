// One row of planes in pieces of 16 bytes, and their values in column order for planes_unpack and the tiles of
// planes_gemm.
#pragma once

#include "rows.hpp"
#include "unpack.hpp"

namespace taper::neon {
namespace {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls line(byte) for each block of a row (at most 64 bytes) and piece(byte, column, pitch, count) for each of its
// pieces: `count` bytes (16, or 8 in a block of 64 columns), whose group g begins at column + pitch * g.
template <class Line, class Piece>
TAPER_INLINE inline void for_each_piece(int64_t cols, const Line& line, const Piece& piece) {
  int64_t column = 0;
  for (; column + 512 <= cols; column += 512) {
    line(column / 8);
    for (int64_t skip = 0; skip < 64; skip += 16)
      piece(column / 8 + skip, column + skip, Constant<64>{}, Constant<16>{});
  }
  const auto rest = [&](auto width) TAPER_INLINE {
    constexpr int pitch = width / 8, count = pitch < 16 ? pitch : 16;
    if ((cols & width) == 0) return;
    line(column / 8);
    for (int64_t skip = 0; skip < pitch; skip += 16) {
      piece(column / 8 + skip, column + skip, Constant<pitch>{}, Constant<count>{});
    }
    column += width;
  };
  rest(Constant<256>{});
  rest(Constant<128>{});
  rest(Constant<64>{});
}

// Calls put(column, values, count) with the values of columns column .. column + count - 1, count Constant<8> or <16>.
template <int kBits, class Put>
TAPER_INLINE inline void unpack_row(const PlaneLookup<kBits>& lookup, const PlanesView& w, int64_t row, Put put) {
  constexpr int64_t kAheadBytes = 1024;
  const int64_t begin = row * (w.cols / 8);
  for_each_piece(
      w.cols,
      [&](int64_t byte) TAPER_INLINE {
        for (int k = 0; k < kBits; ++k) __builtin_prefetch(w.planes[k] + begin + byte + kAheadBytes);
      },
      [&](int64_t byte, int64_t column, auto pitch, auto count) TAPER_INLINE {
        uint8x16_t p[kBits];
        for (int k = 0; k < kBits; ++k) p[k] = load_bytes<count>(w.planes[k] + begin + byte);
        lookup(p, [&](auto group, int8x16_t values) TAPER_INLINE { put(column + pitch * group, values, count); });
      });
}

}  // namespace
}  // namespace taper::neon
