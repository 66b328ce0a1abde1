// Matrix times many tokens with AMX int8.
//
// The first factor of a product is a tile of weights, 16 rows of 64 columns as they come out of a row's planes; the
// second is a tile of activations, packed: byte [c / 4][t][c % 4] is column c of token t. 32 rows of 512 columns, a
// slab, are unpacked into the L1 and multiplied from there by tile after tile of tokens before the next slab is, two
// tiles of each for four products. The sums of 16 rows and 16 tokens are turned over at the end.
//
// A Xeon of 4.0 GHz with L1 of 48 KiB and L2 of 2 MiB, one core, cycles for 1024 weights (16 x 64) of 4 bits in cache:
// to unpack them 58 (of 16 rows at once as the panels of avx512/ 130); a product of 32768 operations 17.5 from
// registers, 19.5 with both factors from the L1, 42 as it was with both from the L2, 31 with the weights from the L1
// and the tokens from the L2, a third of which is the sums' way there and back between slabs (23 without). Tried
// without a gain: 1024 columns (34), 256 (34), four tiles of rows by one of tokens (31), sums added by vectors (34).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels/avx512/panel_store.hpp"
#include "kernels/avx512/panels.hpp"
#include "kernels/avx512/unpack.hpp"
#include "kernels/common/scratch.hpp"
#include "tiles.hpp"

namespace taper::amx {

inline constexpr int64_t kTileBytes = kTileRows * kRowBytes;
inline constexpr int64_t kTileSums = kTileRows * kTileRows;
inline constexpr int64_t kSlabCols = 512;
inline constexpr int64_t kSlabRows = 2 * kTileRows;

inline int64_t tiles_of(int64_t tokens) { return (tokens + kTileRows - 1) / kTileRows; }

// Tokens first .. first + 15 of q (tokens, cols) as cols / 64 tiles; past the last token it repeats.
inline void pack_tile(const int8_t* q, int64_t tokens, int64_t cols, int64_t first, int8_t* packed) {
  const avx512::PanelRows rows(first, tokens, cols);
  for (int64_t column = 0; column < cols; column += 16) {
    __m512i quad[avx512::kQuad];
    avx512::load_quad<16>(reinterpret_cast<const uint8_t*>(q) + column, rows, quad);
    unroll<avx512::kQuad>([&](auto i)
                              TAPER_INLINE { _mm512_storeu_si512(packed + kTileRows * (column + 4 * i), quad[i]); });
  }
}

inline void pack_inputs(const int8_t* q, int64_t tokens, int64_t cols, int64_t begin, int64_t end, int8_t* packed) {
  for (int64_t first = begin; first < end; first += kTileRows) {
    pack_tile(q, tokens, cols, first, packed + first * cols);
  }
}

// out[c]: column c of a tile of sums.
TAPER_INLINE inline void columns_of(const int32_t* sums, __m512i* out) {
  __m512i a[16], b[16];
  unroll<16>([&](auto i) TAPER_INLINE { a[i] = _mm512_load_si512(sums + 16 * i); });
  unroll<8>([&](auto i) TAPER_INLINE {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  });
  // a[4 k + c]: rows 4 k .. 4 k + 3 of the columns c, 4 + c, 8 + c and 12 + c.
  unroll<4>([&](auto k) TAPER_INLINE {
    a[4 * k] = _mm512_unpacklo_epi64(b[4 * k], b[4 * k + 2]);
    a[4 * k + 1] = _mm512_unpackhi_epi64(b[4 * k], b[4 * k + 2]);
    a[4 * k + 2] = _mm512_unpacklo_epi64(b[4 * k + 1], b[4 * k + 3]);
    a[4 * k + 3] = _mm512_unpackhi_epi64(b[4 * k + 1], b[4 * k + 3]);
  });
  unroll<4>([&](auto c) TAPER_INLINE {
    const __m512i low0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    out[c] = _mm512_shuffle_i32x4(low0, low1, 0x88);
    out[4 + c] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
    out[8 + c] = _mm512_shuffle_i32x4(high0, high1, 0x88);
    out[12 + c] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
  });
}

// T: Tiles or EmulatedTiles.
template <class T>
class TileGemm {
 public:
  TileGemm(const PlanesView& w, const ActivationsView& x, const OutputView& y)
      : w_(w),
        x_(x),
        y_(y),
        values_(avx512::parts_of(w)),
        inputs_(avx512::parts_of(x)),
        narrow_(values_ * inputs_ == 1),
        stride_(w.cols / 8) {}

  ~TileGemm() { tiles_.release(); }

