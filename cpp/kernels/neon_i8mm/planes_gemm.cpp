// Matrix times many tokens with smmla: 32 products an instruction, two rows by two tokens.
#include "kernels/neon/gemm.hpp"
#include "neon_i8mm.hpp"

namespace taper::neon_i8mm {
namespace {

struct Mmla {
  static constexpr int kPanel = 2;

  TAPER_INLINE static int32x4_t add(int32x4_t acc, int8x16_t weights, int8x16_t q) {
    return vmmlaq_s32(acc, weights, q);
  }

  // acc[p]: rows 2 p and 2 p + 1 with each of the two tokens, row first.
  TAPER_INLINE static void fold_panels(const int32x4_t* acc, int32x4_t (*sums)[2]) {
    for (int group = 0; group < 2; ++group) {
      sums[group][0] = vuzp1q_s32(acc[2 * group], acc[2 * group + 1]);
      sums[group][1] = vuzp2q_s32(acc[2 * group], acc[2 * group + 1]);
    }
  }
};

}  // namespace

void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  neon::Gemm<Mmla>(w, x, y).run(row_begin, row_end);
}

}  // namespace taper::neon_i8mm
