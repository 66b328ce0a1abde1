// Matrix times a few tokens: weights are unpacked in registers, once for up to four rows of activations. The two parts
// of a wide activation are two such rows; wide values go over the planes, which are in L1 then, with each of their
// tables.
//
// Products: maddubs(|q|, sign(w, q)) adds two products into 16 bits; with |w| <= 127 and |q| <= 128 that is at most
// 32512, so it never saturates.
#include "kernels/common/scratch.hpp"
#include "rows.hpp"
#include "unpack.hpp"

namespace taper::avx2 {
namespace {

constexpr int kMaxInputs = 4;
constexpr int64_t kPrefetchBytes = 2048;

// (x.tokens, cols) |q|, then as many |low| where there are low parts.
const uint8_t* take_magnitudes(const ActivationsView& x, int64_t cols) {
  const int64_t size = x.tokens * cols;
  uint8_t* magnitudes = scratch(size * (x.low == nullptr ? 1 : 2));
  auto take = [&](const int8_t* q, uint8_t* out) {
    for (int64_t i = 0; i < size; i += 32) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + i), _mm256_abs_epi8(load_256(q + i)));
    }
  };
  take(x.q, magnitudes);
  if (x.low != nullptr) take(x.low, magnitudes + size);
  return magnitudes;
}

TAPER_INLINE inline __m256i multiply_add(__m256i acc, __m256i weights, __m256i q, __m256i magnitude) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(weights, q));
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  asm("" : "+x"(acc));  // else GCC sums a block as a tree, whose leaves do not fit in 16 registers
  return acc;
}

// Rows row .. row + 3 for 1..kMaxInputs rows of activations (inputs). Only the blocks of 512 and 256 columns are
// compiled for a number of inputs.
template <int kBits>
class RowQuad {
 public:
  RowQuad(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, const uint8_t* magnitudes)
      : w_(w),
        x_(x),
        y_(y),
        token_(token),
        parts_(x.low == nullptr ? 1 : 2),
        inputs_(parts_ * static_cast<int>(std::min<int64_t>(tokens_at_once(x), x.tokens - token))),
        stride_(w.cols / 8),
        lookup_(w.table) {
    std::copy(w.planes, w.planes + kBits, planes_);
    for (int i = 0; i < kMaxInputs; ++i) {
      const int input = std::min(i, inputs_ - 1), part = input % parts_;
      const int64_t from = (token + input / parts_) * w.cols;
      q_[i] = (part == 0 ? x.q : x.low) + from;
      magnitudes_[i] = magnitudes + part * x.tokens * w.cols + from;
    }
  }

  static int tokens_at_once(const ActivationsView& x) { return x.low == nullptr ? kMaxInputs : kMaxInputs / 2; }

  // Rows past the count repeat the last one.
  void run(int64_t row, int count) const {
    __m128i sums[kMaxInputs];
    [[maybe_unused]] __m128i low_sums[kMaxInputs];
    const __m128i* low = sums;  // not read unless there is a low table
    if (w_.table_stride != 0) {
      own_tables(row, count, sums);
    } else {
      shared_table(lookup_, row, count, sums);
    }
    if (parts_ == 1 && w_.low_table == nullptr) {
      for (int i = 0; i < inputs_; ++i) store_rows(w_, x_, y_, token_ + i, row, count, sums[i]);
      return;
    }
    if constexpr (kBits >= 7) {
      if (w_.low_table != nullptr) {
        shared_table(Lookup(w_.low_table), row, count, low_sums);
        low = low_sums;
      }
    }
    for (int i = 0; i < inputs_; i += parts_) {
      store_parts(w_, x_, y_, token_ + i / parts_, row, count, sums + i, low + i);
    }
  }

 private:
  using Lookup = PlaneLookup<kBits>;

  TAPER_INLINE void shared_table(const Lookup& lookup, int64_t row, int count, __m128i* sums) const {
    int64_t at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = (row + std::min(r, count - 1)) * stride_;
    __m256i lanes[kRows][kMaxInputs];
    for (int r = 0; r < kRows; ++r) whole_blocks(lookup, at[r], lanes[r]);
    __m256i pairs[2][kMaxInputs], quad[kMaxInputs];
    for (int t = 0; t < inputs_; ++t) {
      pairs[0][t] = fold_pair(lanes[0][t], lanes[1][t]);
      pairs[1][t] = fold_pair(lanes[2][t], lanes[3][t]);
    }
    int64_t column = w_.cols / 256 * 256;
    if (w_.cols & 128) {
      for (int i = 0; i < 2; ++i) block_128(lookup, at + 2 * i, column, pairs[i]);
      column += 128;
    }
    for (int t = 0; t < inputs_; ++t) quad[t] = fold_quad(pairs[0][t], pairs[1][t]);
    if (w_.cols & 64) block_64(lookup, at, column, quad);
    for (int t = 0; t < inputs_; ++t) sums[t] = fold_last(quad[t]);
  }

