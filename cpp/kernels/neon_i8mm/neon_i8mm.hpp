// What the neon_i8mm table has instead of an operation of the neon table.
#pragma once

#include "taper/kernels.hpp"

namespace taper::neon_i8mm {

void planes_gemm(const PlanesView&, const ActivationsView&, const OutputView&, int64_t row_begin, int64_t row_end);

}  // namespace taper::neon_i8mm
