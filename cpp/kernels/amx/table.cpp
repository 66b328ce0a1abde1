// The avx512 table with the matrix kernel replaced: on tiles of the processor, and on emulated ones.
#include "emulated_tiles.hpp"
#include "planes_gemm.hpp"
#include "tiles.hpp"

namespace taper {
namespace {

// Xeon, cold, one thread, 5632 x 2048, us with gemv / with gemm: 8 tokens 454 / 524 at 4 bits and 348 / 357 at 2, 16
// tokens 883 / 540 and 862 / 367. Gemv takes eight at once.
constexpr int64_t kGemmInputs = 9;

template <class T>
Kernels table(const char* name) {
  Kernels made = *avx512_kernels();
  made.name = name;
  made.gemm_inputs = kGemmInputs;
  made.planes_gemm = amx::planes_gemm<T>;
  made.pack_inputs = amx::pack_inputs;
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
