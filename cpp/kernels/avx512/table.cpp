#include "kernels/avx512/avx512.hpp"

namespace taper {

const Kernels* avx512_kernels() {
  static constexpr Kernels table = {
      "avx512",          avx512::planes_gemv,     avx512::planes_gemm,      avx512::planes_unpack, avx512::rms_norm,
      avx512::rotate,    avx512::quantize,        avx512::swiglu,           avx512::exp,           avx512::rope_store,
      avx512::attention, avx512::attention_merge, avx512::attention_finish,
  };
  return &table;
}

}  // namespace taper
