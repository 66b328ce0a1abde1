// Matrix times many tokens with vpdpbusd: sums of 2 x 16 rows and up to 14 tokens stay in 28 registers.
//
// Four columns of a token are broadcast and multiplied with both panels. A step of four columns loads 2 + 14 registers
// for 28 vpdpbusd: 0.57 loads each, where Zen 4 loads 1 and multiplies 1 a cycle, and Xeons since Ice Lake load 2 and
// multiply 2. Panels come from the L2, 128 bytes in 28 products: 4.6 bytes a cycle on Zen 4, 9.1 on a Xeon. So the
// multiplier is the bound: 128 integer operations a cycle on Zen 4, 470 GOP/s at 3.67 GHz.
// Measured there on panels in cache, one thread, 512 tokens of 2048 columns, in GOP/s (rows / 16 x tokens):
//   1 x 24  282    2 x 12  441    2 x 14  460    3 x 9  463    4 x 6  460
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/avx512/avx512.hpp"
#include "kernels/common/scratch.hpp"
#include "panel_store.hpp"
#include "panels.hpp"

namespace taper::avx512 {
namespace {

inline constexpr int kPanels = 2;  // multiplied together
inline constexpr int kBlockRows = kPanels * kPanelRows;

// Rows of the matrix as panels: `high` of the table, `low` of the low table or null.
struct PanelTile {
  uint8_t* high;
  uint8_t* low;
  int64_t row;      // first of the matrix
  int64_t row_end;  // past the last
};

// A loaded value that is used twice stays in its register; GCC would broadcast it again from memory.
TAPER_INLINE inline __m512i in_register(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

TAPER_INLINE inline __m512i broadcast(const int8_t* four) {
  int32_t bytes;
  std::memcpy(&bytes, four, sizeof bytes);
  return in_register(_mm512_set1_epi32(bytes));
}

template <int kTokens>
void multiply(const uint8_t* panels, const int8_t* q, const int32_t* sum, int64_t cols, int32_t* sums) {
  __m512i acc[kTokens][kPanels];
  unroll<kTokens>([&](auto t) TAPER_INLINE {
    // Bytes of a panel are w + 128, as vpdpbusd wants one unsigned factor: what that adds is taken off first.
    const auto flipped = static_cast<int32_t>(0u - 128 * static_cast<uint32_t>(sum[t]));
    for (int p = 0; p < kPanels; ++p) acc[t][p] = _mm512_set1_epi32(flipped);
  });
  const uint8_t* second = panels + kPanelRows * cols;
  for (int64_t c = 0; c < cols; c += 4) {
    const __m512i u0 = _mm512_load_si512(panels + kPanelRows * c), u1 = _mm512_load_si512(second + kPanelRows * c);
    unroll<kTokens>([&](auto t) TAPER_INLINE {
      const __m512i values = broadcast(q + t * cols + c);
      acc[t][0] = _mm512_dpbusd_epi32(acc[t][0], u0, values);
      acc[t][1] = _mm512_dpbusd_epi32(acc[t][1], u1, values);
    });
  }
  unroll<kTokens>([&](auto t) TAPER_INLINE {
    for (int p = 0; p < kPanels; ++p) _mm512_store_si512(sums + t * kBlockRows + p * kPanelRows, acc[t][p]);
  });
}

constexpr int kTokens = 14;                 // most of a block
constexpr int64_t kTileBytes = 256 * 1024;  // of panels: a quarter of the L2 of Zen 4

// Tokens of each block but the last, as even as can be: a short one would load its panels for few products.
int64_t block_of(int64_t tokens) {
  const int64_t blocks = (tokens + kTokens - 1) / kTokens;
  return (tokens + blocks - 1) / blocks;
}

// sums (tokens, 2, 16): of two panels of `cols` columns with rows of activations; sum[t] is that of row t.
void multiply_panels(const uint8_t* panels, const int8_t* q, const int32_t* sum, int64_t cols, int64_t tokens,
                     int32_t* sums) {
  static constexpr auto kMultiply = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::array{&avx512::multiply<kIndex + 1>...};
  }(std::make_index_sequence<kTokens>{});
  kMultiply[tokens - 1](panels, q, sum, cols, sums);
}

// A tile of rows is unpacked to panels once, then multiplied from cache by block after block of tokens.
class PanelGemm {
 public:
  PanelGemm(const PlanesView& w, const ActivationsView& x, const OutputView& y)
      : w_(w), x_(x), y_(y), panel_bytes_(kPanelRows * w.cols) {}

  void run(int64_t row_begin, int64_t row_end) {
    const int parts = parts_of(w_);
    const int64_t most = std::max<int64_t>(kTileBytes / (panel_bytes_ * parts), kPanels) / kPanels * kPanels;
    const int64_t needed = (row_end - row_begin + kBlockRows - 1) / kBlockRows * kPanels;
    const int64_t panels = std::min(most, needed), bytes = panels * panel_bytes_;
    uint8_t* memory = scratch(bytes * parts + panel_bytes_);  // a panel more for rows with tables of their own
    for (int64_t row = row_begin; row < row_end; row += panels * kPanelRows) {
      const PanelTile tile{memory + panel_bytes_, parts == 1 ? nullptr : memory + panel_bytes_ + bytes, row,
                           std::min(row + panels * kPanelRows, row_end)};
      unpack(w_.table, tile, memory, tile.high);
      if (tile.low != nullptr) unpack(w_.low_table, tile, memory, tile.low);
      const int64_t block = block_of(x_.tokens);
      for (int64_t token = 0; token < x_.tokens; token += block) {
        multiply(tile, token, std::min(block, x_.tokens - token));
      }
    }
  }

 private:
  // Panels of a whole number of blocks: an odd last one is unpacked from the rows that there are.
  void unpack(const int8_t* table, const PanelTile& tile, uint8_t* values, uint8_t* panel) const {
    with_bits(w_.bits, [&]<int kBits>() {
      const PlaneLookup<kBits> shared(table, kSignFlip);
      const int64_t end = tile.row + (tile.row_end - tile.row + kBlockRows - 1) / kBlockRows * kBlockRows;
      for (int64_t row = tile.row; row < end; row += kPanelRows, panel += panel_bytes_) {
        if (w_.table_stride == 0) {
          unpack_panel(shared, w_, PanelRows(row, tile.row_end, w_.cols / 8), panel);
        } else if (row < tile.row_end) {
          unpack_panel_of_tables<kBits>(w_, table, kSignFlip, row, tile.row_end, values, panel);
        }
      }
    });
  }

  void multiply(const PanelTile& tile, int64_t token, int64_t tokens) {
    const int64_t from = token * w_.cols;
    for (int64_t row = tile.row; row < tile.row_end; row += kBlockRows) {
      const int64_t offset = (row - tile.row) * w_.cols;
      for (int v = 0; v < parts_of(w_); ++v) {
        const uint8_t* panels = (v == 0 ? tile.high : tile.low) + offset;
        multiply_panels(panels, x_.q + from, x_.sum + token, w_.cols, tokens, sums_[v][0]);
        if (x_.low != nullptr) {
          multiply_panels(panels, x_.low + from, x_.low_sum + token, w_.cols, tokens, sums_[v][1]);
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
  alignas(64) int32_t sums_[2][2][kTokens * kBlockRows];
};

}  // namespace

void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  PanelGemm(w, x, y).run(row_begin, row_end);
}

}  // namespace taper::avx512
