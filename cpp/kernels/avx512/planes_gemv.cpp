// Matrix times a few tokens: weights are unpacked in registers, once for up to four rows of activations. The two parts
// of a wide activation are two such rows; wide values go over the planes, which are in L1 then, with each of their
// tables.
#include "rows.hpp"
#include "unpack.hpp"

namespace taper::avx512 {
namespace {

constexpr int kMaxInputs = 4;  // 4 rows x 4 inputs of sums leave half of the registers for unpacking
// Memory latency is ~240 ns on large servers; 15 GB/s a core then needs 3.6 KB in flight over all streams together.
constexpr int64_t kPrefetchBytes = 2048;

// Rows row .. row + 3 for 1..kMaxInputs rows of activations (inputs). Only the blocks of 512 columns, and of rows with
// tables of their own, are compiled for a number of inputs.
template <int kBits>
class RowQuad {
 public:
  RowQuad(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t token)
      : w_(w),
        x_(x),
        y_(y),
        token_(token),
        parts_(x.low == nullptr ? 1 : 2),
        inputs_(parts_ * static_cast<int>(std::min<int64_t>(tokens_at_once(x), x.tokens - token))),
        stride_(w.cols / 8),
        lookup_(w.table, kSignFlip) {
    std::copy(w.planes, w.planes + kBits, planes_);
    for (int i = 0; i < kMaxInputs; ++i) {
      const int input = std::min(i, inputs_ - 1);
      q_[i] = (input % parts_ == 0 ? x.q : x.low) + (token + input / parts_) * w.cols;
    }
  }

  static int tokens_at_once(const ActivationsView& x) { return x.low == nullptr ? kMaxInputs : kMaxInputs / 2; }

  // Rows past the count repeat the last one.
  void run(int64_t row, int count) const {
    if (parts_ == 2 || w_.low_table != nullptr || w_.table_stride != 0) return run_parts(row, count);
    shared_table(lookup_, row, count,
                 [&](int i, __m128i sums) { store_rows(w_, x_, y_, token_ + i, row, count, sums); });
  }

 private:
  // Two rows share the loads of the activations; the codes of wide widths leave registers for one only.
  static constexpr int kRowsAtOnce = kBits <= 6 ? 2 : 1;

  using Lookup = PlaneLookup<kBits>;
  using Fields = typename Lookup::Fields;

  // Whatever needs more than one sum a value, or a table a row.
  [[gnu::noinline]] void run_parts(int64_t row, int count) const {
    __m128i sums[2][kMaxInputs];  // by table
    for (int v = 0; v < (w_.low_table == nullptr ? 1 : 2); ++v) {
      if (w_.table_stride != 0) {
        own_tables(row, count, sums[v]);
      } else {
        const Lookup lookup(v == 0 ? w_.table : w_.low_table, kSignFlip);
        shared_table(lookup, row, count, [&](int i, __m128i sum) { sums[v][i] = sum; });
      }
    }
    for (int i = 0; i < inputs_; i += parts_) {
      if (parts_ == 1 && w_.low_table == nullptr) {
        store_rows(w_, x_, y_, token_ + i, row, count, sums[0][i]);
      } else {
        store_parts(w_, x_, y_, token_ + i / parts_, row, count, sums[0] + i, sums[1] + i);
      }
    }
  }

  // Calls store(i, sums of the rows with input i).
  template <class Store>
  TAPER_INLINE void shared_table(const Lookup& lookup, int64_t row, int count, Store store) const {
    int64_t at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = (row + std::min(r, count - 1)) * stride_;
    __m512i lanes[kRows][kMaxInputs];
    for (int r = 0; r < kRows; r += kRowsAtOnce) blocks_512(lookup, at + r, lanes + r);
    int64_t column = w_.cols / 512 * 512;
    __m512i pairs[kMaxInputs][2], quad[kMaxInputs][1];
    for (int t = 0; t < inputs_; ++t) {
      pairs[t][0] = fold_pair(lanes[0][t], lanes[1][t]);
      pairs[t][1] = fold_pair(lanes[2][t], lanes[3][t]);
    }
    if (w_.cols & 256) {
      block_256(lookup, at, column, pairs);
      column += 256;
    }
    for (int t = 0; t < inputs_; ++t) quad[t][0] = fold_quad(pairs[t][0], pairs[t][1]);
    if (w_.cols & 128) {
      block_128(lookup, at, column, quad);
      column += 128;
    }
    for (int t = 0; t < inputs_; ++t) quad[t][0] = fold_halves(quad[t][0]);
    if (w_.cols & 64) block_64(lookup, at, column, quad);
    for (int t = 0; t < inputs_; ++t) store(t, fold_last(quad[t][0]));
  }