  void run(int64_t row_begin, int64_t row_end) {
    TileConfig config;
    std::fill_n(config.rows, kTiles, static_cast<uint8_t>(kTileRows));
    std::fill_n(config.row_bytes, kTiles, static_cast<uint16_t>(kRowBytes));
    tiles_.configure(config);
    const int64_t all = tiles_of(x_.tokens);
    const int64_t fit = std::max<int64_t>(kCacheBytes / (kTileRows * w_.cols * inputs_), 2);
    const int64_t passes = (all + fit - 1) / fit, at_once = (all + passes - 1) / passes;
    allocate(std::min(all, at_once), x_.packed == nullptr);
    for (int64_t tile = 0; tile < all; tile += at_once) {
      begin_pass(tile, std::min(at_once, all - tile));
      avx512::with_bits(w_.bits, [&]<int kBits>() { rows<kBits>(row_begin, row_end); });
    }
  }

 private:
  // Packed activations of a pass. The next pass unpacks the weights again.
  static constexpr int64_t kCacheBytes = 2048 * 1024;
  static constexpr int64_t kSlabBytes = kSlabRows * kSlabCols;
  // Tiles of tokens that take a slab long enough, 0.6 us. A burst of prefetches would stop at the core's 16 line
  // buffers: 512 tokens took 12 % of their time in those of a slab, of which there are 128 at 4 bits.
  static constexpr int64_t kTilesOfLatency = 4;

  template <int kBits>
  using Lookup = avx512::PlaneLookup<kBits>;

  // kSum01: of the first rows and the second tokens.
  enum Name { kSum00, kSum01, kSum10, kSum11, kRows0, kRows1, kTokens0, kTokens1 };

  void allocate(int64_t tiles, bool pack) {
    const int64_t sums = values_ * inputs_ * tiles * 2 * kTileSums * static_cast<int64_t>(sizeof(int32_t));
    const int64_t packed = pack ? inputs_ * tiles * kTileRows * w_.cols : 0;
    slab_ = scratch(kSlabBytes + sums + packed);
    sums_ = reinterpret_cast<int32_t*>(slab_ + kSlabBytes);
    own_ = reinterpret_cast<int8_t*>(slab_ + kSlabBytes + sums);
  }

  void begin_pass(int64_t tile, int64_t tiles) {
    first_tile_ = tile, num_tiles_ = tiles;
    for (int a = 0; a < inputs_; ++a) {
      const int8_t* packed = a == 0 ? x_.packed : x_.packed_low;
      if (x_.packed != nullptr) {
        q_[a] = packed + tile * kTileRows * w_.cols;
        continue;
      }
      int8_t* own = own_ + a * tiles * kTileRows * w_.cols;
      for (int64_t t = 0; t < tiles; ++t) {
        pack_tile(a == 0 ? x_.q : x_.low, x_.tokens, w_.cols, (tile + t) * kTileRows, own + t * kTileRows * w_.cols);
      }
      q_[a] = own;
    }
  }

  template <int kBits>
  void rows(int64_t row_begin, int64_t row_end) {
    const Lookup<kBits> high(w_.table, 0), low(values_ == 2 ? w_.low_table : w_.table, 0);
    for (int64_t row = row_begin; row < row_end; row += kSlabRows) {
      for (int64_t column = 0; column < w_.cols; column += kSlabCols) {
        const int64_t width = std::min(kSlabCols, w_.cols - column);
        look_ahead(row, row_end, column, width);
        for (int v = 0; v < values_; ++v) {
          unpack<kBits>(v == 0 ? high : low, row, row_end, column, width);
          for (int a = 0; a < inputs_; ++a) multiply(v, a, column, width);
        }
      }
      store(row, row_end);
    }
  }

  // What is asked for while a slab is at hand: the lines of the next one, or, where few tokens leave memory no time for
  // that, as much of the next 32 rows' planes, which lie together.
  void look_ahead(int64_t row, int64_t row_end, int64_t column, int64_t width) {
    far_ = num_tiles_ < kTilesOfLatency;
    const bool ends = column + width == w_.cols;
    const int64_t next_row = row + (far_ || ends ? kSlabRows : 0);
    next_ = next_row * stride_ + (far_ ? kSlabRows * column / 8 : ends ? 0 : (column + width) / 8);
    next_step_ = far_ ? width / 8 : stride_;
    last_ = row_end * stride_ - 1;
  }

  // The part of row r.
  TAPER_INLINE void ask(int64_t r) const {
    const int64_t at = std::min(next_ + r * next_step_, last_);
    for (int k = 0; k < w_.bits; ++k) _mm_prefetch(w_.planes[k] + at, _MM_HINT_T1);
  }

