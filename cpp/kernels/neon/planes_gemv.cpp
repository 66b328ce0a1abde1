// Matrix times a few tokens: weights are unpacked in registers, once for up to four rows of activations. The two parts
// of a wide activation are two such rows; wide values go over the planes, which are in L1 then, with each of their
// tables.
#include "neon.hpp"
#include "unpack_row.hpp"

namespace taper::neon {
namespace {

constexpr int kMaxInputs = 4;
constexpr int64_t kPrefetchBytes = 2048;

// Products of one row of planes with kInputs rows of activations.
template <int kBits>
class RowProduct {
 public:
  RowProduct(const PlanesView& w, int64_t row) : cols_(w.cols) {
    for (int k = 0; k < kBits; ++k) planes_[k] = w.planes[k] + row * (w.cols / 8);
  }

  // lanes[i]: four sums that add up to the product with q[i]. Two chains for each, as sdot takes several cycles.
  template <int kInputs>
  void run(const PlaneLookup<kBits>& lookup, const int8_t* const* q, int32x4_t* lanes) const {
    int32x4_t acc[2][kInputs] = {};
    for_each_piece(
        cols_,
        [&](int64_t byte) TAPER_INLINE {
          unroll<kBits>([&](auto k) TAPER_INLINE { __builtin_prefetch(planes_[k] + byte + kPrefetchBytes); });
        },
        [&](int64_t byte, int64_t column, auto pitch, auto count) TAPER_INLINE {
          uint8x16_t p[kBits];
          unroll<kBits>([&](auto k) TAPER_INLINE { p[k] = load_bytes<count>(planes_[k] + byte); });
          lookup(p, [&](auto group, int8x16_t weights) TAPER_INLINE {
            unroll<kInputs>([&](auto i) TAPER_INLINE {
              int32x4_t& sum = acc[group % 2][i];
              sum = vdotq_s32(sum, weights, load_values<count>(q[i] + column + pitch * group));
            });
          });
        });
    unroll<kInputs>([&](auto i) TAPER_INLINE { lanes[i] = vaddq_s32(acc[0][i], acc[1][i]); });
  }

 private:
  const int64_t cols_;
  const uint8_t* planes_[kBits];
};

template <int kBits>
class Gemv {
 public:
  Gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y)
      : w_(w),
        x_(x),
        y_(y),
        parts_(x.low == nullptr ? 1 : 2),
        table_(w.table),
        low_table_(w.low_table == nullptr ? w.table : w.low_table) {}

  // Rows row .. row + count - 1, count <= kRows, of every token.
  void run(int64_t row, int count) const {
    const int at_once = kMaxInputs / parts_;
    for (int64_t token = 0; token < x_.tokens; token += at_once) {
      const int tokens = static_cast<int>(std::min<int64_t>(at_once, x_.tokens - token));
      const int8_t* q[kMaxInputs];
      for (int i = 0; i < kMaxInputs; ++i) {  // the last input repeats
        const int input = std::min(i, tokens * parts_ - 1), part = input % parts_;
        q[i] = (part == 0 ? x_.q : x_.low) + (token + input / parts_) * w_.cols;
      }
      int32x4_t high[kMaxInputs], low[kMaxInputs];
      multiply(table_, w_.table_stride, row, count, q, tokens * parts_, high);
      if (w_.low_table != nullptr) multiply(low_table_, 0, row, count, q, tokens * parts_, low);
      for (int i = 0; i < tokens; ++i) {
        store_rows(w_, x_, y_, token + i, row, count, high + i * parts_, low + i * parts_);
      }
    }
  }

 private:
  using Lookup = PlaneLookup<kBits>;

  // sums[i]: of the rows with q[i], zero past the count. Three inputs run as four.
  void multiply(const Lookup& shared, int64_t stride, int64_t row, int count, const int8_t* const* q, int inputs,
                int32x4_t* sums) const {
    int32x4_t lanes[kRows][kMaxInputs] = {};
    for (int r = 0; r < count; ++r) {
      const RowProduct<kBits> product(w_, row + r);
      const Lookup lookup = stride == 0 ? shared : Lookup(w_.table + (row + r) * stride);
      switch (inputs) {
        case 1:
          product.template run<1>(lookup, q, lanes[r]);
          break;
        case 2:
          product.template run<2>(lookup, q, lanes[r]);
          break;
        default:
          product.template run<kMaxInputs>(lookup, q, lanes[r]);
      }
    }
    for (int i = 0; i < inputs; ++i) sums[i] = fold(lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i]);
  }

  const PlanesView& w_;
  const ActivationsView& x_;
  const OutputView& y_;
  const int parts_;  // of an activation
  const Lookup table_;
  const Lookup low_table_;
};

}  // namespace

void planes_gemv(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  with_bits(w.bits, [&]<int kBits>() {
    const Gemv<kBits> gemv(w, x, y);
    for (int64_t row = row_begin; row < row_end; row += kRows) {
      gemv.run(row, static_cast<int>(std::min<int64_t>(kRows, row_end - row)));
    }
  });
}

}  // namespace taper::neon
