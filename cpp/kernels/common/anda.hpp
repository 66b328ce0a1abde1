// Rows in and out of the Anda format (docs/anda.md) for sets without mask registers: V rounds, and bits go through
// transposes of 8 x 8.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/lanes.hpp"
#include "kernels/common/planes_bits.hpp"

namespace taper::lanes {

template <class V>
void anda_pack(const float* x, int64_t count, const float* factors, int magnitude_bits, bool truncate,
               uint64_t* words) {
  uint8_t low[64] = {}, high[64] = {};
  uint64_t signs = 0;
  const auto limit = V::set(static_cast<float>((1 << magnitude_bits) - 1));
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    const auto v = left == kLanes ? V::load(x + i) : V::load_first(x + i, left);
    const auto scaled = V::mul(V::abs(v), V::load(factors + i));
    float rounded[kLanes];
    V::store(rounded, V::min(truncate ? V::floor(scaled) : V::rint(scaled), limit));
    for (int64_t l = 0; l < left; ++l) {
      const int m = static_cast<int>(rounded[l]);
      low[i + l] = static_cast<uint8_t>(m);
      high[i + l] = static_cast<uint8_t>(m >> 8);
      signs |= static_cast<uint64_t>(__builtin_signbit(x[i + l]) != 0) << (i + l);
    }
  }
  words[0] = signs;
  const auto put = [&](const uint8_t* bytes, int first_bit) {
    uint64_t planes[8] = {};
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, bytes + 8 * byte, sizeof eight);
      eight = transpose_bits(eight);
      for (int bit = 0; bit < 8; ++bit) planes[bit] |= (eight >> 8 * bit & 0xff) << 8 * byte;
    }
    for (int bit = 0; bit < 8 && first_bit + bit < magnitude_bits; ++bit) {
      words[magnitude_bits - first_bit - bit] = planes[bit];
    }
  };
  put(low, 0);
  if (magnitude_bits > 8) put(high, 8);
}

template <class V>
void anda_unpack(const uint64_t* words, int magnitude_bits, const float* units, int64_t count, float* x) {
  uint8_t low[64], high[64] = {};
  const auto get = [&](int first_bit, uint8_t* bytes) {
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t eight = 0;
      for (int bit = 0; bit < 8 && first_bit + bit < magnitude_bits; ++bit) {
        eight |= (words[magnitude_bits - first_bit - bit] >> 8 * byte & 0xff) << 8 * bit;
      }
      eight = transpose_bits(eight);
      std::memcpy(bytes + 8 * byte, &eight, sizeof eight);
    }
  };
  get(0, low);
  if (magnitude_bits > 8) get(8, high);
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(high[i] << 8 | low[i]) * units[i];
    x[i] = words[0] >> i & 1 ? -value : value;
  }
}

template <class V>
uint32_t largest_bits(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

}  // namespace taper::lanes
