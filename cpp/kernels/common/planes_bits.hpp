// Transposes of 8 x 8 bits for sets without an instruction for it. Internal linkage: each set compiles its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace taper {
namespace {

// Masks of the three exchanges, of bits 7, 14 and 28 apart (Hacker's Delight, 7-3).
constexpr uint64_t kTransposeBits = 0x00AA00AA00AA00AAu;
constexpr uint64_t kTransposePairs = 0x0000CCCC0000CCCCu;
constexpr uint64_t kTransposeNibbles = 0x00000000F0F0F0F0u;

// Bit i of byte j to bit j of byte i.
inline uint64_t transpose_bits(uint64_t x) {
  const auto exchange = [&x](int shift, uint64_t mask) {
    const uint64_t moved = (x ^ x >> shift) & mask;
    x ^= moved ^ moved << shift;
  };
  exchange(7, kTransposeBits);
  exchange(14, kTransposePairs);
  exchange(28, kTransposeNibbles);
  return x;
}

// Five words of 64 bits, most significant first, to 64 bytes.
inline void unpack_exponents(const uint8_t* words, uint8_t* out) {
  for (int byte = 0; byte < 8; ++byte) {
    uint64_t x = 0;
    for (int j = 0; j < 5; ++j) x |= static_cast<uint64_t>(words[8 * j + byte]) << 8 * (4 - j);
    x = transpose_bits(x);
    std::memcpy(out + 8 * byte, &x, sizeof x);
  }
}

}  // namespace
}  // namespace taper
