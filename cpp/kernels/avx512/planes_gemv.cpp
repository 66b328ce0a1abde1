// Matrix times a few tokens: weights are unpacked in registers, once for up to four tokens.
#include "rows.hpp"
#include "unpack.hpp"

namespace taper::avx512 {
namespace {

constexpr int kMaxTokens = 4;  // 4 rows x 4 tokens of sums leave half of the registers for unpacking
// Memory latency is ~240 ns on large servers; 15 GB/s a core then needs 3.6 KB in flight over all streams together.
constexpr int64_t kPrefetchBytes = 2048;

template <int kBits, int kTokens>
class RowQuad {
 public:
  RowQuad(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token)
      : w_(w), x_(x), y_(y), token_(token), stride_(w.cols / 8), lookup_(w.table, kSignFlip) {
    for (int k = 0; k < kBits; ++k) planes_[k] = w.planes[k];
    for (int t = 0; t < kTokens; ++t) q_[t] = x.q + (token + t) * w.cols;
  }

  // Rows row .. row + count - 1; rows past the count repeat the last one.
  void run(int64_t row, int count) const {
    int64_t at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = (row + std::min(r, count - 1)) * stride_;
    __m512i sums[kTokens];
    int64_t column = whole_blocks(at, sums);
    if (w_.cols & 128) {
      block_128(at, column, sums);
      column += 128;
    }
    __m256i halves[kTokens];
    for (int t = 0; t < kTokens; ++t) halves[t] = fold_halves(sums[t]);
    if (w_.cols & 64) block_64(at, column, halves);
    for (int t = 0; t < kTokens; ++t) store_rows(w_, x_, y_, token_ + t, row, count, fold_last(halves[t]));
  }

 private:
  // Blocks of 512, then the one of 256; leaves four lanes a row in sums and returns the next column.
  int64_t whole_blocks(const int64_t* at, __m512i* sums) const {
    const int64_t end = w_.cols / 512 * 512;
    __m512i lanes[kRows][kTokens];
    for (int r = 0; r < kRows; ++r) row_blocks(at[r], end, lanes[r]);
    __m512i pairs[kTokens][2];
    unroll<kTokens>([&](auto t) TAPER_INLINE {
      pairs[t][0] = fold_pair(lanes[0][t], lanes[1][t]);
      pairs[t][1] = fold_pair(lanes[2][t], lanes[3][t]);
    });
    if (w_.cols & 256) block_256(at, end, pairs);
    unroll<kTokens>([&](auto t) TAPER_INLINE { sums[t] = fold_quad(pairs[t][0], pairs[t][1]); });
    return end + (w_.cols & 256);
  }

  // Columns 0 .. end - 1 of one row.
  TAPER_INLINE void row_blocks(int64_t at, int64_t end, __m512i* lanes) const {
    // A chain of the eight vpdpbusd of a block takes 40 cycles, the block's work 9 (one token) to 23 (four).
    constexpr int kChains = kTokens <= 2 ? 4 : 2;
    __m512i acc[kTokens][kChains] = {};
    for (int64_t column = 0; column < end; column += 512) {
      __m512i p[kBits];
      unroll<kBits>([&](auto k) TAPER_INLINE {
        const uint8_t* line = planes_[k] + at + column / 8;
        _mm_prefetch(line + kPrefetchBytes, _MM_HINT_T0);
        p[k] = _mm512_loadu_si512(line);
      });
      lookup_(p, [&](int g, __m512i weights) TAPER_INLINE {
        unroll<kTokens>([&](auto t) TAPER_INLINE {
          const __m512i q = _mm512_loadu_si512(q_[t] + column + 64 * g);
          acc[t][g % kChains] = _mm512_dpbusd_epi32(acc[t][g % kChains], weights, q);
        });
      });
    }
    unroll<kTokens>([&](auto t) TAPER_INLINE {
      lanes[t] = _mm512_add_epi32(acc[t][0], acc[t][1]);
      if constexpr (kChains == 4) lanes[t] = _mm512_add_epi32(lanes[t], _mm512_add_epi32(acc[t][2], acc[t][3]));
    });
  }

