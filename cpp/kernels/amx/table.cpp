// The avx512 table with the matrix kernel replaced: on tiles of the processor, and on emulated ones.
#include "emulated_tiles.hpp"
#include "planes_gemm.hpp"
#include "tiles.hpp"

namespace taper {
namespace {

// Unpacking is nearly all that a few tokens cost here, and gemv takes as long at five (AVX-512 on Zen 4, cold, two
// threads, 5632 x 2048 at 4 bits: about 190 us to unpack, 230 us for 5 tokens with gemv).
constexpr int64_t kGemmInputs = 5;

template <class T>
Kernels table(const char* name) {
  Kernels made = *avx512_kernels();
  made.name = name;
  made.gemm_inputs = kGemmInputs;
  made.planes_gemm = amx::planes_gemm<T>;
  return made;
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels made = table<amx::Tiles>("amx");
  return &made;
}

const Kernels* amx_emulated_kernels() {
  static const Kernels made = table<amx::EmulatedTiles>("amx_emulated");
  return &made;
}

}  // namespace taper
