// Planes to panels, the layout that matrix kernels multiply: sixteen rows, four columns of each side by side.
//
// Byte [c / 4][r][c % 4] of a panel is row r, column c. One load of 64 bytes is then four columns of sixteen rows: an
// operand of vpdpbusd whose sixteen sums are sixteen output rows, and a row of an AMX tile. The transposition is done
// on the planes' own bytes, which are bits / 8 of the panel's: lane r of a register gets the bytes that row r has at
// one place, and the lookup of unpack.hpp, which works byte by byte, leaves them in their lanes.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "taper/kernels.hpp"
#include "unpack_row.hpp"

namespace taper::avx512 {

inline constexpr int kPanelRows = 16;
inline constexpr int kQuad = 4;  // registers of one dword of sixteen rows each

// Offsets of a panel's rows; those past the matrix repeat its last row.
struct PanelRows {
  PanelRows(int64_t row, int64_t row_end, int64_t stride) {
    for (int r = 0; r < kPanelRows; ++r) at[r] = std::min(row + r, row_end - 1) * stride;
  }
  int64_t at[kPanelRows];
};

// Lane r of out[i] is dword i of the kBytes bytes at base + at[r]. With 8 bytes out[2] and out[3] hold nothing.
template <int kBytes>
TAPER_INLINE inline void load_quad(const uint8_t* base, const PanelRows& rows, __m512i* out) {
  __m512i lines[kQuad];  // lines[i]: rows i, 4 + i, 8 + i and 12 + i
  unroll<kQuad>([&](auto i) TAPER_INLINE {
    const auto load = [&](int r) TAPER_INLINE {
      const auto* bytes = reinterpret_cast<const __m128i*>(base + rows.at[r]);
      return kBytes == 8 ? _mm_loadl_epi64(bytes) : _mm_loadu_si128(bytes);
    };
    __m512i line = _mm512_castsi128_si512(load(i));
    line = _mm512_inserti32x4(line, load(4 + i), 1);
    line = _mm512_inserti32x4(line, load(8 + i), 2);
    lines[i] = _mm512_inserti32x4(line, load(12 + i), 3);
  });
  const __m512i low01 = _mm512_unpacklo_epi32(lines[0], lines[1]), low23 = _mm512_unpacklo_epi32(lines[2], lines[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  if constexpr (kBytes == 16) {
    const __m512i high01 = _mm512_unpackhi_epi32(lines[0], lines[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(lines[2], lines[3]);
    out[2] = _mm512_unpacklo_epi64(high01, high23);
    out[3] = _mm512_unpackhi_epi64(high01, high23);
  }
}

// kBytes bytes of each plane at `byte` of a block of `width` columns that begins at `column`.
template <int kBits, int kBytes>
inline void unpack_quad(const PlaneLookup<kBits>& lookup, const PlanesView& w, const PanelRows& rows, int64_t column,
                        int64_t width, int64_t byte, uint8_t* panel) {
  __m512i planes[kBits][kQuad];
  for (int k = 0; k < kBits; ++k) load_quad<kBytes>(w.planes[k] + column / 8 + byte, rows, planes[k]);
  unroll<kBytes / 4>([&](auto i) TAPER_INLINE {
    __m512i p[kBits];
    for (int k = 0; k < kBits; ++k) p[k] = planes[k][i];
    const auto fields = lookup.gather(p);
    unroll<kGroups>([&](auto g) TAPER_INLINE {
      const int64_t first = column + width / 8 * g + byte + 4 * i;
      _mm512_store_si512(panel + kPanelRows * first, lookup.template find<g>(fields));
    });
  });
}

// A panel of rows that share one table. The next panel's planes, which lie together, are asked for meanwhile and in the
// order of memory: 1024 weights of 4 bits take 105 cycles with planes in cache, and out of 23 MB of planes (Zen 4) 120
// so, 140 with a hint to the L2 only, 205 when asked for row by row at a stride of cols / 8 bytes, 240 without asking.
template <int kBits>
void unpack_panel(const PlaneLookup<kBits>& lookup, const PlanesView& w, const PanelRows& rows, uint8_t* panel) {
  int64_t ahead = rows.at[0] + kPanelRows * w.cols / 8;
  const auto prefetch = [&](int64_t bytes) {
    for (int k = 0; k < kBits; ++k) {
      for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(w.planes[k] + ahead + i, _MM_HINT_T0);
    }
    ahead += bytes;
  };
  int64_t column = 0;
  for (int64_t width = 512; width >= 128; width /= 2) {
    for (; column + width <= w.cols; column += width) {
      for (int byte = 0; byte < width / 8; byte += 16) {
        prefetch(16 * kPanelRows);
        unpack_quad<kBits, 16>(lookup, w, rows, column, width, byte, panel);
      }
    }
  }
  if (column < w.cols) unpack_quad<kBits, 8>(lookup, w, rows, column, 64, 0, panel);
}

// A panel of rows with tables of their own: unpacked row by row into `values` (16, cols), then transposed.
template <int kBits>
void unpack_panel_of_tables(const PlanesView& w, const int8_t* table, int flip, int64_t row, int64_t row_end,
                            uint8_t* values, uint8_t* panel) {
  const int64_t count = std::min<int64_t>(kPanelRows, row_end - row);
  for (int64_t r = 0; r < count; ++r) {
    unpack_row(PlaneLookup<kBits>(table + (row + r) * w.table_stride, flip), w, row + r, values + r * w.cols);
  }
  const PanelRows rows(0, count, w.cols);
  for (int64_t column = 0; column < w.cols; column += 16) {
    __m512i quad[kQuad];
    load_quad<16>(values + column, rows, quad);
    unroll<kQuad>([&](auto i) TAPER_INLINE { _mm512_store_si512(panel + kPanelRows * (column + 4 * i), quad[i]); });
  }
}

}  // namespace taper::avx512
