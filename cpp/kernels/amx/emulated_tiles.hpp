// The instructions of tiles.hpp as the Intel SDM writes them down (volume 2: LDTILECFG, TILELOADD, TILEZERO, TDPBSSD,
// TILESTORED), so that everything about the kernel but the silicon is tested where there is none. What would fault
// throws std::logic_error.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "tiles.hpp"

namespace taper::amx {

class EmulatedTiles {
 public:
  void configure(const TileConfig& config) {
    const auto zero = [](auto x) { return x == 0; };
    fault_unless(config.palette == 1 && config.start_row == 0, "palette or start row");
    fault_unless(std::all_of(config.reserved, std::end(config.reserved), zero), "reserved bytes");
    for (int i = 0; i < 16; ++i) {
      const int rows = config.rows[i], bytes = config.row_bytes[i];
      fault_unless(rows <= kTileRows && bytes <= kRowBytes && (rows == 0) == (bytes == 0), "shape of a tile");
      fault_unless(i < kTiles || rows == 0, "tile past the last");
      if (i < kTiles) tiles_[i] = {rows, bytes, {}};
    }
    configured_ = true;
  }

  void release() { configured_ = false; }

  template <int kTile>
  void zero() {
    std::memset(at(kTile).data, 0, sizeof(Tile::data));
  }

  template <int kTile>
  void load(const void* rows, int64_t stride) {
    Tile& tile = at(kTile);
    std::memset(tile.data, 0, sizeof tile.data);
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(tile.data[r], static_cast<const char*>(rows) + r * stride, static_cast<size_t>(tile.bytes));
    }
  }

  template <int kTile>
  void store(void* rows, int64_t stride) {
    const Tile& tile = at(kTile);
    for (int r = 0; r < tile.rows; ++r) {
      std::memcpy(static_cast<char*>(rows) + r * stride, tile.data[r], static_cast<size_t>(tile.bytes));
    }
  }

  template <int kSum, int kA, int kB>
  void dot() {
    static_assert(kSum != kA && kSum != kB && kA != kB);
    Tile &sum = at(kSum), &a = at(kA), &b = at(kB);
    fault_unless(sum.rows == a.rows && sum.bytes == b.bytes && a.bytes == 4 * b.rows, "shapes of a product");
    for (int m = 0; m < sum.rows; ++m) {
      uint32_t row[kRowBytes / 4];
      std::memcpy(row, sum.data[m], sizeof row);
      for (int k = 0; k < a.bytes / 4; ++k) {
        for (int n = 0; n < sum.bytes / 4; ++n) {
          for (int i = 0; i < 4; ++i) row[n] += static_cast<uint32_t>(a.data[m][4 * k + i] * b.data[k][4 * n + i]);
        }
      }
      std::memcpy(sum.data[m], row, sizeof row);
    }
  }

 private:
  struct Tile {
    int rows;
    int bytes;
    int8_t data[kTileRows][kRowBytes];
  };

  static void fault_unless(bool right, const char* what) {
    if (!right) throw std::logic_error(std::string("AMX would fault: ") + what);
  }

  Tile& at(int index) {
    fault_unless(configured_ && tiles_[index].rows != 0, "a tile without a shape");
    return tiles_[index];
  }

  bool configured_ = false;
  Tile tiles_[kTiles];
};

}  // namespace taper::amx
