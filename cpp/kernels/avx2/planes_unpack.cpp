// One row of planes to int8 values in column order.
#include "unpack_row.hpp"

namespace taper::avx2 {

void planes_unpack(const PlanesView& w, int64_t row, int8_t* out) {
  with_bits(w.bits, [&]<int kBits>() {
    unpack_row(PlaneLookup<kBits>(w.table + row * w.table_stride), w, row,
               [&](int64_t column, __m256i values, int count) {
                 if (count == 32) {
                   _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + column), values);
                 } else if (count == 16) {
                   _mm_storeu_si128(reinterpret_cast<__m128i*>(out + column), _mm256_castsi256_si128(values));
                 } else {
                   _mm_storel_epi64(reinterpret_cast<__m128i*>(out + column), _mm256_castsi256_si128(values));
                 }
               });
  });
}

}  // namespace taper::avx2
