#include "apis/solver_product.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "apis/solver_clones.hpp"

namespace taper {
namespace {

constexpr int64_t kTile = 64;  // columns of a tile: 4 lines of 64 are 16 of AVX-512's 32 registers

struct Tile {
  float* out;
  int64_t out_stride;
  const float* a;
  int64_t a_stride;
  const float* packed;   // a line of kTile columns for each term
  const uint8_t* terms;  // the terms that count
  int64_t num_terms;
};

template <int64_t kLines, int64_t kWidth>
[[gnu::always_inline]] inline void add_tile(const Tile& tile) {
  // In vectors, or GCC would exchange the loops of a single line and keep the sums in memory.
  constexpr int64_t kVectors = kWidth / kProductColumns;
  float sums[kLines][kVectors][kProductColumns];
  for (int64_t i = 0; i < kLines; ++i) std::memcpy(sums[i], tile.out + i * tile.out_stride, sizeof sums[i]);
  for (int64_t u = 0; u < tile.num_terms; ++u) {
    const int64_t t = tile.terms[u];
    const float* source = tile.packed + t * kTile;
    for (int64_t i = 0; i < kLines; ++i) {
      const float factor = tile.a[i * tile.a_stride + t];
      for (int64_t v = 0; v < kVectors; ++v)
        for (int64_t j = 0; j < kProductColumns; ++j)
          sums[i][v][j] = __builtin_fmaf(factor, source[v * kProductColumns + j], sums[i][v][j]);
    }
  }
  for (int64_t i = 0; i < kLines; ++i) std::memcpy(tile.out + i * tile.out_stride, sums[i], sizeof sums[i]);
}

template <int64_t kLines>
[[gnu::always_inline]] inline void add_width(const Tile& tile, int64_t width) {
  if (width > 48)
    add_tile<kLines, 64>(tile);
  else if (width > 32)
    add_tile<kLines, 48>(tile);
  else if (width > 16)
    add_tile<kLines, 32>(tile);
  else
    add_tile<kLines, 16>(tile);
}

TAPER_CLONES void add_lines(const Tile& tile, int64_t width) { add_width<kProductLines>(tile, width); }
TAPER_CLONES void add_line(const Tile& tile, int64_t width) { add_width<1>(tile, width); }

// Copies k lines of `width` columns side by side, the rest zero: in most models lines of b are a power of two apart,
// so that a tile's would fall on few sets of the cache. Returns whether any is not zero: of an untied embedding's
// moments only the diagonal's are.
TAPER_CLONES bool pack(const float* b, int64_t b_stride, int64_t k, int64_t width, float* packed) {
  uint32_t any = 0;
  for (int64_t t = 0; t < k; ++t) {
    uint32_t words[kTile] = {};
    if (width == kTile)
      std::memcpy(words, b + t * b_stride, sizeof words);
    else
      std::memcpy(words, b + t * b_stride, static_cast<size_t>(width) * sizeof(float));
    for (int64_t j = 0; j < kTile; ++j) any |= words[j];
    std::memcpy(packed + t * kTile, words, sizeof words);
  }
  return any != 0;
}

// Of the next tile, while this one is multiplied: its lines lie apart, and packing would wait for each.
void prefetch(const float* b, int64_t b_stride, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t j = 0; j < kTile; j += kProductColumns) __builtin_prefetch(b + t * b_stride + j);
}

// Indices of the terms that are not zero.
int64_t used_terms(const float* a, int64_t k, uint8_t* terms) {
  int64_t count = 0;
  for (int64_t t = 0; t < k; ++t) {
    terms[count] = static_cast<uint8_t>(t);
    count += a[t] != 0.0f;
  }
  return count;
}

struct Terms {
  uint8_t indices[kProductTerms];
  int64_t count;
};

// `terms` holds an entry for each `lines` lines, or one for all of them.
template <typename Add>
void add_product(const Product& p, int64_t lines, const std::vector<Terms>& terms, Add add) {
  const int64_t share = (p.k * lines + p.m - 1) / p.m;
  alignas(64) float packed[kProductTerms * kTile];
  for (int64_t c = 0; c < p.n; c += kTile) {
    const int64_t width = std::min(kTile, p.n - c);
    if (!pack(p.b + c, p.b_stride, p.k, width, packed)) continue;
    for (int64_t r = 0; r < p.m; r += lines) {
      const int64_t group = r / lines;
      prefetch(p.b + c + kTile, p.b_stride, group * share, std::min((group + 1) * share, p.k));
      const Terms& used = terms[terms.size() == 1 ? 0 : static_cast<size_t>(group)];
      if (used.count == 0) continue;
      add({p.out + r * p.out_stride + c, p.out_stride, p.a + r * p.a_stride, p.a_stride, packed, used.indices,
           used.count},
          width);
    }
  }
}

}  // namespace

void add_dense(const Product& p) {
  thread_local std::vector<Terms> terms(1);
  for (int64_t t = 0; t < p.k; ++t) terms[0].indices[t] = static_cast<uint8_t>(t);
  terms[0].count = p.k;
  add_product(p, kProductLines, terms, add_lines);
}

void add_sparse(const Product& p) {
  thread_local std::vector<Terms> terms;
  terms.resize(static_cast<size_t>(p.m));
  for (int64_t r = 0; r < p.m; ++r) {
    Terms& used = terms[static_cast<size_t>(r)];
    used.count = used_terms(p.a + r * p.a_stride, p.k, used.indices);
  }
  add_product(p, 1, terms, add_line);
}

}  // namespace taper
