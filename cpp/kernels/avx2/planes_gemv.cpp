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

template <int kBits, int kTokens>
class RowQuad {
 public:
  RowQuad(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, const uint8_t* magnitudes)
      : w_(w), x_(x), y_(y), token_(token), stride_(w.cols / 8), lookup_(w.table) {
    std::copy(w.planes, w.planes + kBits, planes_);
    for (int t = 0; t < kTokens; ++t) {
      q_[t] = x.q + (token + t) * w.cols;
      magnitudes_[t] = magnitudes + (token + t) * w.cols;
    }
  }

  // Rows row .. row + count - 1; rows past the count repeat the last one.
  void run(int64_t row, int count) const {
    int64_t at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = (row + std::min(r, count - 1)) * stride_;
    __m256i lanes[kRows][kTokens];
    for (int r = 0; r < kRows; ++r) whole_blocks(at[r], lanes[r]);
    __m256i pairs[2][kTokens];
    unroll<kTokens>([&](auto t) TAPER_INLINE {
      pairs[0][t] = fold_pair(lanes[0][t], lanes[1][t]);
      pairs[1][t] = fold_pair(lanes[2][t], lanes[3][t]);
    });
    int64_t column = w_.cols / 256 * 256;
    if (w_.cols & 128) {
      for (int i = 0; i < 2; ++i) block_128(at + 2 * i, column, pairs[i]);
      column += 128;
    }
    __m256i halves[kTokens];
    unroll<kTokens>([&](auto t) TAPER_INLINE { halves[t] = fold_quad(pairs[0][t], pairs[1][t]); });
    if (w_.cols & 64) block_64(at, column, halves);
    unroll<kTokens>([&](auto t) TAPER_INLINE { store_rows(w_, x_, y_, token_ + t, row, count, fold_last(halves[t])); });
  }

 private:
  // Blocks of 512 and 256 columns of one row.
  TAPER_INLINE void whole_blocks(int64_t at, __m256i* lanes) const {
    __m256i acc[kTokens] = {};
    int64_t column = 0;
    for (; column + 512 <= w_.cols; column += 512) {
      prefetch(at + column / 8);
      block(at + column / 8, column, 64, acc);
      block(at + column / 8 + 32, column + 32, 64, acc);
    }
    if (w_.cols & 256) {
      prefetch(at + column / 8);
      block(at + column / 8, column, 32, acc);
    }
    unroll<kTokens>([&](auto t) TAPER_INLINE { lanes[t] = acc[t]; });
  }

  // 32 bytes of each plane; group g begins at column + pitch * g.
  TAPER_INLINE void block(int64_t at, int64_t column, int64_t pitch, __m256i* acc) const {
    __m256i p[kBits];
    unroll<kBits>([&](auto k) TAPER_INLINE { p[k] = load_256(planes_[k] + at); });
    multiply(p, acc, [&](const void* row, int g) TAPER_INLINE {
      return load_256(static_cast<const uint8_t*>(row) + column + pitch * g);
    });
  }

  // Two rows share a register.
  void block_128(const int64_t* at, int64_t column, __m256i* acc) const {
    prefetch(at[0] + column / 8);
    __m256i p[kBits];
    unroll<kBits>([&](auto k) TAPER_INLINE {
      const uint8_t* plane = planes_[k] + column / 8;
      p[k] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(plane + at[0])), load_128(plane + at[1]), 1);
    });
    multiply(p, acc, [&](const void* row, int g) TAPER_INLINE {
      return _mm256_broadcastsi128_si256(load_128(static_cast<const uint8_t*>(row) + column + 16 * g));
    });
  }

  // Four rows share a register, in the order of fold_quad.
  void block_64(const int64_t* at, int64_t column, __m256i* acc) const {
    prefetch(at[0] + column / 8);
    __m256i p[kBits];
    unroll<kBits>([&](auto k) TAPER_INLINE {
      const uint8_t* plane = planes_[k] + column / 8;
      p[k] = _mm256_setr_epi64x(load_64(plane + at[0]), load_64(plane + at[2]), load_64(plane + at[1]),
                                load_64(plane + at[3]));
    });
    multiply(p, acc, [&](const void* row, int g) TAPER_INLINE {
      return _mm256_set1_epi64x(load_64(static_cast<const uint8_t*>(row) + column + 8 * g));
    });
  }

  // load(row, g): the lanes of group g of a row of activations.
  template <class Load>
  TAPER_INLINE void multiply(const __m256i* p, __m256i* acc, Load load) const {
    lookup_(p, [&](int g, __m256i weights) TAPER_INLINE {
      unroll<kTokens>([&](auto t) TAPER_INLINE {
        acc[t] = multiply_add(acc[t], weights, load(q_[t], g), load(magnitudes_[t], g));
      });
    });
  }

  TAPER_INLINE void prefetch(int64_t at) const {
    unroll<kBits>([&](auto k) TAPER_INLINE { _mm_prefetch(planes_[k] + at + kPrefetchBytes, _MM_HINT_T0); });
  }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int64_t token_;
  const int64_t stride_;  // bytes between rows of a plane
  const PlaneLookup<kBits> lookup_;
  const uint8_t* planes_[kBits];
  const int8_t* q_[kTokens];
  const uint8_t* magnitudes_[kTokens];
};

}  // namespace

void planes_gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  const uint8_t* magnitudes = take_magnitudes(x, w.cols);
  with_bits(w.bits, [&]<int kBits>() {
    auto run = [&]<int kTokens>(int64_t token) {
      const RowQuad<kBits, kTokens> quad(w, x, y, token, magnitudes);
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        quad.run(row, static_cast<int>(std::min<int64_t>(kRows, row_end - row)));
      }
    };
    for (int64_t token = 0; token < x.tokens; token += kMaxTokens) {
      switch (std::min<int64_t>(kMaxTokens, x.tokens - token)) {
        case 1:
          run.template operator()<1>(token);
          break;
        case 2:
          run.template operator()<2>(token);
          break;
        case 3:
          run.template operator()<3>(token);
          break;
        default:
          run.template operator()<4>(token);
      }
    }
  });
}

}  // namespace taper::avx2
