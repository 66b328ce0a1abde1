#include "kernels/neon/neon.hpp"

namespace taper {

static constexpr int64_t kGemmInputs = 5;  // as AVX2, whose registers and tiles are alike; not measured

const Kernels* neon_kernels() {
  static constexpr Kernels table = {
      "neon",
      kGemmInputs,
      neon::planes_gemv,
      neon::planes_gemm,
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