  // Column c of row r at [c / 64][r][c % 64] of the tiles of sixteen rows; past the last row it repeats.
  template <int kBits>
  void unpack(const Lookup<kBits>& shared, int64_t row, int64_t row_end, int64_t column, int64_t width) const {
    for (int64_t r = 0; r < kSlabRows; ++r) {
      const int64_t n = std::min(row + r, row_end - 1);
      if (far_) ask(r);
      uint8_t* out = slab_ + r / kTileRows * (kSlabBytes / 2) + r % kTileRows * kRowBytes;
      if (w_.table_stride == 0) {
        unpack_row<kBits>(shared, n, column, width, out);
      } else {
        unpack_row<kBits>(Lookup<kBits>(w_.table + n * w_.table_stride, 0), n, column, width, out);
      }
    }
  }

  template <int kBits>
  TAPER_INLINE void unpack_row(const Lookup<kBits>& lookup, int64_t row, int64_t column, int64_t width,
                               uint8_t* out) const {
    if (width == kSlabCols) return unpack_block<kBits, true>(lookup, row, column, width, out);
    int64_t done = 0;
    for (int64_t block = kSlabCols / 2; block >= kRowBytes; block /= 2) {
      if ((width & block) == 0) continue;
      unpack_block<kBits, false>(lookup, row, column + done, block, out + done / kRowBytes * kTileBytes);
      done += block;
    }
  }

  // `width` columns, a power of two; out: the row in the tile of the first.
  template <int kBits, bool kWhole>
  TAPER_INLINE void unpack_block(const Lookup<kBits>& lookup, int64_t row, int64_t column, int64_t width,
                                 uint8_t* out) const {
    const __mmask64 mask = (__mmask64{1} << (width / 8 % 64)) - 1;
    __m512i p[kBits];
    unroll<kBits>([&](auto k) TAPER_INLINE {
      const uint8_t* line = w_.planes[k] + row * stride_ + column / 8;
      p[k] = kWhole ? _mm512_loadu_si512(line) : _mm512_maskz_loadu_epi8(mask, line);
    });
    const auto fields = lookup.gather(p);
    unroll<avx512::kGroups>([&](auto g) TAPER_INLINE {
      const __m512i values = lookup.template find<g>(fields);
      if constexpr (kWhole) {
        _mm512_store_si512(out + g * kTileBytes, values);
      } else {
        const int64_t at = width / 8 * g;
        _mm512_mask_storeu_epi8(out + at / kRowBytes * kTileBytes + at % kRowBytes, mask, values);
      }
    });
  }

  // Of two tiles of rows and tile `tile` of tokens.
  int32_t* sums_of(int v, int a, int64_t tile) const {
    return sums_ + ((v * inputs_ + a) * num_tiles_ + tile) * 2 * kTileSums;
  }

  // Sums of one pair of tiles of tokens stay in their tiles from slab to slab.
  void multiply(int v, int a, int64_t column, int64_t width) {
    const bool stay = narrow_ && num_tiles_ <= 2;
    const bool load = column != 0 && !stay, zero = column == 0, store = column + width == w_.cols || !stay;
    const int64_t stride = kTileRows * w_.cols;
    for (int64_t tile = 0; tile < num_tiles_; tile += 2) {
      const int8_t* q = q_[a] + tile * stride + kTileRows * column;
      int32_t* sums = sums_of(v, a, tile);
      if (!far_ && v == 0 && a == 0) {
        for (int64_t r = kSlabRows * tile / num_tiles_; r < kSlabRows * (tile + 2) / num_tiles_; ++r) ask(r);
      }
      tile + 1 < num_tiles_ ? multiply<true>(q, stride, width, sums, zero, load, store)
                            : multiply<false>(q, stride, width, sums, zero, load, store);
    }
  }

