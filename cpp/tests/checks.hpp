// What the test programs share: seeded data on heap arrays of exactly the size that an operation may touch, and the
// comparison of an instruction set with the reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/dispatch.hpp"

namespace taper::checks {

inline std::mt19937 random_bits(1);
inline int comparisons = 0, failures = 0;

inline std::vector<float> floats(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(random_bits);
  return out;
}

template <class T>
std::vector<T> bytes(int64_t n) {
  std::vector<T> out(n);
  for (T& x : out) x = static_cast<T>(random_bits());
  return out;
}

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::string describe(const char* operation, std::initializer_list<std::pair<const char*, int64_t>> shape) {
  std::string out = operation;
  for (const auto& [name, size] : shape) out += std::string(", ") + name + " " + std::to_string(size);
  return out;
}

// Every one of the values at places that differ with `seed`.
inline std::vector<float> sprinkle(std::vector<float> x, const std::vector<float>& values, size_t seed) {
  for (size_t i = 0; i < values.size(); ++i) x[(seed + 7 * i) % x.size()] = values[i];
  return x;
}

// The bits of a result. All NaNs are one: which of two operands' NaNs an operation returns is not defined. uint16_t are
// float16.
template <class T>
uint32_t word(T value) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return std::isnan(value) ? 0x7fc00000 : bits;
  } else if constexpr (std::is_same_v<T, uint16_t>) {
    return (value & 0x7fff) > 0x7c00 ? 0x7e00 : value;
  } else {
    return static_cast<uint32_t>(value);
  }
}

// The results of an operation, one array after another.
template <class... T>
std::vector<uint32_t> words(const std::vector<T>&... results) {
  std::vector<uint32_t> out;
  const auto append = [&](const auto& values) {
    for (const auto value : values) out.push_back(word(value));
  };
  (append(results), ...);
  return out;
}

// Those that are chosen, and the emulated one where its other instructions run.
inline std::vector<std::string> tested_isas() {
  std::vector<std::string> names = available_isas();
  try {
    use_isa("amx_emulated");
    names.emplace_back("amx_emulated");
  } catch (const std::invalid_argument&) {
  }
  return names;
}

// Runs `operation`, which returns words(), on every set's table and on the reference.
template <class Operation>
void compare(const std::string& what, const Operation& operation) {
  use_isa("reference");
  const std::vector<uint32_t> expected = operation(kernels());
  for (const std::string& isa : tested_isas()) {
    if (isa == "reference") continue;
    use_isa(isa);
    const std::vector<uint32_t> found = operation(kernels());
    ++comparisons;
    if (found == expected) continue;
    size_t at = 0, differ = 0;
    for (size_t i = expected.size(); i-- > 0;) {
      if (found[i] != expected[i]) at = i, ++differ;
    }
    std::printf("%s: %s: %zu of %zu elements differ, first [%zu]: %08x, reference %08x\n", isa.c_str(), what.c_str(),
                differ, expected.size(), at, found[at], expected[at]);
    ++failures;
  }
}

// Every operation of every instruction set of this machine over many shapes.
void check_kernels();
// Those of a KV cache of planes, and of rows in the Anda format.
void check_kv_planes();

}  // namespace taper::checks
