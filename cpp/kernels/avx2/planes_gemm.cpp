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
  const int16_t* low;      // of the low table, or null
  const int16_t* q;        // (tokens, cols)
  const int16_t* q_low;    // the low parts, or null
  int64_t row;             // of the matrix
  int64_t rows;
  int64_t token;  // of the activations
  int64_t tokens;
};

// sums[i]: of kRows rows of weights, of which those past the count repeat the last, times row i of q.
template <int kCount>
inline void multiply(const int16_t* weights, int count, const int16_t* q, int64_t cols, __m128i* sums) {
  const int16_t* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = weights + std::min(i, count - 1) * cols;
  __m256i acc[kCount][kRows] = {};
  for (int64_t c = 0; c < cols; c += 16) {
    __m256i values[kCount];
    unroll<kCount>([&](auto i) TAPER_INLINE { values[i] = load_256(q + i * cols + c); });
    unroll<kRows>([&](auto r4) TAPER_INLINE {
      const __m256i row = load_256(rows[r4] + c);
      unroll<kCount>(
          [&](auto i) TAPER_INLINE { acc[i][r4] = _mm256_add_epi32(acc[i][r4], _mm256_madd_epi16(row, values[i])); });
    });
  }
  unroll<kCount>([&](auto i) TAPER_INLINE {
    const __m256i quad = fold_quad(fold_pair(acc[i][0], acc[i][1]), fold_pair(acc[i][2], acc[i][3]));
    sums[i] = fold_last(quad);
  });
}

template <int kCount>
void multiply_rows(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile, int64_t r,
                   int64_t t) {
  const int count = static_cast<int>(std::min<int64_t>(kRows, tile.rows - r));
  __m128i sums[2][2][kCount];  // by part of the values and of the activations
  for (int v = 0; v < (tile.low == nullptr ? 1 : 2); ++v) {
    const int16_t* weights = (v == 0 ? tile.weights : tile.low) + r * w.cols;
    multiply<kCount>(weights, count, tile.q + t * w.cols, w.cols, sums[v][0]);
    if (tile.q_low != nullptr) multiply<kCount>(weights, count, tile.q_low + t * w.cols, w.cols, sums[v][1]);
  }
  for (int i = 0; i < kCount; ++i) {
    const int64_t token = tile.token + t + i, row = tile.row + r;
    if (tile.low == nullptr && tile.q_low == nullptr) {
      store_rows(w, x, y, token, row, count, sums[0][0][i]);
    } else {
      const __m128i high[] = {sums[0][0][i], sums[0][1][i]}, low[] = {sums[1][0][i], sums[1][1][i]};
      store_parts(w, x, y, token, row, count, high, low);
    }
  }
}

void multiply_tile(const PlanesView& w, const ActivationsView& x, const OutputView& y, const Tile& tile) {
  for (int64_t r = 0; r < tile.rows; r += kRows) {
    for (int64_t t = 0; t < tile.tokens; t += kTokens) {
      if (tile.tokens - t == 1) {
        multiply_rows<1>(w, x, y, tile, r, t);
      } else {
        multiply_rows<kTokens>(w, x, y, tile, r, t);
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
void unpack_tile(const PlanesView& w, const int8_t* table, int64_t row, int64_t rows, int16_t* weights) {
  const PlaneLookup<kBits> shared(table);
  for (int64_t r = 0; r < rows; ++r) {
    int16_t* out = weights + r * w.cols;
    const int64_t at = (row + r) * w.table_stride;
    unpack_row(at == 0 ? shared : PlaneLookup<kBits>(table + at), w, row + r,
               [&](int64_t column, __m256i values, int count) {
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
  const int parts = w.low_table == nullptr ? 1 : 2, inputs = x.low == nullptr ? 1 : 2;
  const int64_t rows = std::max<int64_t>(kLeastRows, kTileBytes / (row_bytes * parts) / kRows * kRows);
  auto* weights = reinterpret_cast<int16_t*>(scratch((rows * parts + kTokenBlock * inputs) * row_bytes));
  int16_t* low = parts == 1 ? nullptr : weights + rows * w.cols;
  int16_t* q = weights + rows * parts * w.cols;
  int16_t* q_low = inputs == 1 ? nullptr : q + kTokenBlock * w.cols;
  for (int64_t row = row_begin; row < row_end; row += rows) {
    Tile tile{weights, low, q, q_low, row, std::min(rows, row_end - row), 0, 0};
    with_bits(w.bits, [&]<int kBits>() {
      unpack_tile<kBits>(w, w.table, row, tile.rows, weights);
      if (low != nullptr) unpack_tile<kBits>(w, w.low_table, row, tile.rows, low);
    });
    for (; tile.token < x.tokens; tile.token += kTokenBlock) {
      tile.tokens = std::min(kTokenBlock, x.tokens - tile.token);
      widen(x.q + tile.token * w.cols, tile.tokens * w.cols, q);
      if (q_low != nullptr) widen(x.low + tile.token * w.cols, tile.tokens * w.cols, q_low);
      multiply_tile(w, x, y, tile);
    }
  }
}

}  // namespace taper::avx2
