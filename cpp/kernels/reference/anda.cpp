#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/reference/half.hpp"
#include "kernels/reference/reference.hpp"

namespace taper::reference {
namespace {

constexpr float kLargest = 65504.0f;

float value_at(const void* x, const AndaRow& row, int64_t i) {
  return row.type == KvType::f32 ? static_cast<const float*>(x)[i] : from_half(static_cast<const uint16_t*>(x)[i]);
}

// What one is worth, for a value read at `bits`.
float unit(const AndaRow& row, const uint8_t* exponents, int bits, int64_t i) {
  return std::ldexp(1.0f, exponents[i / row.group] - kAndaBias - (bits - 1));
}

}  // namespace

bool anda_exponents(const void* x, const AndaRow& row, uint8_t* exponents) {
  std::fill(exponents, exponents + (row.values + row.group - 1) / row.group, uint8_t{1});
  bool is_held = true;
  for (int64_t i = 0; i < row.values; ++i) {
    uint8_t& shared = exponents[i / row.group];
    const float a = std::fabs(value_at(x, row, i));
    if (!(a <= kLargest)) is_held = false;  // a NaN is not
    if (shared == 0) continue;
    const int field = static_cast<int>(std::bit_cast<uint32_t>(a) >> 23) - 127 + kAndaBias;
    shared = a <= kLargest ? static_cast<uint8_t>(std::max<int>(shared, field)) : uint8_t{0};
  }
  return is_held;
}

void anda_pack(const void* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words) {
  for (int64_t i = 0; i < row.values; ++i) {
    uint64_t* at = words + row.word(row.first_word + i / kAndaWordValues);
    const int64_t bit = i % kAndaWordValues;
    const float v = value_at(x, row, i);
    const float scaled = std::fabs(v) / unit(row, exponents, row.magnitude_bits, i);
    const float rounded = truncate ? std::trunc(scaled) : std::nearbyint(scaled);
    const int m = std::min(static_cast<int>(rounded), (1 << row.magnitude_bits) - 1);
    for (int j = 0; j <= row.magnitude_bits; ++j) {
      const bool one = j == 0 ? std::signbit(v) : (m >> (row.magnitude_bits - j) & 1) != 0;
      uint64_t& word = at[j * kAndaWordsAtAddress];
      word = (bit == 0 ? 0 : word) | static_cast<uint64_t>(one) << bit;
    }
  }
}

void anda_unpack(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, void* x) {
  for (int64_t i = 0; i < row.values; ++i) {
    const uint64_t* at = words + row.word(row.first_word + i / kAndaWordValues);
    const auto bit = [&](int j) { return static_cast<int>(at[j * kAndaWordsAtAddress] >> i % kAndaWordValues & 1); };
    int m = 0;
    for (int j = 1; j <= bits; ++j) m = 2 * m + bit(j);
    const float a = static_cast<float>(m) * unit(row, exponents, bits, i), value = bit(0) != 0 ? -a : a;
    if (row.type == KvType::f32) {
      static_cast<float*>(x)[i] = value;
    } else {
      static_cast<uint16_t*>(x)[i] = to_half(value);
    }
  }
}

}  // namespace taper::reference
