// Keys and values of one token into the planes of a block (docs/numerics.md, "KV cache as planes").
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/common/exponent.hpp"
#include "kernels/common/lanes.hpp"
#include "kernels/common/planes_layout.hpp"

namespace taper::lanes {

// Four bytes' bits `bit`, side by side: byte i to bit i.
inline uint32_t four_bits(uint32_t bytes, int bit) {
  const uint32_t x = bytes >> bit & 0x01010101u;
  const uint32_t pairs = (x | x >> 7) & 0x00030003u;
  return (pairs | pairs >> 14) & 0xfu;
}

// The same with byte i to bit 4 i.
inline uint32_t four_bits_apart(uint32_t bytes, int bit) {
  const uint32_t x = bytes >> bit & 0x01010101u;
  const uint32_t pairs = (x | x >> 4) & 0x00110011u;
  return (pairs | pairs >> 8) & 0x1111u;
}

// Four elements of a key are half a byte of one word.
inline void put_key(uint8_t* plane, int64_t head_dim, int64_t t, int64_t d, uint32_t bytes, int bit) {
  const int64_t word = t / kKeyEntries * (head_dim / kKeyElements) + d / kKeyElements, lane = t % kKeyEntries;
  uint8_t* at = plane + byte_of(word, lane / 2);
  const int shift = lane % 2 * 4;
  *at = static_cast<uint8_t>((*at & ~(0xf << shift)) | four_bits(bytes, bit) << shift);
}

// Four elements of a value are a bit each of two bytes that lie side by side.
inline void put_value(uint8_t* plane, int64_t head_dim, int64_t t, int64_t d, uint32_t bytes, int bit) {
  const int64_t word = t / kValueEntries * (head_dim / kValueElements) + d / kValueElements;
  uint8_t* at = plane + byte_of(word, d % kValueElements / 2);
  const int shift = static_cast<int>(t % kValueEntries);
  uint16_t old;
  std::memcpy(&old, at, sizeof old);
  const uint16_t made = static_cast<uint16_t>((old & ~(0x1111u << shift)) | four_bits_apart(bytes, bit) << shift);
  std::memcpy(at, &made, sizeof made);
}

// The exponent that a group shares, as float16 has it.
inline int group_exponent(const float* x, int64_t n) {
  uint32_t most = 0;  // by bits: finite < infinity < NaN
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  constexpr uint32_t kMaxHalf = 0x477fe000u;  // 65504
  if (most > kMaxHalf) return kNotFiniteExponent;
  const int e = static_cast<int>(most >> 23) - 127 + 15;
  return e < 1 ? 1 : e;
}

// Signs in bit 7, magnitudes below. n is a multiple of 16.
template <class V>
inline void to_bytes(const float* x, int64_t n, int e, int bits, uint8_t* out) {
  if (e == kNotFiniteExponent) {
    std::memset(out, 0, static_cast<size_t>(n));
    return;
  }
  const auto factor = V::set(power_of_two(bits - 1 + 15 - e));
  const auto limit = V::set(static_cast<float>((1 << bits) - 1));
  for (int64_t i = 0; i < n; i += kLanes) {
    // The sign of zero is kept, so it is taken from the bits of x.
    float scaled[kLanes];
    V::store(scaled, V::min(V::rint(V::abs(V::mul(V::load(x + i), factor))), limit));
    for (int64_t l = 0; l < kLanes; ++l) {
      out[i + l] = static_cast<uint8_t>(static_cast<int>(scaled[l]) | (std::signbit(x[i + l]) ? 0x80 : 0));
    }
  }
}

struct StoredHead {
  uint8_t* upper;
  uint8_t* lower;
  uint8_t* exponents;
  int bits, upper_planes;
};

template <class V, class Put>
inline void store_planes(const float* x, int64_t dim, const StoredHead& head, int64_t t, const Put& put) {
  const int64_t group = planes_group(dim), bytes = plane_bytes(dim);
  uint8_t codes[kMaxPlanesDim];
  for (int64_t g = 0; g * group < dim; ++g) {
    const int e = group_exponent(x + g * group, group);
    to_bytes<V>(x + g * group, group, e, head.bits, codes + g * group);
    uint8_t* exponent = head.exponents + g * kExponentBytes + t / 8;
    for (int j = 0; j < kExponentBits; ++j) {
      const int bit = e >> (kExponentBits - 1 - j) & 1;
      exponent[8 * j] = static_cast<uint8_t>((exponent[8 * j] & ~(1 << t % 8)) | bit << t % 8);
    }
  }
  for (int64_t d = 0; d < dim; d += 4) {
    uint32_t four;
    std::memcpy(&four, codes + d, sizeof four);
    put(head.upper, dim, t, d, four, 7);
    for (int j = 0; j < head.bits; ++j) {
      uint8_t* plane =
          j < head.upper_planes ? head.upper + (1 + j) * bytes : head.lower + (j - head.upper_planes) * bytes;
      put(plane, dim, t, d, four, head.bits - 1 - j);
    }
  }
}

template <class V>
void planes_store(float* qkv, int64_t heads, const PlanesFormat& format, const PlanesBlock& block, int64_t entry,
                  const float* cos, const float* sin) {
  static constexpr auto kOnes = [] {
    struct {
      float at[kMaxPlanesDim];
    } ones{};
    for (float& one : ones.at) one = 1;
    return ones;
  }();
  const int64_t dim = format.head_dim, bytes = plane_bytes(dim);
  for (int64_t h = 0; h < heads + format.kv_heads; ++h) {
    rope<V>(qkv + h * dim, dim / 2, cos, sin);
    rotate<V>(qkv + h * dim, kOnes.at, dim, dim & -dim, false);
  }
  const float* keys = qkv + heads * dim;
  const float* values = keys + format.kv_heads * dim;
  const int64_t exponents = dim / planes_group(dim) * kExponentBytes;
  for (int64_t h = 0; h < format.kv_heads; ++h) {
    store_planes<V>(keys + h * dim, dim,
                    {block.keys + h * (1 + format.key_upper) * bytes,
                     block.low_keys + h * (format.key_bits - format.key_upper) * bytes,
                     block.key_exponents + h * exponents, format.key_bits, format.key_upper},
                    entry, put_key);
    store_planes<V>(values + h * dim, dim,
                    {block.values + h * (1 + format.value_upper) * bytes,
                     block.low_values + h * (format.value_bits - format.value_upper) * bytes,
                     block.value_exponents + h * exponents, format.value_bits, format.value_upper},
                    entry, put_value);
  }
}

}  // namespace taper::lanes
