#include "kernels/reference/reference.hpp"

namespace taper {

const Kernels* reference_kernels() {
  static constexpr Kernels table = {
      "reference",
      1,  // both are the same
      reference::planes_gemv,
      reference::planes_gemm,
      nullptr,
      reference::planes_unpack,
      reference::rms_norm,
      reference::rotate,
      reference::quantize,
      reference::swiglu,
      reference::exp,
      reference::rope_store,
      reference::attention,
      reference::attention_merge,
      reference::attention_finish,
      reference::planes_store,
      reference::planes_attention,
      reference::anda_exponents,
      reference::anda_pack,
      reference::anda_unpack,
  };
  return &table;
}

}  // namespace taper