  template <bool kBoth>
  void multiply(const int8_t* q, int64_t stride, int64_t width, int32_t* sums, bool zero, bool load, bool store) {
    if (zero) for_sums<kBoth>([&]<int kTile>() { tiles_.template zero<kTile>(); });
    if (load) for_sums<kBoth>([&]<int kTile>() { tiles_.template load<kTile>(sums + at<kTile>(), kRowBytes); });
    const uint8_t *first = slab_, *second = slab_ + kSlabBytes / 2;
    for (int64_t c = 0; c < width; c += kRowBytes) {
      const int64_t at = kTileRows * c;
      tiles_.template load<kTokens0>(q + at, kRowBytes);
      tiles_.template load<kRows0>(first + at, kRowBytes);
      tiles_.template dot<kSum00, kRows0, kTokens0>();
      tiles_.template load<kRows1>(second + at, kRowBytes);
      tiles_.template dot<kSum10, kRows1, kTokens0>();
      if constexpr (kBoth) {
        tiles_.template load<kTokens1>(q + stride + at, kRowBytes);
        tiles_.template dot<kSum01, kRows0, kTokens1>();
        tiles_.template dot<kSum11, kRows1, kTokens1>();
      }
    }
    if (store) for_sums<kBoth>([&]<int kTile>() { tiles_.template store<kTile>(sums + at<kTile>(), kRowBytes); });
  }

  // Sums (tokens, rows) of tiles.
  template <int kTile>
  static constexpr int64_t at() {
    return (kTile == kSum00 ? 0 : kTile == kSum10 ? 1 : kTile == kSum01 ? 2 : 3) * kTileSums;
  }

  template <bool kBoth, class F>
  static void for_sums(const F& f) {
    f.template operator()<kSum00>();
    f.template operator()<kSum10>();
    if constexpr (kBoth) f.template operator()<kSum01>();
    if constexpr (kBoth) f.template operator()<kSum11>();
  }

  void store(int64_t row, int64_t row_end) const {
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      for (int64_t p = 0; p < 2 && row + p * kTileRows < row_end; ++p) {
        const int64_t r = row + p * kTileRows, count = std::min<int64_t>(kTileRows, row_end - r);
        const int64_t token = (first_tile_ + tile) * kTileRows;
        narrow_ ? store_tile(sums_of(0, 0, tile) + p * kTileSums, token, r, count)
                : store_parts(tile, p, token, r, count);
      }
    }
  }

  // What store_panel does to a token's sums, for sixteen tokens and narrow values and activations.
  void store_tile(const int32_t* sums, int64_t token, int64_t row, int64_t count) const {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    const __m512 row_scale = _mm512_maskz_loadu_ps(mask, w_.row_scale + row);
    const __m512 bias = w_.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, w_.bias + row);
    __m512i columns[kTileRows];
    columns_of(sums, columns);
    unroll<kTileRows>([&](auto t) TAPER_INLINE {
      if (token + t >= x_.tokens) return;
      const __m512 alpha = _mm512_set1_ps(x_.scale[token + t] * w_.level_scale);
      __m512 out = _mm512_mul_ps(_mm512_cvtepi32_ps(columns[t]), _mm512_mul_ps(row_scale, alpha));
      if (w_.bias != nullptr) out = _mm512_add_ps(out, bias);
      const int64_t at = y_.at(token + t, row);
      if (y_.residual != nullptr) out = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y_.residual + at), out);
      _mm512_mask_storeu_ps(y_.out + at, mask, out);
    });
  }

  void store_parts(int64_t tile, int64_t p, int64_t token, int64_t row, int64_t count) const {
    avx512::PartSums sums{};
    for (int v = 0; v < values_; ++v) {
      for (int a = 0; a < inputs_; ++a) {
        int32_t* of = sums_of(v, a, tile) + p * kTileSums;
        __m512i columns[kTileRows];
        columns_of(of, columns);
        unroll<kTileRows>([&](auto t) TAPER_INLINE { _mm512_store_si512(of + kTileRows * t, columns[t]); });
        sums.at[v][a] = of;
      }
    }
    for (int64_t t = token; t < std::min(token + kTileRows, x_.tokens); ++t) {
      avx512::store_panel(w_, x_, y_, t, row, count, sums);
      for (auto& part : sums.at) {
        for (const int32_t*& of : part) of += of == nullptr ? 0 : kTileRows;
      }
    }
  }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int values_, inputs_;  // parts of a value and of an activation
  const bool narrow_;          // one of each
  const int64_t stride_;       // bytes between rows of a plane
  T tiles_;
  int64_t first_tile_ = 0, num_tiles_ = 0;  // of tokens, of the pass
  const int8_t* q_[2] = {};                 // packed tokens of the pass
  bool far_ = false;
  int64_t next_ = 0, next_step_ = 0, last_ = 0;  // of look_ahead, bytes of a plane
  uint8_t* slab_ = nullptr;
  int32_t* sums_ = nullptr;  // (values, inputs, tiles of tokens, tiles of rows, 16, 16)
  int8_t* own_ = nullptr;    // where the view has no packed tokens
};

template <class T>
void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  TileGemm<T>(w, x, y).run(row_begin, row_end);
}

}  // namespace taper::amx
