// Where bits lie in a block of the KV cache as planes (docs/numerics.md, "KV cache as planes").
#pragma once

#include <cstdint>

#include "taper/kernels.hpp"

namespace taper {
namespace {

constexpr int64_t kLineBytes = 64;  // 512 values of a plane, eight words
constexpr int64_t kLineWords = 8;
constexpr int64_t kKeyElements = 4;  // a word of keys is 16 entries of 4 elements,
constexpr int64_t kKeyEntries = 16;
constexpr int64_t kValueElements = 16;  // a word of values 4 entries of 16 elements
constexpr int64_t kValueEntries = 4;

// The byte of a plane that holds bits 8 * byte .. 8 * byte + 7 of a word. Pairs of bytes of the eight words of a line
// alternate, so that interleaving planes within 128 bits leaves the bytes of a word side by side.
inline int64_t byte_of(int64_t word, int64_t byte) {
  return word / kLineWords * kLineBytes + byte / 2 * 16 + word % kLineWords * 2 + byte % 2;
}

// The magnitude plane `index` (0: most significant) of one head.
inline const uint8_t* magnitude_plane(const PlanesPart& part, int upper, int index, int64_t head_dim) {
  return index < upper ? part.upper + (1 + index) * plane_bytes(head_dim)
                       : part.lower + (index - upper) * plane_bytes(head_dim);
}

}  // namespace
}  // namespace taper