  // Two rows share a register.
  void block_256(const int64_t* at, int64_t column, __m512i (*pairs)[2]) const {
    for (int i = 0; i < 2; ++i) {
      __m512i p[kBits];
      for (int k = 0; k < kBits; ++k) {
        const uint8_t* a = planes_[k] + at[2 * i] + column / 8;
        const uint8_t* b = planes_[k] + at[2 * i + 1] + column / 8;
        _mm_prefetch(a + kPrefetchBytes, _MM_HINT_T0);
        p[k] = _mm512_inserti64x4(_mm512_castsi256_si512(load_256(a)), load_256(b), 1);
      }
      lookup_(p, [&](int g, __m512i weights) TAPER_INLINE {
        unroll<kTokens>([&](auto t) TAPER_INLINE {
          const __m512i q = _mm512_broadcast_i64x4(load_256(q_[t] + column + 32 * g));
          pairs[t][i] = _mm512_dpbusd_epi32(pairs[t][i], weights, q);
        });
      });
    }
  }

  // Four rows share a register.
  void block_128(const int64_t* at, int64_t column, __m512i* sums) const {
    __m512i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* plane = planes_[k] + column / 8;
      _mm_prefetch(plane + at[0] + kPrefetchBytes, _MM_HINT_T0);
      const __m256i low =
          _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(plane + at[0])), load_128(plane + at[1]), 1);
      const __m256i high =
          _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(plane + at[2])), load_128(plane + at[3]), 1);
      p[k] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    lookup_(p, [&](int g, __m512i weights) {
      for (int t = 0; t < kTokens; ++t) {
        const __m512i q = _mm512_broadcast_i32x4(load_128(q_[t] + column + 16 * g));
        sums[t] = _mm512_dpbusd_epi32(sums[t], weights, q);
      }
    });
  }

  // Four rows share half of a register.
  void block_64(const int64_t* at, int64_t column, __m256i* halves) const {
    __m512i p[kBits];
    for (int k = 0; k < kBits; ++k) {
      const uint8_t* plane = planes_[k] + column / 8;
      p[k] = _mm512_castsi256_si512(_mm256_set_epi64x(load_64(plane + at[3]), load_64(plane + at[2]),
                                                      load_64(plane + at[1]), load_64(plane + at[0])));
    }
    lookup_(p, [&](int g, __m512i weights) {
      for (int t = 0; t < kTokens; ++t) {
        const __m256i q = _mm256_set1_epi64x(load_64(q_[t] + column + 8 * g));
        halves[t] = _mm256_dpbusd_epi32(halves[t], _mm512_castsi512_si256(weights), q);
      }
    });
  }

  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static int64_t load_64(const void* p) { return _mm_cvtsi128_si64(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int64_t token_;
  const int64_t stride_;  // bytes between rows of a plane
  const PlaneLookup<kBits> lookup_;
  const uint8_t* planes_[kBits];
  const int8_t* q_[kTokens];
};

template <int kBits, int kTokens>
void run_rows(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token, int64_t row_begin,
              int64_t row_end) {
  const RowQuad<kBits, kTokens> quad(w, x, y, token);
  for (int64_t row = row_begin; row < row_end; row += kRows) {
    quad.run(row, static_cast<int>(std::min<int64_t>(kRows, row_end - row)));
  }
}

}  // namespace

void planes_gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  with_bits(w.bits, [&]<int kBits>() {
    for (int64_t token = 0; token < x.tokens; token += kMaxTokens) {
      switch (std::min<int64_t>(kMaxTokens, x.tokens - token)) {
        case 1:
          run_rows<kBits, 1>(w, x, y, token, row_begin, row_end);
          break;
        case 2:
          run_rows<kBits, 2>(w, x, y, token, row_begin, row_end);
          break;
        case 3:
          run_rows<kBits, 3>(w, x, y, token, row_begin, row_end);
          break;
        default:
          run_rows<kBits, 4>(w, x, y, token, row_begin, row_end);
      }
    }
  });
}

}  // namespace taper::avx512
