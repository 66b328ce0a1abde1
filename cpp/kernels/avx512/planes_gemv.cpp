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
    __m512i lanes[kRows][kTokens];
    for (int r = 0; r < kRows; r += kRowsAtOnce) blocks_512(at + r, lanes + r);
    int64_t column = w_.cols / 512 * 512;
    __m512i pairs[1][kTokens][2], quad[1][kTokens][1];
    unroll<kTokens>([&](auto t) TAPER_INLINE {
      pairs[0][t][0] = fold_pair(lanes[0][t], lanes[1][t]);
      pairs[0][t][1] = fold_pair(lanes[2][t], lanes[3][t]);
    });
    if (w_.cols & 256) {
      block_256(at, column, pairs);
      column += 256;
    }
    unroll<kTokens>([&](auto t) TAPER_INLINE { quad[0][t][0] = fold_quad(pairs[0][t][0], pairs[0][t][1]); });
    if (w_.cols & 128) {
      block_128(at, column, quad);
      column += 128;
    }
    unroll<kTokens>([&](auto t) TAPER_INLINE { quad[0][t][0] = fold_halves(quad[0][t][0]); });
    if (w_.cols & 64) block_64(at, column, quad);
    unroll<kTokens>([&](auto t)
                        TAPER_INLINE { store_rows(w_, x_, y_, token_ + t, row, count, fold_last(quad[0][t][0])); });
  }

 private:
  // Two rows share the loads of the activations; the codes of wide widths leave registers for one only.
  static constexpr int kRowsAtOnce = kBits <= 6 ? 2 : 1;

  // Blocks of 512 columns of kRowsAtOnce rows.
  TAPER_INLINE void blocks_512(const int64_t* at, __m512i (*lanes)[kTokens]) const {
    // A chain of eight vpdpbusd takes 40 cycles, the vector work of a block 9 (one row and token) to 46 (two, four).
    constexpr int kChains = kRowsAtOnce * kTokens <= 1 ? 4 : kRowsAtOnce * kTokens <= 4 ? 2 : 1;
    __m512i acc[kChains][kTokens][kRowsAtOnce] = {};
    for (int64_t column = 0; column + 512 <= w_.cols; column += 512) {
      multiply(
          acc,
          [&](const uint8_t* plane, auto r) TAPER_INLINE {
            const uint8_t* line = plane + at[r] + column / 8;
            _mm_prefetch(line + kPrefetchBytes, _MM_HINT_T0);
            return _mm512_loadu_si512(line);
          },
          [&](const int8_t* q, auto g) TAPER_INLINE { return _mm512_loadu_si512(q + column + 64 * g); });
    }
    unroll<kTokens>([&](auto t) TAPER_INLINE {
      unroll<kRowsAtOnce>([&](auto r) TAPER_INLINE {
        __m512i sum = acc[0][t][r];
        unroll<kChains - 1>([&](auto c) TAPER_INLINE { sum = _mm512_add_epi32(sum, acc[c + 1][t][r]); });
        lanes[r][t] = sum;
      });
    });
  }

  // Two rows share a register.
  void block_256(const int64_t* at, int64_t column, __m512i (&acc)[1][kTokens][2]) const {
    multiply(
        acc,
        [&](const uint8_t* plane, auto i) TAPER_INLINE {
          plane += column / 8;
          _mm_prefetch(plane + at[2 * i] + kPrefetchBytes, _MM_HINT_T0);
          const __m512i low = _mm512_castsi256_si512(load_256(plane + at[2 * i]));
          return _mm512_inserti64x4(low, load_256(plane + at[2 * i + 1]), 1);
        },
        [&](const int8_t* q, auto g) TAPER_INLINE { return _mm512_broadcast_i64x4(load_256(q + column + 32 * g)); });
  }

  // Four rows share a register.
  void block_128(const int64_t* at, int64_t column, __m512i (&acc)[1][kTokens][1]) const {
    multiply(
        acc,
        [&](const uint8_t* plane, auto) TAPER_INLINE {
          plane += column / 8;
          _mm_prefetch(plane + at[0] + kPrefetchBytes, _MM_HINT_T0);
          const __m256i low = _mm256_castsi128_si256(load_128(plane + at[0]));
          const __m256i high = _mm256_castsi128_si256(load_128(plane + at[2]));
          return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_inserti128_si256(low, load_128(plane + at[1]), 1)),
                                    _mm256_inserti128_si256(high, load_128(plane + at[3]), 1), 1);
        },
        [&](const int8_t* q, auto g) TAPER_INLINE { return _mm512_broadcast_i32x4(load_128(q + column + 16 * g)); });
  }

  // Four rows share the lower half of a register.
  void block_64(const int64_t* at, int64_t column, __m512i (&acc)[1][kTokens][1]) const {
    multiply(
        acc,
        [&](const uint8_t* plane, auto) TAPER_INLINE {
          plane += column / 8;
          _mm_prefetch(plane + at[0] + kPrefetchBytes, _MM_HINT_T0);
          return _mm512_castsi256_si512(_mm256_setr_epi64x(load_64(plane + at[0]), load_64(plane + at[1]),
                                                           load_64(plane + at[2]), load_64(plane + at[3])));
        },
        [&](const int8_t* q, auto g) TAPER_INLINE { return _mm512_set1_epi64(load_64(q + column + 8 * g)); });
  }

  // One block: kCount registers of every plane, load_plane(plane, i), times group g of a token, load_q(q, g).
  template <int kChains, int kCount, class LoadPlane, class LoadQ>
  TAPER_INLINE void multiply(__m512i (&acc)[kChains][kTokens][kCount], LoadPlane load_plane, LoadQ load_q) const {
    typename PlaneLookup<kBits>::Fields fields[kCount];
    unroll<kCount>([&](auto i) TAPER_INLINE {
      __m512i p[kBits];
      unroll<kBits>([&](auto k) TAPER_INLINE { p[k] = load_plane(planes_[k], i); });
      fields[i] = lookup_.gather(p);
    });
    unroll<kGroups>([&](auto g) TAPER_INLINE {
      __m512i weights[kCount];
      unroll<kCount>([&](auto i) TAPER_INLINE { weights[i] = lookup_.template find<g>(fields[i]); });
      unroll<kTokens>([&](auto t) TAPER_INLINE {
        const __m512i q = kCount > 1 ? in_register(load_q(q_[t], g)) : load_q(q_[t], g);
        unroll<kCount>([&](auto i) TAPER_INLINE {
          acc[g % kChains][t][i] = _mm512_dpbusd_epi32(acc[g % kChains][t][i], weights[i], q);
        });
      });
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
