// Rows in and out of the Anda format (docs/anda.md), a word of 64 values at a time. `Word` is what an instruction set
// does with one; BytesWord is that of sets without mask registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/exponent.hpp"
#include "kernels/common/lanes.hpp"
#include "kernels/common/planes_bits.hpp"

namespace taper::lanes {

// A power of two for each of 64 values: one for all where a word lies within a group, else an array.
struct OnePower {
  float value;
};
struct Powers {
  float values[kAndaWordValues];
};

// Calls body(word, first value, count, powers) for every word of a row; power(E) is the exponent.
template <class Power, class Body>
inline void for_each_word(const AndaRow& row, const uint8_t* exponents, const Power& power, const Body& body) {
  const bool is_uniform = row.group % kAndaWordValues == 0 || row.group >= row.values;
  for (int64_t begin = 0, w = row.first_word; begin < row.values; begin += kAndaWordValues, ++w) {
    const int64_t left = row.values - begin, count = left < kAndaWordValues ? left : kAndaWordValues;
    if (is_uniform) {
      body(w, begin, count, OnePower{power_of_two(power(exponents[begin / row.group]))});
      continue;
    }
    Powers powers{};
    for (int64_t i = 0; i < count;) {
      const int64_t group = (begin + i) / row.group, end = (group + 1) * row.group - begin;
      const float value = power_of_two(power(exponents[group]));
      for (; i < count && i < end; ++i) powers.values[i] = value;
    }
    body(w, begin, count, powers);
  }
}

// The field that float16 has for the largest of these magnitudes, subnormals and zeros as 1; 0 for what it cannot hold.
inline uint8_t anda_exponent(float, uint32_t most) {
  if (most > 0x477fe000u) return 0;  // 65504
  const uint32_t field = most >> 23;
  return field > 113 ? static_cast<uint8_t>(field - 112) : uint8_t{1};
}
inline uint8_t anda_exponent(uint16_t, uint32_t most) {
  const uint32_t field = most >> 10;
  return field == 31 ? uint8_t{0} : field > 1 ? static_cast<uint8_t>(field) : uint8_t{1};
}

template <class Word, class T>
bool anda_exponents(const T* x, const AndaRow& row, uint8_t* exponents) {
  bool is_held = true;
  for (int64_t begin = 0; begin < row.values; begin += row.group, ++exponents) {
    const int64_t left = row.values - begin;
    *exponents = anda_exponent(T{}, Word::largest(x + begin, left < row.group ? left : row.group));
    is_held = is_held && *exponents != 0;
  }
  return is_held;
}

template <class Word>
bool anda_exponents(const void* x, const AndaRow& row, uint8_t* exponents) {
  return row.type == KvType::f32 ? anda_exponents<Word>(static_cast<const float*>(x), row, exponents)
                                 : anda_exponents<Word>(static_cast<const uint16_t*>(x), row, exponents);
}

// What the next row has in the place of a word: its exponents are looked for when this row is done. 10 % of the packing
// of float32; of float16, which is not bound by memory, 7 % are lost with it.
inline void prefetch(const uint16_t*, int64_t) {}
inline void prefetch(const float* word, int64_t row_values) {
  const uintptr_t next = reinterpret_cast<uintptr_t>(word) + static_cast<uintptr_t>(row_values) * sizeof(float);
  for (uintptr_t line = 0; line < kAndaWordValues * sizeof(float); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(next + line));
  }
}

template <class Word, class T>
void anda_pack(const T* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words) {
  for_each_word(
      row, exponents, [&](int e) TAPER_INLINE { return row.magnitude_bits - 1 + kAndaBias - e; },
      [&](int64_t w, int64_t begin, int64_t count, const auto& factors) TAPER_INLINE {
        prefetch(x + begin, row.values);
        Word::pack(x + begin, count, factors, row.magnitude_bits, truncate, words + row.word(w));
      });
}

template <class Word>
void anda_pack(const void* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words) {
  row.type == KvType::f32 ? anda_pack<Word>(static_cast<const float*>(x), row, exponents, truncate, words)
                          : anda_pack<Word>(static_cast<const uint16_t*>(x), row, exponents, truncate, words);
}

template <class Word, class T>
void anda_unpack(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, T* x) {
  for_each_word(
      row, exponents, [&](int e) TAPER_INLINE { return e - kAndaBias - (bits - 1); },
      [&](int64_t w, int64_t begin, int64_t count, const auto& units)
          TAPER_INLINE { Word::unpack(words + row.word(w), bits, units, count, x + begin); });
}

template <class Word>
void anda_unpack(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, void* x) {
  row.type == KvType::f32 ? anda_unpack<Word>(words, row, exponents, bits, static_cast<float*>(x))
                          : anda_unpack<Word>(words, row, exponents, bits, static_cast<uint16_t*>(x));
}