  // Each row by itself, its last blocks in a part of a register: rows with different tables cannot share one.
  void own_tables(int64_t row, int count, __m128i* sums) const {
    __m256i lanes[kRows][kMaxInputs];
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = row + std::min(r, count - 1), column = w_.cols / 256 * 256;
      const Lookup lookup(w_.table + n * w_.table_stride);
      whole_blocks(lookup, n * stride_, lanes[r]);
      if (w_.cols & 128) own_rest(lookup, n * stride_, column, 16, lanes[r]);
      if (w_.cols & 64) own_rest(lookup, n * stride_, column + (w_.cols & 128), 8, lanes[r]);
    }
    for (int t = 0; t < inputs_; ++t) {
      sums[t] = fold_last(fold_quad(fold_pair(lanes[0][t], lanes[1][t]), fold_pair(lanes[2][t], lanes[3][t])));
    }
  }

  // The block of one row whose groups have 16 or 8 columns (bytes), zeros in the rest of the registers.
  void own_rest(const Lookup& lookup, int64_t at, int64_t column, int64_t bytes, __m256i* acc) const {
    auto load = [&](const uint8_t* p) {
      return _mm256_zextsi128_si256(bytes == 16 ? load_128(p) : _mm_cvtsi64_si128(load_64(p)));
    };
    __m256i p[kBits];
    for (int k = 0; k < kBits; ++k) p[k] = load(planes_[k] + at + column / 8);
    multiply(lookup, p, acc, [&](const void* row, int g) TAPER_INLINE {
      return load(static_cast<const uint8_t*>(row) + column + bytes * g);
    });
  }

  // Three inputs run as four, of which the last repeats.
  TAPER_INLINE void whole_blocks(const Lookup& lookup, int64_t at, __m256i* lanes) const {
    switch (inputs_) {
      case 1:
        return whole_blocks_of<1>(lookup, at, lanes);
      case 2:
        return whole_blocks_of<2>(lookup, at, lanes);
      default:
        return whole_blocks_of<kMaxInputs>(lookup, at, lanes);
    }
  }

  // Blocks of 512 and 256 columns of one row.
  template <int kInputs>
  TAPER_INLINE void whole_blocks_of(const Lookup& lookup, int64_t at, __m256i* lanes) const {
    __m256i acc[kInputs] = {};
    const int64_t end = w_.cols / 512 * 512;
    for (int64_t column = 0; column < end; column += 512) {
      prefetch(at + column / 8);
      for (int64_t half = 0; half < 64; half += 32) block<64>(lookup, at + column / 8 + half, column + half, acc);
    }
    if (w_.cols & 256) {
      prefetch(at + end / 8);
      block<32>(lookup, at + end / 8, end, acc);
    }
    unroll<kInputs>([&](auto t) TAPER_INLINE { lanes[t] = acc[t]; });
  }

  // 32 bytes of each plane; group g begins at column + kPitch * g.
  template <int kPitch, int kInputs>
  TAPER_INLINE void block(const Lookup& lookup, int64_t at, int64_t column, __m256i (&acc)[kInputs]) const {
    __m256i p[kBits];
    unroll<kBits>([&](auto k) TAPER_INLINE { p[k] = load_256(planes_[k] + at); });
    lookup(p, [&](int g, __m256i weights) TAPER_INLINE {
      unroll<kInputs>([&](auto t) TAPER_INLINE {
        const int64_t from = column + kPitch * g;
        acc[t] = multiply_add(acc[t], weights, load_256(q_[t] + from), load_256(magnitudes_[t] + from));
      });
    });
  }

  // Two rows share a register.
  void block_128(const Lookup& lookup, const int64_t* at, int64_t column, __m256i* acc) const {
    prefetch(at[0] + column / 8);
    __m256i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* plane = planes_[k] + column / 8;
      p[k] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(plane + at[0])), load_128(plane + at[1]), 1);
    }
    multiply(lookup, p, acc, [&](const void* row, int g) TAPER_INLINE {
      return _mm256_broadcastsi128_si256(load_128(static_cast<const uint8_t*>(row) + column + 16 * g));
    });
  }

  // Four rows share a register, in the order of fold_quad.
  void block_64(const Lookup& lookup, const int64_t* at, int64_t column, __m256i* acc) const {
    prefetch(at[0] + column / 8);
    __m256i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* plane = planes_[k] + column / 8;
      p[k] = _mm256_setr_epi64x(load_64(plane + at[0]), load_64(plane + at[2]), load_64(plane + at[1]),
                                load_64(plane + at[3]));
    }
    multiply(lookup, p, acc, [&](const void* row, int g) TAPER_INLINE {
      return _mm256_set1_epi64x(load_64(static_cast<const uint8_t*>(row) + column + 8 * g));
    });
  }

  // load(row, g): the lanes of group g of a row of activations.
  template <class Load>
  TAPER_INLINE void multiply(const Lookup& lookup, const __m256i* p, __m256i* acc, Load load) const {
    __m256i weights[kGroups];
    lookup(p, [&](int g, __m256i values) TAPER_INLINE { weights[g] = values; });
    for (int t = 0; t < inputs_; ++t) {
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
  const int parts_;       // of an activation
  const int inputs_;      // parts_ times the tokens
  const int64_t stride_;  // bytes between rows of a plane
  const Lookup lookup_;
  const uint8_t* planes_[kBits];
  const int8_t* q_[kMaxInputs];
  const uint8_t* magnitudes_[kMaxInputs];
};

}  // namespace

void planes_gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  const uint8_t* magnitudes = take_magnitudes(x, w.cols);
  with_bits(w.bits, [&]<int kBits>() {
    for (int64_t token = 0; token < x.tokens; token += RowQuad<kBits>::tokens_at_once(x)) {
      const RowQuad<kBits> quad(w, x, y, token, magnitudes);
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        quad.run(row, static_cast<int>(std::min<int64_t>(kRows, row_end - row)));
      }
    }
  });
}

}  // namespace taper::avx2
