// Loops whose index is a constant, so that an array indexed by it lives in registers: GCC keeps such an array in memory
// when the loop is unrolled only by its optimiser (24 sums of a matrix block were stored every step, 309 instead of
// 700 GOP/s).
#pragma once

#include <utility>

#define TAPER_INLINE __attribute__((always_inline))

namespace taper {

// Calls f(std::integral_constant<int, i>) for i = 0 .. kCount - 1.
template <int kCount, class F>
TAPER_INLINE inline void unroll(F f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>)
      TAPER_INLINE { (f(std::integral_constant<int, kIndex>{}), ...); }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace taper
