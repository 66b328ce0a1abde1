// Matrix times a few tokens: weights are unpacked in registers, once for up to eight rows of activations. The two parts
// of a wide activation are two such rows; wide values go over the planes, which are in L1 then, with each of their
// tables.
#include "rows.hpp"
#include "unpack.hpp"

namespace taper::avx512 {
namespace {

constexpr int kMaxInputs = 8;      // 2 rows x 8 inputs of sums leave half of the registers for unpacking
constexpr int64_t kRowBlock = 16;  // stays in cache while more tokens than fit at once pass over it

// Bytes ahead in each plane, into L2: 4 KB in flight over all planes, what 15 GB/s a core and a latency of 240 ns need;
// two planes want 8. Zen 4, 5632 x 2048, cold, one thread, GB/s with these / with 2 KB into L1 / without: 4 bits
// 25.4 / 20.3 / 24.9; 2 bits, two runs, 19.1 / 20.1 / 17.6 and 22.7 / 20.9 / 19.5.
template <int kBits>
constexpr int64_t kPrefetchBytes = kBits <= 2 ? 4096 : 4096 / kBits / 64 * 64;

// The nearest place ahead that is read as many steps later, whichever of the rows read together (group_bytes) asks.
template <int kBits>
int64_t prefetch_distance(int64_t group_bytes) {
  constexpr int64_t kBytes = kPrefetchBytes<kBits>;
  return group_bytes <= 2 * kBytes ? std::max<int64_t>(1, kBytes / group_bytes) * group_bytes : kBytes / 2;
}

// Calls f.template operator()<inputs>() for 1..kMaxInputs rows of activations; seven run as eight, the last repeated.
template <class F>
TAPER_INLINE inline void with_inputs(int inputs, F f) {
  switch (inputs) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    default:
      return f.template operator()<kMaxInputs>();
  }
}

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
        distance_(prefetch_distance<kBits>(kRowsAtOnce * stride_)),
        lookup_(w.table, kSignFlip) {
    std::copy(w.planes, w.planes + kBits, planes_);
    for (int i = 0; i < kMaxInputs; ++i) {
      const int input = std::min(i, inputs_ - 1);
      q_[i] = (input % parts_ == 0 ? x.q : x.low) + (token + input / parts_) * w.cols;
    }
  }

  static int tokens_at_once(const ActivationsView& x) { return x.low == nullptr ? kMaxInputs : kMaxInputs / 2; }

  // Asks for what the first prefetches of rows row .. end - 1 are too late for.
  void begin(int64_t row, int64_t end) const {
    const int64_t bytes = std::min(distance_, (end - row) * stride_);
    for (int64_t at = 0; at < bytes; at += 64) {
      for (const uint8_t* plane : planes_) _mm_prefetch(plane + row * stride_ + at, _MM_HINT_T1);
    }
  }

