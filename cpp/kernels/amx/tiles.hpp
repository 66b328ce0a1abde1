// The tile instructions of AMX int8 as a small interface, implemented twice: here by the processor, in
// emulated_tiles.hpp by plain code. Written as assembly because GCC's intrinsics take literal register numbers only,
// and because those of GCC 12 declare 8 of the 64 bytes of a configuration as read, so that its stores are lost.
#pragma once

#include <cstdint>

namespace taper::amx {

inline constexpr int kTiles = 8;
inline constexpr int kTileRows = 16;
inline constexpr int kRowBytes = 64;

// Operand of ldtilecfg (Intel SDM, volume 1, "Programming with Intel AMX").
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

struct Tiles {
  void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
  void release() { __asm__ volatile("tilerelease"); }

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // Rows lie `stride` bytes apart.
  template <int kTile>
  void load(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(void* rows, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  // sum[m][n] += over k and i: a[m][4 k + i] * b[k][4 n + i], int8 both.
  template <int kSum, int kA, int kB>
  void dot() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

}  // namespace taper::amx
