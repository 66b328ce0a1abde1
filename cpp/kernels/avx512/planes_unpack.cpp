// One row of planes to int8 values in column order.
#include "unpack_row.hpp"

namespace taper::avx512 {

void planes_unpack(const PlanesView& w, int64_t row, int8_t* out) {
  with_bits(w.bits, [&]<int kBits>() {
    unpack_row(PlaneLookup<kBits>(w.table + row * w.table_stride, 0), w, row, reinterpret_cast<uint8_t*>(out));
  });
}

}  // namespace taper::avx512
