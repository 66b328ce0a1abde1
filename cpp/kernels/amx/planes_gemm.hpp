// Matrix times many tokens with AMX int8: the panels of avx512/panels.hpp, tile by tile.
//
// A tile of a panel is 64 columns of 16 rows (16 x 64 bytes) as it lies in memory; a tile of activations is 64 columns
// of 16 tokens, rows of the matrix of activations as they are. 2 x 2 blocking: two tiles of each are loaded for four
// products, whose sums stay in four tiles. Both factors are signed, so nothing is flipped.
//
// What to expect on a Xeon of 3.55 GHz, where none of this has run yet. A product is 2 * 16 * 16 * 64 = 32768
// operations in 16 cycles: 2048 a cycle, 7.3 TOP/s a core in theory, 6.25 measured with tiles that stay in registers.
// Each product loads one tile (2 + 2 for 4), 1 KiB: 5.03 TOP/s measured from the L1, 3.76 from the L2, 10.05 and 7.43
// on two cores. Panels and a block of 32 tokens (64 KiB at 2048 columns) come from the L2, so its figure is the bound.
// There 1024 weights take 990 cycles with 512 tokens and 247 with 128; unpacking them took 100 with AVX-512 on Zen 4 at
// 4 bits. That leaves 6.7 TOP/s on two cores for 512 tokens and 5.3 for 128.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/avx512/panel_gemm.hpp"
#include "tiles.hpp"

namespace taper::amx {

// T: Tiles or EmulatedTiles.
template <class T>
class TileMultiplier {
 public:
  static constexpr int kTokens = 2 * kTileRows;
  static constexpr int kFlip = 0;
  static constexpr int64_t kTileBytes = 1024 * 1024;  // half of the L2 of a processor that has AMX

  static int64_t block(int64_t) { return kTokens; }

  ~TileMultiplier() { tiles_.release(); }

  void begin(int64_t tokens) {
    if (tokens == configured_) return;
    TileConfig config;
    const auto shape = [&](int tile, int64_t rows) {
      config.rows[tile] = static_cast<uint8_t>(rows);
      config.row_bytes[tile] = rows == 0 ? 0 : kRowBytes;
    };
    const int64_t first = std::min<int64_t>(tokens, kTileRows), second = tokens - first;
    for (const int tile : {kSum00, kSum01, kTokens0}) shape(tile, first);
    for (const int tile : {kSum10, kSum11, kTokens1}) shape(tile, second);
    for (const int tile : {kPanel0, kPanel1}) shape(tile, kTileRows);
    tiles_.configure(config);
    configured_ = tokens;
  }

  void multiply(const uint8_t* panels, const int8_t* q, const int32_t*, int64_t cols, int64_t tokens, int32_t* sums) {
    tokens > kTileRows ? multiply<true>(panels, q, cols, sums) : multiply<false>(panels, q, cols, sums);
  }

 private:
  // kSum01: of the first tokens and the second panel.
  enum Name { kSum00, kSum01, kSum10, kSum11, kTokens0, kTokens1, kPanel0, kPanel1 };

  template <bool kBoth>
  void multiply(const uint8_t* panels, const int8_t* q, int64_t cols, int32_t* sums) {
    tiles_.template zero<kSum00>();
    tiles_.template zero<kSum01>();
    if constexpr (kBoth) tiles_.template zero<kSum10>();
    if constexpr (kBoth) tiles_.template zero<kSum11>();
    for (int64_t c = 0; c < cols; c += kRowBytes) {
      const uint8_t* panel = panels + avx512::kPanelRows * c;
      tiles_.template load<kPanel0>(panel, kRowBytes);
      tiles_.template load<kTokens0>(q + c, cols);
      tiles_.template dot<kSum00, kTokens0, kPanel0>();
      tiles_.template load<kPanel1>(panel + avx512::kPanelRows * cols, kRowBytes);
      tiles_.template dot<kSum01, kTokens0, kPanel1>();
      if constexpr (kBoth) {
        tiles_.template load<kTokens1>(q + kTileRows * cols + c, cols);
        tiles_.template dot<kSum10, kTokens1, kPanel0>();
        tiles_.template dot<kSum11, kTokens1, kPanel1>();
      }
    }
    constexpr int64_t kSumsBytes = avx512::kBlockRows * sizeof(int32_t);  // of one token
    int32_t* second = sums + kTileRows * avx512::kBlockRows;
    tiles_.template store<kSum00>(sums, kSumsBytes);
    tiles_.template store<kSum01>(sums + avx512::kPanelRows, kSumsBytes);
    if constexpr (kBoth) tiles_.template store<kSum10>(second, kSumsBytes);
    if constexpr (kBoth) tiles_.template store<kSum11>(second + avx512::kPanelRows, kSumsBytes);
  }

  T tiles_;
  int64_t configured_ = 0;  // tokens that the tiles are shaped for
};

template <class T>
void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  avx512::PanelGemm<TileMultiplier<T>>(w, x, y).run(row_begin, row_end);
}

}  // namespace taper::amx
