// Matrix times many tokens: a tile of rows is unpacked once, then multiplied from cache in blocks of four panels of
// rows by up to four of tokens: 16 registers of sums, 4 of weights and 4 of activations.
//
// `Product` is the instruction. A panel is Product::kPanel rows (of weights or activations) whose columns take turns
// 16 / kPanel at a time: one row of 16 columns for sdot, two of 8 for smmla.
#pragma once

#include "kernels/common/scratch.hpp"
#include "unpack_row.hpp"

namespace taper::neon {
namespace {  // neon_i8mm compiles its own

template <class Product>
class Gemm {
 public:
  Gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y)
      : w_(w), x_(x), y_(y), parts_(w.low_table == nullptr ? 1 : 2), inputs_(x.low == nullptr ? 1 : 2) {}

  void run(int64_t row_begin, int64_t row_end) {
    const int64_t fit = kTileBytes / (w_.cols * parts_), rows = std::max(kLeastRows, fit / kBlock * kBlock);
    tile_[0] = reinterpret_cast<int8_t*>(scratch((rows * parts_ + kBlock * inputs_) * w_.cols));
    tile_[1] = tile_[0] + rows * w_.cols;
    packed_ = tile_[0] + rows * parts_ * w_.cols;
    for (int64_t row = row_begin; row < row_end; row += rows) {
      const int64_t count = std::min(rows, row_end - row);
      with_bits(w_.bits, [&]<int kBits>() {
        unpack<kBits>(w_.table, row, count, tile_[0]);
        if (parts_ == 2) unpack<kBits>(w_.low_table, row, count, tile_[1]);
      });
      for (int64_t token = 0; token < x_.tokens; token += kBlock) {
        multiply_tokens(row, count, token, static_cast<int>(std::min<int64_t>(kBlock, x_.tokens - token)));
      }
    }
  }

 private:
  static constexpr int kPanel = Product::kPanel;
  static constexpr int kPanels = 4;
  static constexpr int kBlock = kPanels * kPanel;  // rows, and tokens, of a block
  static constexpr int64_t kTileBytes = 131072;    // of weights, in L2
  static constexpr int64_t kLeastRows = 32;        // share one packing of the tokens, however long the rows are

  struct Inputs {
    const int8_t* panels[2][kPanels];  // by part of the activations
    int64_t token;
    int tokens;
  };

  template <int kBits>
  void unpack(const int8_t* table, int64_t row, int64_t rows, int8_t* tile) const {
    const PlaneLookup<kBits> shared(table);
    for (int64_t r = 0; r < rows; ++r) {
      int8_t* out = tile + r / kPanel * kPanel * w_.cols + r % kPanel * (16 / kPanel);
      const int64_t at = (row + r) * w_.table_stride;
      unpack_row(at == 0 ? shared : PlaneLookup<kBits>(table + at), w_, row + r,
                 [&](int64_t column, int8x16_t values, auto count) TAPER_INLINE {
                   if constexpr (kPanel == 1 && count == 16) return vst1q_s8(out + column, values);
                   vst1_s8(out + column * kPanel, vget_low_s8(values));
                   if constexpr (count == 16) vst1_s8(out + (column + 8) * kPanel, vget_high_s8(values));
                 });
    }
  }

  // One panel of activations, the last of the block's tokens repeated; in place where a panel is one row.
  const int8_t* pack(const int8_t* q, const Inputs& in, int panel, int8_t* out) const {
    const auto row = [&](int i) { return q + (in.token + std::min(panel * kPanel + i, in.tokens - 1)) * w_.cols; };
    if constexpr (kPanel == 1) return row(0);
    const int8_t *a = row(0), *b = row(1);
    for (int64_t c = 0; c < w_.cols; c += 16) {
      const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(a + c)), y = vreinterpretq_s64_s8(vld1q_s8(b + c));
      vst1q_s8(out + 2 * c, vreinterpretq_s8_s64(vtrn1q_s64(x, y)));
      vst1q_s8(out + 2 * c + 16, vreinterpretq_s8_s64(vtrn2q_s64(x, y)));
    }
    return out;
  }

  void multiply_tokens(int64_t row, int64_t rows, int64_t token, int tokens) const {
    Inputs in{{}, token, tokens};
    const int panels = (tokens + kPanel - 1) / kPanel;
    for (int part = 0; part < inputs_; ++part) {
      for (int i = 0; i < panels; ++i) {
        int8_t* out = packed_ + (part * kPanels + i) * kPanel * w_.cols;
        in.panels[part][i] = pack(part == 0 ? x_.q : x_.low, in, i, out);
      }
    }
    for (int64_t r = 0; r < rows; r += kBlock) {
      unroll<kPanels>([&](auto n) TAPER_INLINE {
        if (panels == n + 1) multiply_block<n + 1>(row, r, static_cast<int>(std::min<int64_t>(kBlock, rows - r)), in);
      });
    }
  }

  // Four rows (a group) with each token of a panel.
  using Sums = int32x4_t[kPanel][kPanel];

  // Rows r .. of the tile, `count` of them; panels past the count hold what an earlier tile left there.
  template <int kInputs>
  void multiply_block(int64_t row, int64_t r, int count, const Inputs& in) const {
    Sums sums[2][2][kInputs];  // by part of the values and of the activations
    for (int v = 0; v < parts_; ++v) {
      for (int part = 0; part < inputs_; ++part) {
        multiply<kInputs>(tile_[v] + r * w_.cols, in.panels[part], sums[v][part]);
      }
    }
    for (int i = 0; i < in.tokens; ++i) {
      for (int group = 0; kRows * group < count; ++group) {
        const auto of = [&](int v, int part) { return sums[v][part][i / kPanel][group][i % kPanel]; };
        const int32x4_t high[] = {of(0, 0), of(0, inputs_ - 1)},
                        low[] = {of(parts_ - 1, 0), of(parts_ - 1, inputs_ - 1)};
        store_rows(w_, x_, y_, in.token + i, row + r + kRows * group, std::min(kRows, count - kRows * group), high,
                   low);
      }
    }
  }

  template <int kInputs>
  void multiply(const int8_t* weights, const int8_t* const* q, Sums* sums) const {
    const int64_t size = kPanel * w_.cols;
    int32x4_t acc[kInputs][kPanels] = {};
    for (int64_t c = 0; c < size; c += 16) {
      int8x16_t rows[kPanels];
      unroll<kPanels>([&](auto r) TAPER_INLINE { rows[r] = vld1q_s8(weights + r * size + c); });
      unroll<kInputs>([&](auto i) TAPER_INLINE {
        const int8x16_t tokens = vld1q_s8(q[i] + c);
        unroll<kPanels>([&](auto r) TAPER_INLINE { acc[i][r] = Product::add(acc[i][r], rows[r], tokens); });
      });
    }
    unroll<kInputs>([&](auto i) TAPER_INLINE { Product::fold_panels(acc[i], sums[i]); });
  }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int parts_;   // of a value
  const int inputs_;  // parts of an activation
  int8_t* tile_[2];   // panels of rows by part of the values
  int8_t* packed_;    // panels of tokens
};

}  // namespace
}  // namespace taper::neon
