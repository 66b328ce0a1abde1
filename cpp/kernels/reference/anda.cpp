#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/reference/reference.hpp"

namespace taper::reference {

void anda_pack(const float* x, int64_t count, const float* factors, int magnitude_bits, bool truncate,
               uint64_t* words) {
  std::fill(words, words + magnitude_bits + 1, uint64_t{0});
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = std::fabs(x[i]) * factors[i];
    const float rounded = truncate ? std::trunc(scaled) : std::nearbyint(scaled);
    const int m = std::min(static_cast<int>(rounded), (1 << magnitude_bits) - 1);
    words[0] |= static_cast<uint64_t>(std::signbit(x[i])) << i;
    for (int j = 0; j < magnitude_bits; ++j)
      words[1 + j] |= static_cast<uint64_t>(m >> (magnitude_bits - 1 - j) & 1) << i;
  }
}

void anda_unpack(const uint64_t* words, int magnitude_bits, const float* units, int64_t count, float* x) {
  for (int64_t i = 0; i < count; ++i) {
    int m = 0;
    for (int j = 0; j < magnitude_bits; ++j) m = 2 * m + static_cast<int>(words[1 + j] >> i & 1);
    const float value = static_cast<float>(m) * units[i];
    x[i] = words[0] >> i & 1 ? -value : value;
  }
}

uint32_t largest_bits(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  return most;
}

}  // namespace taper::reference
