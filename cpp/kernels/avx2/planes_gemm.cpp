// Matrix times many tokens: a tile of rows is unpacked once to int16, then multiplied from cache in blocks of 4 rows x
// 2 tokens. pmaddwd and an addition a register of 16 products take two operations where the sign, multiply, widen and
// add of int8 take four for 32 with three of them on two ports; the exchange is twice the bytes from cache.
#include "kernels/common/scratch.hpp"
#include "rows.hpp"
#include "unpack_row.hpp"

namespace taper::avx2 {
namespace {

constexpr int kTokens = 2;              // 8 sums, 4 rows of weights, 2 of activations and a product: 15 of 16 registers
constexpr int64_t kTokenBlock = 4;      // tokens widened to int16 together: 16 KiB at 2048 columns
constexpr int64_t kTileBytes = 131072;  // of weights, in L2
constexpr int64_t kLeastRows = 32;      // share one widening of the tokens, however long the rows are

struct Tile {
  const int16_t* weights;  // (rows, cols)
  const int16_t* q;        // (tokens, cols)
  int64_t row;             // of the matrix
  int64_t rows;
  int64_t token;  // of the activations
  int64_t tokens;
};

template <int kCount>
void multiply(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile, int64_t r,
              int64_t t) {
  const int count = static_cast<int>(std::min<int64_t>(kRows, tile.rows - r));
  const int16_t* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = tile.weights + (r + std::min(i, count - 1)) * w.cols;
  const int16_t* q = tile.q + t * w.cols;
  __m256i acc[kCount][kRows] = {};
  for (int64_t c = 0; c < w.cols; c += 16) {
    __m256i values[kCount];
    unroll<kCount>([&](auto i) TAPER_INLINE { values[i] = load_256(q + i * w.cols + c); });
    unroll<kRows>([&](auto r4) TAPER_INLINE {
      const __m256i weights = load_256(rows[r4] + c);
      unroll<kCount>([&](auto i) TAPER_INLINE {
        acc[i][r4] = _mm256_add_epi32(acc[i][r4], _mm256_madd_epi16(weights, values[i]));
      });
    });
  }
  unroll<kCount>([&](auto i) TAPER_INLINE {
    const __m256i quad = fold_quad(fold_pair(acc[i][0], acc[i][1]), fold_pair(acc[i][2], acc[i][3]));
    store_rows(w, x, y, tile.token + t + i, tile.row + r, count, fold_last(quad));
  });
}

void multiply_tile(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile) {
  for (int64_t r = 0; r < tile.rows; r += kRows) {
    for (int64_t t = 0; t < tile.tokens; t += kTokens) {
      if (tile.tokens - t == 1) {
        multiply<1>(w, x, y, tile, r, t);
      } else {
        multiply<kTokens>(w, x, y, tile, r, t);
      }
    }
  }
}

// int8 to int16, n a multiple of 16.
void widen(const int8_t* from, int64_t n, int16_t* to) {
  for (int64_t i = 0; i < n; i += 16) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepi8_epi16(load_128(from + i)));
  }
}

template <int kBits>
void unpack_tile(const PlanesView& w, int64_t row, int64_t rows, int16_t* weights) {
  const PlaneLookup<kBits> lookup(w.table);
  for (int64_t r = 0; r < rows; ++r) {
    int16_t* out = weights + r * w.cols;
    unpack_row(lookup, w, row + r, [&](int64_t column, __m256i values, int count) {
      const __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(values));
      if (count == 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + column), _mm256_castsi256_si128(low));
        return;
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + column), low);
      if (count == 32) {
        const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(values, 1));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + column + 16), high);
      }
    });
  }
}

}  // namespace

void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  const int64_t row_bytes = w.cols * static_cast<int64_t>(sizeof(int16_t));
  const int64_t rows = std::max<int64_t>(kLeastRows, kTileBytes / row_bytes / kRows * kRows);
  auto* weights = reinterpret_cast<int16_t*>(scratch((rows + kTokenBlock) * row_bytes));
  int16_t* q = weights + rows * w.cols;
  for (int64_t row = row_begin; row < row_end; row += rows) {
    Tile tile{weights, q, row, std::min(rows, row_end - row), 0, 0};
    with_bits(w.bits, [&]<int kBits>() { unpack_tile<kBits>(w, row, tile.rows, weights); });
    for (; tile.token < x.tokens; tile.token += kTokenBlock) {
      tile.tokens = std::min(kTokenBlock, x.tokens - tile.token);
      widen(x.q + tile.token * w.cols, tile.tokens * w.cols, q);
      multiply_tile(w, x, y, tile);
    }
  }
}

}  // namespace taper::avx2
