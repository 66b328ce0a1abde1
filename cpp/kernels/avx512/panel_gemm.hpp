// What the matrix kernels share: a tile of rows is unpacked to panels once, then multiplied from cache by block after
// block of tokens, two panels at a time. M multiplies: avx512/planes_gemm.cpp with vpdpbusd, amx/ with tiles.
//
//   struct M {
//     static constexpr int kTokens;        // most tokens of a block
//     static constexpr int kFlip;          // XORed to the values of a table
//     static constexpr int64_t kTileBytes; // of panels, a part of the L2
//     static int64_t block(int64_t tokens);  // tokens of each block but the last, at most kTokens
//     void begin(int64_t tokens);            // the next blocks have so many
//     // sums (tokens, 2, 16): of two panels of `cols` columns with rows of activations; sum[t] is that of row t.
//     void multiply(const uint8_t* panels, const int8_t* q, const int32_t* sum, int64_t cols, int64_t tokens,
//                   int32_t* sums);
//   };
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels/common/scratch.hpp"
#include "panels.hpp"
#include "taper/kernels.hpp"

namespace taper::avx512 {

inline constexpr int kPanels = 2;  // multiplied together
inline constexpr int kBlockRows = kPanels * kPanelRows;

// Rows of the matrix as panels: `high` of the table, `low` of the low table or null.
struct PanelTile {
  uint8_t* high;
  uint8_t* low;
  int64_t row;      // first of the matrix
  int64_t row_end;  // past the last
};

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
  const int64_t at = token * w.rows + row;
  if (y.residual != nullptr) out = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y.residual + at), out);
  _mm512_mask_storeu_ps(y.out + at, mask, out);
}

template <class M>
class PanelGemm {
 public:
  PanelGemm(const PlanesView& w, const ActivationsView& x, const OutputView& y)
      : w_(w), x_(x), y_(y), panel_bytes_(kPanelRows * w.cols) {}

  void run(int64_t row_begin, int64_t row_end) {
    const int parts = parts_of(w_);
    const int64_t most = std::max<int64_t>(M::kTileBytes / (panel_bytes_ * parts), kPanels) / kPanels * kPanels;
    const int64_t needed = (row_end - row_begin + kBlockRows - 1) / kBlockRows * kPanels;
    const int64_t panels = std::min(most, needed), bytes = panels * panel_bytes_;
    uint8_t* memory = scratch(bytes * parts + panel_bytes_);  // a panel more for rows with tables of their own
    for (int64_t row = row_begin; row < row_end; row += panels * kPanelRows) {
      const PanelTile tile{memory + panel_bytes_, parts == 1 ? nullptr : memory + panel_bytes_ + bytes, row,
                           std::min(row + panels * kPanelRows, row_end)};
      unpack(w_.table, tile, memory, tile.high);
      if (tile.low != nullptr) unpack(w_.low_table, tile, memory, tile.low);
      const int64_t block = M::block(x_.tokens);
      for (int64_t token = 0; token < x_.tokens; token += block) {
        multiply(tile, token, std::min(block, x_.tokens - token));
      }
    }
  }

 private:
  // Panels of a whole number of blocks: an odd last one is unpacked from the rows that there are.
  void unpack(const int8_t* table, const PanelTile& tile, uint8_t* values, uint8_t* panel) const {
    with_bits(w_.bits, [&]<int kBits>() {
      const PlaneLookup<kBits> shared(table, M::kFlip);
      const int64_t end = tile.row + (tile.row_end - tile.row + kBlockRows - 1) / kBlockRows * kBlockRows;
      for (int64_t row = tile.row; row < end; row += kPanelRows, panel += panel_bytes_) {
        if (w_.table_stride == 0) {
          unpack_panel(shared, w_, PanelRows(row, tile.row_end, w_.cols / 8), panel);
        } else if (row < tile.row_end) {
          unpack_panel_of_tables<kBits>(w_, table, M::kFlip, row, tile.row_end, values, panel);
        }
      }
    });
  }

  void multiply(const PanelTile& tile, int64_t token, int64_t tokens) {
    const int64_t from = token * w_.cols;
    m_.begin(tokens);
    for (int64_t row = tile.row; row < tile.row_end; row += kBlockRows) {
      const int64_t offset = (row - tile.row) * w_.cols;
      for (int v = 0; v < parts_of(w_); ++v) {
        const uint8_t* panels = (v == 0 ? tile.high : tile.low) + offset;
        m_.multiply(panels, x_.q + from, x_.sum + token, w_.cols, tokens, sums_[v][0]);
        if (x_.low != nullptr) {
          m_.multiply(panels, x_.low + from, x_.low_sum + token, w_.cols, tokens, sums_[v][1]);
        }
      }
      store(token, tokens, row, tile.row_end);
    }
  }

  void store(int64_t token, int64_t tokens, int64_t row, int64_t row_end) const {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = row; r < std::min(row + kBlockRows, row_end); r += kPanelRows) {
        const int64_t i = t * kBlockRows + r - row;
        const PartSums sums{{{sums_[0][0] + i, sums_[0][1] + i}, {sums_[1][0] + i, sums_[1][1] + i}}};
        store_panel(w_, x_, y_, token + t, r, std::min<int64_t>(kPanelRows, row_end - r), sums);
      }
    }
  }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int64_t panel_bytes_;
  M m_;
  alignas(64) int32_t sums_[2][2][M::kTokens * kBlockRows];
};

}  // namespace taper::avx512
