// Matrix times a few tokens: weights are unpacked in registers, once for up to four tokens.
//
// Products: maddubs(|q|, sign(w, q)) adds two products into 16 bits; with |w|, |q| <= 127 that is at most 32258, so it
// never saturates.
#include "kernels/common/scratch.hpp"
#include "rows.hpp"
#include "unpack.hpp"

namespace taper::avx2 {
namespace {

constexpr int kMaxTokens = 4;
constexpr int64_t kPrefetchBytes = 2048;

// magnitudes: (x.tokens, cols) |q|.
const uint8_t* take_magnitudes(const ActivationsView& x, int64_t cols) {
  uint8_t* magnitudes = scratch(x.tokens * cols);
  for (int64_t i = 0; i < x.tokens * cols; i += 32) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(magnitudes + i), _mm256_abs_epi8(load_256(x.q + i)));
  }
  return magnitudes;
}

TAPER_INLINE inline __m256i multiply_add(__m256i acc, __m256i weights, __m256i q, __m256i magnitude) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(weights, q));
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  asm("" : "+x"(acc));  // else GCC sums a block as a tree, whose leaves do not fit in 16 registers
  return acc;
}

// Rows row .. row + 3 for 1..kMaxTokens tokens. Only the blocks of 512 and 256 columns are compiled for a number of
// tokens.
template <int kBits>
class RowQuad {
 public:
  RowQuad(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, const uint8_t* magnitudes)
      : w_(w),
        x_(x),
        y_(y),
        token_(token),
        tokens_(static_cast<int>(std::min<int64_t>(kMaxTokens, x.tokens - token))),
        stride_(w.cols / 8),
        lookup_(w.table) {
    std::copy(w.planes, w.planes + kBits, planes_);
    for (int t = 0; t < kMaxTokens; ++t) {
      const int64_t from = (token + std::min(t, tokens_ - 1)) * w.cols;
      q_[t] = x.q + from;
      magnitudes_[t] = magnitudes + from;
    }
  }

  // Rows past the count repeat the last one.
  void run(int64_t row, int count) const {
    int64_t at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = (row + std::min(r, count - 1)) * stride_;
    __m256i lanes[kRows][kMaxTokens];
    for (int r = 0; r < kRows; ++r) whole_blocks(at[r], lanes[r]);
    __m256i pairs[2][kMaxTokens], quad[kMaxTokens];
    for (int t = 0; t < tokens_; ++t) {
      pairs[0][t] = fold_pair(lanes[0][t], lanes[1][t]);
      pairs[1][t] = fold_pair(lanes[2][t], lanes[3][t]);
    }
    int64_t column = w_.cols / 256 * 256;
    if (w_.cols & 128) {
      for (int i = 0; i < 2; ++i) block_128(at + 2 * i, column, pairs[i]);
      column += 128;
    }
    for (int t = 0; t < tokens_; ++t) quad[t] = fold_quad(pairs[0][t], pairs[1][t]);
    if (w_.cols & 64) block_64(at, column, quad);
    for (int t = 0; t < tokens_; ++t) store_rows(w_, x_, y_, token_ + t, row, count, fold_last(quad[t]));
  }

 private:
  // Three tokens run as four, of which the last repeats.
  TAPER_INLINE void whole_blocks(int64_t at, __m256i* lanes) const {
    switch (tokens_) {
      case 1:
        return whole_blocks_of<1>(at, lanes);
      case 2:
        return whole_blocks_of<2>(at, lanes);
      default:
        return whole_blocks_of<kMaxTokens>(at, lanes);
    }
  }

  // Blocks of 512 and 256 columns of one row.
  template <int kTokens>
  TAPER_INLINE void whole_blocks_of(int64_t at, __m256i* lanes) const {
    __m256i acc[kTokens] = {};
    const int64_t end = w_.cols / 512 * 512;
    for (int64_t column = 0; column < end; column += 512) {
      prefetch(at + column / 8);
      for (int64_t half = 0; half < 64; half += 32) block<64>(at + column / 8 + half, column + half, acc);
    }
    if (w_.cols & 256) {
      prefetch(at + end / 8);
      block<32>(at + end / 8, end, acc);
    }
    unroll<kTokens>([&](auto t) TAPER_INLINE { lanes[t] = acc[t]; });
  }

  // 32 bytes of each plane; group g begins at column + kPitch * g.
  template <int kPitch, int kTokens>
  TAPER_INLINE void block(int64_t at, int64_t column, __m256i (&acc)[kTokens]) const {
    __m256i p[kBits];
    unroll<kBits>([&](auto k) TAPER_INLINE { p[k] = load_256(planes_[k] + at); });
    lookup_(p, [&](int g, __m256i weights) TAPER_INLINE {
      unroll<kTokens>([&](auto t) TAPER_INLINE {
        const int64_t from = column + kPitch * g;
        acc[t] = multiply_add(acc[t], weights, load_256(q_[t] + from), load_256(magnitudes_[t] + from));
      });
    });
  }

  // Two rows share a register.
  void block_128(const int64_t* at, int64_t column, __m256i* acc) const {
    prefetch(at[0] + column / 8);
    __m256i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* plane = planes_[k] + column / 8;
      p[k] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(plane + at[0])), load_128(plane + at[1]), 1);
    }
    multiply(p, acc, [&](const void* row, int g) TAPER_INLINE {
      return _mm256_broadcastsi128_si256(load_128(static_cast<const uint8_t*>(row) + column + 16 * g));
    });
  }

  // Four rows share a register, in the order of fold_quad.
  void block_64(const int64_t* at, int64_t column, __m256i* acc) const {
    prefetch(at[0] + column / 8);
    __m256i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* plane = planes_[k] + column / 8;
      p[k] = _mm256_setr_epi64x(load_64(plane + at[0]), load_64(plane + at[2]), load_64(plane + at[1]),
                                load_64(plane + at[3]));
    }
    multiply(p, acc, [&](const void* row, int g) TAPER_INLINE {
      return _mm256_set1_epi64x(load_64(static_cast<const uint8_t*>(row) + column + 8 * g));
    });
  }

  // load(row, g): the lanes of group g of a row of activations.
  template <class Load>
  TAPER_INLINE void multiply(const __m256i* p, __m256i* acc, Load load) const {
    __m256i weights[kGroups];
    lookup_(p, [&](int g, __m256i values) TAPER_INLINE { weights[g] = values; });
    for (int t = 0; t < tokens_; ++t) {
      for (int g = 0; g < kGroups; ++g) {
        acc[t] = multiply_add(acc[t], weights[g], load(q_[t], g), load(magnitudes_[t], g));
      }
    }
  }

  TAPER_INLINE void prefetch(int64_t at) const {
    for (int k = 0; k < kBits; ++k) _mm_prefetch(planes_[k] + at + kPrefetchBytes, _MM_HINT_T0);
  }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int64_t token_;
  const int tokens_;
  const int64_t stride_;  // bytes between rows of a plane
  const PlaneLookup<kBits> lookup_;
  const uint8_t* planes_[kBits];
  const int8_t* q_[kMaxTokens];
  const uint8_t* magnitudes_[kMaxTokens];
};

}  // namespace

void planes_gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  const uint8_t* magnitudes = take_magnitudes(x, w.cols);
  with_bits(w.bits, [&]<int kBits>() {
    for (int64_t token = 0; token < x.tokens; token += kMaxTokens) {
      const RowQuad<kBits> quad(w, x, y, token, magnitudes);
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        quad.run(row, static_cast<int>(std::min<int64_t>(kRows, row_end - row)));
      }
    }
  });
}

}  // namespace taper::avx2