  // The first four of the rows row .. end - 1; where there are fewer, the last one repeats. Nothing past them is
  // prefetched: another thread has it, and 8 KB in vain are an eighth of 128 rows of 2048 columns at 2 bits.
  void run(int64_t row, int64_t end) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, end - row));
    ahead_ = (end - row) * stride_ > distance_ ? distance_ : 0;
    if (parts_ == 2 || w_.low_table != nullptr || w_.table_stride != 0) return run_parts(row, count);
    __m128i sums[kMaxInputs];
    shared_table(lookup_, row, count, sums);
    for (int i = 0; i < inputs_; ++i) store_rows(w_, x_, y_, token_ + i, row, count, sums[i]);
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
        shared_table(Lookup(v == 0 ? w_.table : w_.low_table, kSignFlip), row, count, sums[v]);
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

  // sums[i]: of the rows with input i.
  [[gnu::noinline]] void shared_table(const Lookup& lookup, int64_t row, int count, __m128i* sums) const {
    int64_t at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = (row + std::min(r, count - 1)) * stride_;
    with_inputs(inputs_, [&]<int kInputs>() TAPER_INLINE {
      __m512i lanes[kRows][kInputs], quad[kInputs];
      unroll<kRows / kRowsAtOnce>(
          [&](auto i) TAPER_INLINE { blocks_512<kInputs>(lookup, at + kRowsAtOnce * i, lanes + kRowsAtOnce * i); });
      if (w_.cols % 512 == 0) {
        unroll<kInputs>([&](auto t) TAPER_INLINE {
          quad[t] = fold_quad(fold_pair(lanes[0][t], lanes[1][t]), fold_pair(lanes[2][t], lanes[3][t]));
          sums[t] = fold_last(fold_halves(quad[t]));
        });
        return;
      }
      __m512i pairs[kInputs][2];
      unroll<kInputs>([&](auto t) TAPER_INLINE {
        pairs[t][0] = fold_pair(lanes[0][t], lanes[1][t]);
        pairs[t][1] = fold_pair(lanes[2][t], lanes[3][t]);
      });
      tail(lookup, at, pairs, quad, sums);
    });
  }

  // The blocks of 256, 128 and 64 columns.
  [[gnu::noinline]] void tail(const Lookup& lookup, const int64_t* at, __m512i (*pairs)[2], __m512i* quad,
                              __m128i* sums) const {
    int64_t column = w_.cols / 512 * 512;
    if (w_.cols & 256) {
      block_256(lookup, at, column, pairs);
      column += 256;
    }
    for (int t = 0; t < inputs_; ++t) quad[t] = fold_quad(pairs[t][0], pairs[t][1]);
    if (w_.cols & 128) {
      block_128(lookup, at, column, quad);
      column += 128;
    }
    for (int t = 0; t < inputs_; ++t) quad[t] = fold_halves(quad[t]);
    if (w_.cols & 64) block_64(lookup, at, column, quad);
    for (int t = 0; t < inputs_; ++t) sums[t] = fold_last(quad[t]);
  }

  // Each row by itself, its last blocks behind a mask: rows with different tables cannot share a register.
  void own_tables(int64_t row, int count, __m128i* sums) const {
    __m512i lanes[kRows][kMaxInputs];
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = row + std::min(r, count - 1);
      const Lookup lookup(w_.table + n * w_.table_stride, kSignFlip);
      if (inputs_ == 1) {
        own_table<1>(lookup, n * stride_, lanes[r]);
      } else if (inputs_ <= 4) {
        own_table<4>(lookup, n * stride_, lanes[r]);
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
    constexpr int kChains = kInputs == 1 ? 4 : 1;  // see blocks_512
    __m512i acc[kChains][kInputs] = {};
    int64_t column = 0;
    auto block = [&](int64_t width, __mmask64 mask) TAPER_INLINE {
      __m512i p[kBits];
      unroll<kBits>([&](auto k) TAPER_INLINE {
        const uint8_t* line = planes_[k] + at + column / 8;
        prefetch(line);
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

  // Blocks of 512 columns of kRowsAtOnce rows.
  template <int kInputs>
  TAPER_INLINE void blocks_512(const Lookup& lookup, const int64_t* at, __m512i (*lanes)[kInputs]) const {
    // A chain of eight vpdpbusd takes 40 cycles, the vector work of a block 9 (one row and input) to 46 (two, four).
    constexpr int kChains = kRowsAtOnce * kInputs <= 1 ? 4 : kRowsAtOnce * kInputs <= 4 ? 2 : 1;
    __m512i acc[kChains][kInputs][kRowsAtOnce] = {};
    for (int64_t column = 0; column + 512 <= w_.cols; column += 512) {
      Fields fields[kRowsAtOnce];
      unroll<kRowsAtOnce>([&](auto r) TAPER_INLINE {
        __m512i p[kBits];
        unroll<kBits>([&](auto k) TAPER_INLINE {
          const uint8_t* line = planes_[k] + at[r] + column / 8;
          prefetch(line);
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
      prefetch(plane + at[2 * i]);
      const __m512i low = _mm512_castsi256_si512(load_256(plane + at[2 * i]));
      return _mm512_inserti64x4(low, load_256(plane + at[2 * i + 1]), 1);
    };
    multiply<2>(lookup, acc[0], load, [&](const int8_t* q, int g) TAPER_INLINE {
      return _mm512_broadcast_i64x4(load_256(q + column + 32 * g));
    });
  }

  // Four rows share a register.
  void block_128(const Lookup& lookup, const int64_t* at, int64_t column, __m512i* acc) const {
    auto load = [&](const uint8_t* plane, int) TAPER_INLINE {
      plane += column / 8;
      prefetch(plane + at[0]);
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
  void block_64(const Lookup& lookup, const int64_t* at, int64_t column, __m512i* acc) const {
    auto load = [&](const uint8_t* plane, int) TAPER_INLINE {
      plane += column / 8;
      prefetch(plane + at[0]);
      return _mm512_castsi256_si512(_mm256_setr_epi64x(load_64(plane + at[0]), load_64(plane + at[1]),
                                                       load_64(plane + at[2]), load_64(plane + at[3])));
    };
    multiply<1>(lookup, acc, load,
                [&](const int8_t* q, int g) TAPER_INLINE { return _mm512_set1_epi64(load_64(q + column + 8 * g)); });
  }

  // One block: kCount registers of every plane, load_plane(plane, i), times group g of each input, load_q(q, g), added
  // to acc[kCount * input + i].
  template <int kCount, class LoadPlane, class LoadQ>
  TAPER_INLINE void multiply(const Lookup& lookup, __m512i* acc, LoadPlane load_plane, LoadQ load_q) const {
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
        for (int i = 0; i < kCount; ++i) {
          acc[kCount * t + i] = _mm512_dpbusd_epi32(acc[kCount * t + i], weights[i][g], q);
        }
      }
    }
  }

  TAPER_INLINE void prefetch(const uint8_t* line) const { _mm_prefetch(line + ahead_, _MM_HINT_T1); }

  static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static int64_t load_64(const void* p) { return _mm_cvtsi128_si64(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int64_t token_;
  const int parts_;         // of an activation
  const int inputs_;        // parts_ times the tokens
  const int64_t stride_;    // bytes between rows of a plane
  const int64_t distance_;  // of prefetches
  int64_t ahead_ = 0;       // distance_, or 0 near the end of the rows
  const Lookup lookup_;
  const uint8_t* planes_[kBits];
  const int8_t* q_[kMaxInputs];
};

}  // namespace

void planes_gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  with_bits(w.bits, [&]<int kBits>() {
    const int64_t at_once = RowQuad<kBits>::tokens_at_once(x);
    const int64_t block = x.tokens <= at_once ? row_end - row_begin : kRowBlock;
    for (int64_t begin = row_begin; begin < row_end; begin += block) {
      const int64_t end = std::min(begin + block, row_end);
      for (int64_t token = 0; token < x.tokens; token += at_once) {
        RowQuad<kBits> quad(w, x, y, token);
        if (token == 0) quad.begin(begin, end);
        for (int64_t row = begin; row < end; row += kRows) quad.run(row, end);
      }
    }
  });
}

}  // namespace taper::avx512
