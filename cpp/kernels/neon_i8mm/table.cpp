#include "kernels/neon/neon.hpp"
#include "neon_i8mm.hpp"

namespace taper {

static constexpr int64_t kGemmInputs = 5;  // as AVX2, whose registers and tiles are alike; not measured

const Kernels* neon_i8mm_kernels() {
  static constexpr Kernels table = {
      "neon_i8mm",
      kGemmInputs,
      neon::planes_gemv,
      neon_i8mm::planes_gemm,
      nullptr,
      neon::planes_unpack,
      neon::rms_norm,
      neon::rotate,
      neon::quantize,
      neon::swiglu,
      neon::exp,
      neon::rope_store,
      neon::attention,
      neon::attention_merge,
      neon::attention_finish,
      neon::planes_store,
      neon::planes_attention,
      neon::anda_exponents,
      neon::anda_pack,
      neon::anda_unpack,
  };
  return &table;
}

}  // namespace taper
