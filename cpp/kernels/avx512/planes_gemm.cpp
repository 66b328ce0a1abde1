// Matrix times many tokens: a tile of rows is unpacked once, then multiplied from cache in blocks of 4 rows x 6 tokens.
#include "kernels/common/scratch.hpp"
#include "rows.hpp"
#include "unpack_row.hpp"

namespace taper::avx512 {
namespace {

constexpr int kTokens = 6;             // 24 sums, 4 rows of weights and a row of activations fit in 32 registers
constexpr int64_t kTileBytes = 24576;  // leaves half of a 48 KiB L1 for the activations

struct Tile {
  const uint8_t* weights;  // (rows, cols)
  int64_t row;             // of the matrix
  int64_t rows;
};

template <int kCount>
void multiply(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile, int64_t r,
              int64_t token) {
  const int count = static_cast<int>(std::min<int64_t>(kRows, tile.rows - r));
  const uint8_t* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = tile.weights + (r + std::min(i, count - 1)) * w.cols;
  const int8_t* q = x.q + token * w.cols;
  __m512i acc[kCount][kRows] = {};
  for (int64_t c = 0; c < w.cols; c += 64) {
    __m512i u[kRows];
    unroll<kRows>([&](auto i) TAPER_INLINE { u[i] = _mm512_load_si512(rows[i] + c); });
    unroll<kCount>([&](auto t) TAPER_INLINE {
      const __m512i values = in_register(_mm512_loadu_si512(q + t * w.cols + c));
      unroll<kRows>([&](auto i) TAPER_INLINE { acc[t][i] = _mm512_dpbusd_epi32(acc[t][i], u[i], values); });
    });
  }
  unroll<kCount>([&](auto t) TAPER_INLINE {
    const __m512i quad = fold_quad(fold_pair(acc[t][0], acc[t][1]), fold_pair(acc[t][2], acc[t][3]));
    store_rows(w, x, y, token + t, tile.row + r, count, fold_last(fold_halves(quad)));
  });
}

void multiply_tile(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile) {
  for (int64_t token = 0; token < x.tokens; token += kTokens) {
    for (int64_t r = 0; r < tile.rows; r += kRows) {
      switch (std::min<int64_t>(kTokens, x.tokens - token)) {
        case 1:
          multiply<1>(w, x, y, tile, r, token);
          break;
        case 2:
          multiply<2>(w, x, y, tile, r, token);
          break;
        case 3:
          multiply<3>(w, x, y, tile, r, token);
          break;
        case 4:
          multiply<4>(w, x, y, tile, r, token);
          break;
        case 5:
          multiply<5>(w, x, y, tile, r, token);
          break;
        default:
          multiply<kTokens>(w, x, y, tile, r, token);
      }
    }
  }
}

}  // namespace

void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  const int64_t rows = std::max<int64_t>(kRows, kTileBytes / w.cols / kRows * kRows);
  uint8_t* weights = scratch(rows * w.cols);
  with_bits(w.bits, [&]<int kBits>() {
    const PlaneLookup<kBits> lookup(w.table, kSignFlip);
    for (int64_t row = row_begin; row < row_end; row += rows) {
      const Tile tile{weights, row, std::min(rows, row_end - row)};
      for (int64_t r = 0; r < tile.rows; ++r) unpack_row(lookup, w, row + r, weights + r * w.cols);
      multiply_tile(w, x, y, tile);
    }
  });
}

}  // namespace taper::avx512
