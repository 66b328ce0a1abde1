#include "kernels/avx512/avx512.hpp"

namespace taper {

// Cold, 5632 x 2048 at 4 bits, Zen 4, two threads: 8 tokens 314 us with gemv and 471 with gemm, 16 tokens 596 and 689.
// Warm, 512 x 2048, they meet at 10 tokens, at 2 bits at 16, at 8 bits at 5; but a decode step's planes are cold.
static constexpr int64_t kGemmInputs = 17;

const Kernels* avx512_kernels() {
  static constexpr Kernels table = {
      "avx512",
      kGemmInputs,
      avx512::planes_gemv,
      avx512::planes_gemm,
      nullptr,
      avx512::planes_unpack,
      avx512::rms_norm,
      avx512::rotate,
      avx512::quantize,
      avx512::swiglu,
      avx512::exp,
      avx512::rope_store,
      avx512::attention,
      avx512::attention_merge,
      avx512::attention_finish,
      avx512::planes_store,
      avx512::planes_attention,
      avx512::anda_exponents,
      avx512::anda_pack,
      avx512::anda_unpack,
  };
  return &table;
}

}  // namespace taper
