// One row of planes to int8 values in column order.
#include "neon.hpp"
#include "unpack_row.hpp"

namespace taper::neon {

void planes_unpack(const PlanesView& w, int64_t row, int8_t* out) {
  with_bits(w.bits, [&]<int kBits>() {
    unpack_row(PlaneLookup<kBits>(w.table + row * w.table_stride), w, row,
               [&](int64_t column, int8x16_t values, auto count) TAPER_INLINE {
                 if constexpr (count == 16) {
                   vst1q_s8(out + column, values);
                 } else {
                   vst1_s8(out + column, vget_low_s8(values));
                 }
               });
  });
}

}  // namespace taper::neon
