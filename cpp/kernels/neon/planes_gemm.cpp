// Matrix times many tokens with sdot: 16 products an instruction.
#include "gemm.hpp"
#include "neon.hpp"

namespace taper::neon {
namespace {

struct Dot {
  static constexpr int kPanel = 1;

  TAPER_INLINE static int32x4_t add(int32x4_t acc, int8x16_t weights, int8x16_t q) {
    return vdotq_s32(acc, weights, q);
  }

  // acc[r]: four sums of row r.
  TAPER_INLINE static void fold_panels(const int32x4_t* acc, int32x4_t (*sums)[1]) {
    sums[0][0] = fold(acc[0], acc[1], acc[2], acc[3]);
  }
};

}  // namespace

void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  Gemm<Dot>(w, x, y).run(row_begin, row_end);
}

}  // namespace taper::neon