  // Each row by itself, its last blocks behind a mask: rows with different tables cannot share a register.
  void own_tables(int64_t row, int count, __m128i* sums) const {
    __m512i lanes[kRows][kMaxInputs];
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = row + std::min(r, count - 1);
      const Lookup lookup(w_.table + n * w_.table_stride, kSignFlip);
      if (inputs_ == 1) {
        own_table<1>(lookup, n * stride_, lanes[r]);
      } else {
        own_table<kMaxInputs>(lookup, n * stride_, lanes[r]);
      }
    }
    for (int t = 0; t < inputs_; ++t) {
      const __m512i quad = fold_quad(fold_pair(lanes[0][t], lanes[1][t]), fold_pair(lanes[2][t], lanes[3][t]));
      sums[t] = fold_last(fold_halves(quad));
    }
  }

  template <int kInputs>
  void own_table(const Lookup& lookup, int64_t at, __m512i* lanes) const {
    constexpr int kChains = kInputs == 1 ? 4 : 1;  // see blocks_512_of
    __m512i acc[kChains][kInputs] = {};
    int64_t column = 0;
    auto block = [&](int64_t width, __mmask64 mask) TAPER_INLINE {
      __m512i p[kBits];
      unroll<kBits>([&](auto k) TAPER_INLINE {
        const uint8_t* line = planes_[k] + at + column / 8;
        _mm_prefetch(line + kPrefetchBytes, _MM_HINT_T0);
        p[k] = _mm512_maskz_loadu_epi8(mask, line);
      });
      const Fields fields = lookup.gather(p);
      unroll<kGroups>([&](auto g) TAPER_INLINE {
        const __m512i weights = lookup.template find<g>(fields);
        unroll<kInputs>([&](auto t) TAPER_INLINE {
          const __m512i q = _mm512_maskz_loadu_epi8(mask, q_[t] + column + width / 8 * g);
          acc[g % kChains][t] = _mm512_dpbusd_epi32(acc[g % kChains][t], weights, q);
        });
      });
      column += width;
    };
    while (column + 512 <= w_.cols) block(512, ~__mmask64{0});
    for (int64_t width = 256; width >= 64; width /= 2) {
      if (w_.cols & width) block(width, (__mmask64{1} << (width / 8)) - 1);
    }
    unroll<kInputs>([&](auto t) TAPER_INLINE {
      lanes[t] = acc[0][t];
      unroll<kChains - 1>([&](auto c) TAPER_INLINE { lanes[t] = _mm512_add_epi32(lanes[t], acc[c + 1][t]); });
    });
  }

  // Three inputs run as four, of which the last repeats.
  TAPER_INLINE void blocks_512(const Lookup& lookup, const int64_t* at, __m512i (*lanes)[kMaxInputs]) const {
    switch (inputs_) {
      case 1:
        return blocks_512_of<1>(lookup, at, lanes);
      case 2:
        return blocks_512_of<2>(lookup, at, lanes);
      default:
        return blocks_512_of<kMaxInputs>(lookup, at, lanes);
    }
  }

  // Blocks of 512 columns of kRowsAtOnce rows.
  template <int kInputs>
  TAPER_INLINE void blocks_512_of(const Lookup& lookup, const int64_t* at, __m512i (*lanes)[kMaxInputs]) const {
    // A chain of eight vpdpbusd takes 40 cycles, the vector work of a block 9 (one row and input) to 46 (two, four).
    constexpr int kChains = kRowsAtOnce * kInputs <= 1 ? 4 : kRowsAtOnce * kInputs <= 4 ? 2 : 1;
    __m512i acc[kChains][kInputs][kRowsAtOnce] = {};
    for (int64_t column = 0; column + 512 <= w_.cols; column += 512) {
      Fields fields[kRowsAtOnce];
      unroll<kRowsAtOnce>([&](auto r) TAPER_INLINE {
        __m512i p[kBits];
        unroll<kBits>([&](auto k) TAPER_INLINE {
          const uint8_t* line = planes_[k] + at[r] + column / 8;
          _mm_prefetch(line + kPrefetchBytes, _MM_HINT_T0);
          p[k] = _mm512_loadu_si512(line);
        });
        fields[r] = lookup.gather(p);
      });
      unroll<kGroups>([&](auto g) TAPER_INLINE {
        __m512i weights[kRowsAtOnce];
        unroll<kRowsAtOnce>([&](auto r) TAPER_INLINE { weights[r] = lookup.template find<g>(fields[r]); });
        unroll<kInputs>([&](auto t) TAPER_INLINE {
          __m512i q = _mm512_loadu_si512(q_[t] + column + 64 * g);
          if constexpr (kRowsAtOnce > 1) q = in_register(q);
          unroll<kRowsAtOnce>([&](auto r) TAPER_INLINE {
            acc[g % kChains][t][r] = _mm512_dpbusd_epi32(acc[g % kChains][t][r], weights[r], q);
          });
        });
      });
    }
    unroll<kInputs>([&](auto t) TAPER_INLINE {
      unroll<kRowsAtOnce>([&](auto r) TAPER_INLINE {
        __m512i sum = acc[0][t][r];
        unroll<kChains - 1>([&](auto c) TAPER_INLINE { sum = _mm512_add_epi32(sum, acc[c + 1][t][r]); });
        lanes[r][t] = sum;
      });
    });
  }

