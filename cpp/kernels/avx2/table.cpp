#include "kernels/avx2/avx2.hpp"

namespace taper {

const Kernels* avx2_kernels() {
  static constexpr Kernels table = {
      "avx2",          avx2::planes_gemv,     avx2::planes_gemm,      avx2::planes_unpack, avx2::rms_norm,
      avx2::rotate,    avx2::quantize,        avx2::swiglu,           avx2::exp,           avx2::rope_store,
      avx2::attention, avx2::attention_merge, avx2::attention_finish,
  };
  return &table;
}

}  // namespace taper
