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
  const uint8_t* low;      // of the low table, or null
  int64_t row;             // of the matrix
  int64_t rows;
};

// sums[i]: of kRows rows of weights, of which those past the count repeat the last, times row i of q.
template <int kCount>
inline void multiply(const uint8_t* weights, int count, const int8_t* q, int64_t cols, __m128i* sums) {
  const uint8_t* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = weights + std::min(i, count - 1) * cols;
  __m512i acc[kCount][kRows] = {};
  for (int64_t c = 0; c < cols; c += 64) {
    __m512i u[kRows];
    unroll<kRows>([&](auto i) TAPER_INLINE { u[i] = _mm512_load_si512(rows[i] + c); });
    unroll<kCount>([&](auto t) TAPER_INLINE {
      const __m512i values = in_register(_mm512_loadu_si512(q + t * cols + c));
      unroll<kRows>([&](auto i) TAPER_INLINE { acc[t][i] = _mm512_dpbusd_epi32(acc[t][i], u[i], values); });
    });
  }
  unroll<kCount>([&](auto t) TAPER_INLINE {
    const __m512i quad = fold_quad(fold_pair(acc[t][0], acc[t][1]), fold_pair(acc[t][2], acc[t][3]));
    sums[t] = fold_last(fold_halves(quad));
  });
}

template <int kCount>
void multiply_rows(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile, int64_t r,
                   int64_t token) {
  const int count = static_cast<int>(std::min<int64_t>(kRows, tile.rows - r));
  const int64_t from = token * w.cols;
  __m128i sums[2][2][kCount];  // by part of the values and of the activations
  for (int v = 0; v < (tile.low == nullptr ? 1 : 2); ++v) {
    const uint8_t* weights = (v == 0 ? tile.weights : tile.low) + r * w.cols;
    multiply<kCount>(weights, count, x.q + from, w.cols, sums[v][0]);
    if (x.low != nullptr) multiply<kCount>(weights, count, x.low + from, w.cols, sums[v][1]);
  }
  for (int t = 0; t < kCount; ++t) {
    if (tile.low == nullptr && x.low == nullptr) {
      store_rows(w, x, y, token + t, tile.row + r, count, sums[0][0][t]);
    } else {
      const __m128i high[] = {sums[0][0][t], sums[0][1][t]}, low[] = {sums[1][0][t], sums[1][1][t]};
      store_parts(w, x, y, token + t, tile.row + r, count, high, low);
    }
  }
}

void multiply_tile(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile) {
  for (int64_t token = 0; token < x.tokens; token += kTokens) {
    for (int64_t r = 0; r < tile.rows; r += kRows) {
      switch (std::min<int64_t>(kTokens, x.tokens - token)) {
        case 1:
          multiply_rows<1>(w, x, y, tile, r, token);
          break;
        case 2:
          multiply_rows<2>(w, x, y, tile, r, token);
          break;
        case 3:
          multiply_rows<3>(w, x, y, tile, r, token);
          break;
        case 4:
          multiply_rows<4>(w, x, y, tile, r, token);
          break;
        case 5:
          multiply_rows<5>(w, x, y, tile, r, token);
          break;
        default:
          multiply_rows<kTokens>(w, x, y, tile, r, token);
      }
    }
  }
}

template <int kBits>
void unpack_tile(const PlanesView& w, const int8_t* table, const Tile& tile, uint8_t* out) {
  const auto unpack = [&](const PlaneLookup<kBits>& lookup, int64_t r)
                          TAPER_INLINE { unpack_row(lookup, w, tile.row + r, out + r * w.cols); };
  if (w.table_stride == 0) {
    const PlaneLookup<kBits> lookup(table, kSignFlip);
    for (int64_t r = 0; r < tile.rows; ++r) unpack(lookup, r);
  } else {
    for (int64_t r = 0; r < tile.rows; ++r) {
      unpack(PlaneLookup<kBits>(table + (tile.row + r) * w.table_stride, kSignFlip), r);
    }
  }
}

}  // namespace

void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  const int parts = w.low_table == nullptr ? 1 : 2;
  const int64_t rows = std::max<int64_t>(kRows, kTileBytes / (w.cols * parts) / kRows * kRows);
  uint8_t* weights = scratch(rows * w.cols * parts);
  uint8_t* low = parts == 1 ? nullptr : weights + rows * w.cols;
  with_bits(w.bits, [&]<int kBits>() {
    for (int64_t row = row_begin; row < row_end; row += rows) {
      const Tile tile{weights, low, row, std::min(rows, row_end - row)};
      unpack_tile<kBits>(w, w.table, tile, weights);
      if (low != nullptr) unpack_tile<kBits>(w, w.low_table, tile, low);
      multiply_tile(w, x, y, tile);
    }
  });
}

}  // namespace taper::avx512
