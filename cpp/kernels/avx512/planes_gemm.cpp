// Matrix times many tokens with vpdpbusd: sums of 2 x 16 rows and up to 14 tokens stay in 28 registers.
//
// Four columns of a token are broadcast and multiplied with both panels. A step of four columns loads 2 + 14 registers
// for 28 vpdpbusd: 0.57 loads each, where Zen 4 loads 1 and multiplies 1 a cycle, and Xeons since Ice Lake load 2 and
// multiply 2. Panels come from the L2, 128 bytes in 28 products: 4.6 bytes a cycle on Zen 4, 9.1 on a Xeon. So the
// multiplier is the bound: 128 integer operations a cycle on Zen 4, 470 GOP/s at 3.67 GHz.
// Measured there on panels in cache, one thread, 512 tokens of 2048 columns, in GOP/s (rows / 16 x tokens):
//   1 x 24  282    2 x 12  441    2 x 14  460    3 x 9  463    4 x 6  460
#include <array>
#include <cstring>
#include <utility>

#include "panel_gemm.hpp"

namespace taper::avx512 {
namespace {

// A loaded value that is used twice stays in its register; GCC would broadcast it again from memory.
TAPER_INLINE inline __m512i in_register(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

TAPER_INLINE inline __m512i broadcast(const int8_t* four) {
  int32_t bytes;
  std::memcpy(&bytes, four, sizeof bytes);
  return in_register(_mm512_set1_epi32(bytes));
}

template <int kTokens>
void multiply(const uint8_t* panels, const int8_t* q, const int32_t* sum, int64_t cols, int32_t* sums) {
  __m512i acc[kTokens][kPanels];
  unroll<kTokens>([&](auto t) TAPER_INLINE {
    // Bytes of a panel are w + 128, as vpdpbusd wants one unsigned factor: what that adds is taken off first.
    const auto flipped = static_cast<int32_t>(0u - 128 * static_cast<uint32_t>(sum[t]));
    for (int p = 0; p < kPanels; ++p) acc[t][p] = _mm512_set1_epi32(flipped);
  });
  const uint8_t* second = panels + kPanelRows * cols;
  for (int64_t c = 0; c < cols; c += 4) {
    const __m512i u0 = _mm512_load_si512(panels + kPanelRows * c), u1 = _mm512_load_si512(second + kPanelRows * c);
    unroll<kTokens>([&](auto t) TAPER_INLINE {
      const __m512i values = broadcast(q + t * cols + c);
      acc[t][0] = _mm512_dpbusd_epi32(acc[t][0], u0, values);
      acc[t][1] = _mm512_dpbusd_epi32(acc[t][1], u1, values);
    });
  }
  unroll<kTokens>([&](auto t) TAPER_INLINE {
    for (int p = 0; p < kPanels; ++p) _mm512_store_si512(sums + t * kBlockRows + p * kPanelRows, acc[t][p]);
  });
}

struct Vnni {
  static constexpr int kTokens = 14;
  static constexpr int kFlip = kSignFlip;
  static constexpr int64_t kTileBytes = 256 * 1024;  // a quarter of the L2 of Zen 4

  // Blocks as even as can be: a short last one would load its panels for few products.
  static int64_t block(int64_t tokens) {
    const int64_t blocks = (tokens + kTokens - 1) / kTokens;
    return (tokens + blocks - 1) / blocks;
  }

  void begin(int64_t) {}

  void multiply(const uint8_t* panels, const int8_t* q, const int32_t* sum, int64_t cols, int64_t tokens,
                int32_t* sums) {
    static constexpr auto kMultiply = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
      return std::array{&avx512::multiply<kIndex + 1>...};
    }(std::make_index_sequence<kTokens>{});
    kMultiply[tokens - 1](panels, q, sum, cols, sums);
  }
};

}  // namespace

void planes_gemm(const PlanesView& w, const ActivationsView& x, const OutputView& y, int64_t row_begin,
                 int64_t row_end) {
  PanelGemm<Vnni>(w, x, y).run(row_begin, row_end);
}

}  // namespace taper::avx512