  // Two rows share a register.
  void block_256(const Lookup& lookup, const int64_t* at, int64_t column, __m512i (*acc)[2]) const {
    auto load = [&](const uint8_t* plane, int i) TAPER_INLINE {
      plane += column / 8;
      _mm_prefetch(plane + at[2 * i] + kPrefetchBytes, _MM_HINT_T0);
      const __m512i low = _mm512_castsi256_si512(load_256(plane + at[2 * i]));
      return _mm512_inserti64x4(low, load_256(plane + at[2 * i + 1]), 1);
    };
    multiply<2>(lookup, acc, load, [&](const int8_t* q, int g) TAPER_INLINE {
      return _mm512_broadcast_i64x4(load_256(q + column + 32 * g));
    });
  }

  // Four rows share a register.
  void block_128(const Lookup& lookup, const int64_t* at, int64_t column, __m512i (*acc)[1]) const {
    auto load = [&](const uint8_t* plane, int) TAPER_INLINE {
      plane += column / 8;
      _mm_prefetch(plane + at[0] + kPrefetchBytes, _MM_HINT_T0);
      const __m256i low = _mm256_castsi128_si256(load_128(plane + at[0]));
      const __m256i high = _mm256_castsi128_si256(load_128(plane + at[2]));
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_inserti128_si256(low, load_128(plane + at[1]), 1)),
                                _mm256_inserti128_si256(high, load_128(plane + at[3]), 1), 1);
    };
    multiply<1>(lookup, acc, load, [&](const int8_t* q, int g) TAPER_INLINE {
      return _mm512_broadcast_i32x4(load_128(q + column + 16 * g));
    });
  }

  // Four rows share the lower half of a register.
  void block_64(const Lookup& lookup, const int64_t* at, int64_t column, __m512i (*acc)[1]) const {
    auto load = [&](const uint8_t* plane, int) TAPER_INLINE {
      plane += column / 8;
      _mm_prefetch(plane + at[0] + kPrefetchBytes, _MM_HINT_T0);
      return _mm512_castsi256_si512(_mm256_setr_epi64x(load_64(plane + at[0]), load_64(plane + at[1]),
                                                       load_64(plane + at[2]), load_64(plane + at[3])));
    };
    multiply<1>(lookup, acc, load,
                [&](const int8_t* q, int g) TAPER_INLINE { return _mm512_set1_epi64(load_64(q + column + 8 * g)); });
  }

  // One block: kCount registers of every plane, load_plane(plane, i), times group g of each token, load_q(q, g).
  template <int kCount, class LoadPlane, class LoadQ>
  TAPER_INLINE void multiply(const Lookup& lookup, __m512i (*acc)[kCount], LoadPlane load_plane, LoadQ load_q) const {
    __m512i weights[kCount][kGroups];
    for (int i = 0; i < kCount; ++i) {
      __m512i p[kBits];
      for (int k = 0; k < kBits; ++k) p[k] = load_plane(planes_[k], i);
      const Fields fields = lookup.gather(p);
      unroll<kGroups>([&](auto g) TAPER_INLINE { weights[i][g] = lookup.template find<g>(fields); });
    }
    for (int t = 0; t < inputs_; ++t) {
      for (int g = 0; g < kGroups; ++g) {
        const __m512i q = load_q(q_[t], g);
        for (int i = 0; i < kCount; ++i) acc[t][i] = _mm512_dpbusd_epi32(acc[t][i], weights[i][g], q);
      }
    }
  }

  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static int64_t load_64(const void* p) { return _mm_cvtsi128_si64(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }

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
};

}  // namespace

void planes_gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  with_bits(w.bits, [&]<int kBits>() {
    for (int64_t token = 0; token < x.tokens; token += RowQuad<kBits>::tokens_at_once(x)) {
      const RowQuad<kBits> quad(w, x, y, token);
      for (int64_t row = row_begin; row < row_end; row += kRows) {
        quad.run(row, static_cast<int>(std::min<int64_t>(kRows, row_end - row)));
      }
    }
  });
}

}  // namespace taper::avx512
