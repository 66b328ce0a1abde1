#include "kernels/avx2/avx2.hpp"
#include "kernels/reference/reference.hpp"

// CMakeLists.txt defines HAS_X where this folder has x.cpp; the reference stands in for the rest.
#if !defined(HAS_PLANES_GEMV)
#define planes_gemv_of reference
#else
#define planes_gemv_of avx2
#endif
#if !defined(HAS_PLANES_GEMM)
#define planes_gemm_of reference
#else
#define planes_gemm_of avx2
#endif
#if !defined(HAS_PLANES_UNPACK)
#define planes_unpack_of reference
#else
#define planes_unpack_of avx2
#endif
#if !defined(HAS_QUANTIZE)
#define quantize_of reference
#else
#define quantize_of avx2
#endif
#if !defined(HAS_FLOAT_OPS)
#define float_ops_of reference
#else
#define float_ops_of avx2
#endif

namespace taper {

const Kernels* avx2_kernels() {
  static constexpr Kernels table = {
      "avx2",
      planes_gemv_of::planes_gemv,
      planes_gemm_of::planes_gemm,
      planes_unpack_of::planes_unpack,
      float_ops_of::rms_norm,
      float_ops_of::rotate,
      quantize_of::quantize,
      float_ops_of::swiglu,
      float_ops_of::exp,
      float_ops_of::rope_store,
      float_ops_of::attention,
  };
  return &table;
}

}  // namespace taper