// V rounds, and bits go through transposes of 8 x 8.
template <class V>
struct BytesWord {
  static uint32_t bits_of(const float* x) {
    uint32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return bits & 0x7fffffffu;
  }
  static uint32_t bits_of(const uint16_t* x) { return *x & 0x7fffu; }

  template <class T>
  static uint32_t largest(const T* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = bits_of(x + i);
      most = bits > most ? bits : most;
    }
    return most;
  }

  static auto power(const OnePower& p, int64_t) { return V::set(p.value); }
  static auto power(const Powers& p, int64_t i) { return V::load(p.values + i); }

  template <class T, class P>
  static void pack(const T* x, int64_t count, const P& factors, int magnitude_bits, bool truncate, uint64_t* words) {
    alignas(64) float rounded[kAndaWordValues], given[kAndaWordValues];
    const auto limit = V::set(static_cast<float>((1 << magnitude_bits) - 1));
    for (int64_t i = 0; i < kAndaWordValues; i += kLanes) {
      const int64_t left = count - i;
      const auto v = left >= kLanes ? V::load(x + i) : left > 0 ? V::load_first(x + i, left) : V::zero();
      const auto scaled = V::mul(V::abs(v), power(factors, i));
      V::store(rounded + i, V::min(truncate ? V::floor(scaled) : V::rint(scaled), limit));
      V::store(given + i, v);
    }
    // Loops that a compiler turns into vectors: magnitudes with the most significant bit at bit 15, and signs.
    uint8_t high[kAndaWordValues], low[kAndaWordValues];
    uint32_t bits[kAndaWordValues];
    std::memcpy(bits, given, sizeof bits);
    const float to_top = static_cast<float>(1 << (16 - magnitude_bits));
    uint8_t signs[kAndaWordValues];
    for (int64_t i = 0; i < kAndaWordValues; ++i) {
      const uint32_t m = static_cast<uint32_t>(static_cast<int32_t>(rounded[i] * to_top));
      high[i] = static_cast<uint8_t>(m >> 8);
      low[i] = static_cast<uint8_t>(m);
      signs[i] = static_cast<uint8_t>(bits[i] >> 24 & 0x80);
    }
    put(signs, 1, words);
    put(high, magnitude_bits < 8 ? magnitude_bits : 8, words + kAndaWordsAtAddress);
    if (magnitude_bits > 8) put(low, magnitude_bits - 8, words + 9 * kAndaWordsAtAddress);
  }

  // The upper `count` bits of 64 bytes as words, the uppermost first.
  static void put(const uint8_t* bytes, int count, uint64_t* words) {
    uint64_t planes[8] = {};
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, bytes + 8 * byte, sizeof eight);
      eight = transpose_bits(eight);
      for (int bit = 0; bit < 8; ++bit) planes[bit] |= (eight >> 8 * bit & 0xff) << 8 * byte;
    }
    for (int j = 0; j < count; ++j) words[j * kAndaWordsAtAddress] = planes[7 - j];
  }

  // And back; the bits below them are zero.
  static void get(const uint64_t* words, int count, uint8_t* bytes) {
    uint64_t planes[8] = {};
    for (int j = 0; j < count; ++j) planes[7 - j] = words[j * kAndaWordsAtAddress];
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t eight = 0;
      for (int bit = 0; bit < 8; ++bit) eight |= (planes[bit] >> 8 * byte & 0xff) << 8 * bit;
      eight = transpose_bits(eight);
      std::memcpy(bytes + 8 * byte, &eight, sizeof eight);
    }
  }

  template <class T, class P>
  static void unpack(const uint64_t* words, int bits, const P& units, int64_t count, T* x) {
    uint8_t signs[kAndaWordValues], high[kAndaWordValues], low[kAndaWordValues] = {};
    get(words, 1, signs);
    get(words + kAndaWordsAtAddress, bits < 8 ? bits : 8, high);
    if (bits > 8) get(words + 9 * kAndaWordsAtAddress, bits - 8, low);
    alignas(64) float magnitudes[kAndaWordValues];
    alignas(64) uint32_t flips[kAndaWordValues];
    for (int64_t i = 0; i < kAndaWordValues; ++i) {
      magnitudes[i] = static_cast<float>(static_cast<int32_t>(high[i]) << 8 | low[i]);
      flips[i] = static_cast<uint32_t>(signs[i]) << 24;
    }
    const auto from_top = V::set(power_of_two(bits - 16));
    for (int64_t i = 0; i < count; i += kLanes) {
      uint32_t lanes[kLanes];
      float values[kLanes];
      V::store(values, V::mul(V::mul(V::load(magnitudes + i), from_top), power(units, i)));
      std::memcpy(lanes, values, sizeof lanes);
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] ^= flips[i + l];
      std::memcpy(values, lanes, sizeof lanes);
      count - i >= kLanes ? V::store(x + i, V::load(values)) : V::store_first(x + i, V::load(values), count - i);
    }
  }
};

}  // namespace taper::lanes
