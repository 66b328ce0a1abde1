#include "apis/anda.hpp"

#include <algorithm>
#include <bit>
#include <vector>

#include "apis/check.hpp"
#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"
#include "taper/kernels.hpp"

namespace taper {
namespace {

constexpr uint32_t kMaxHalfBits = 0x477fe000u;  // 65504
constexpr int kBias = 15;
constexpr int64_t kPsPerValue = 100;

void check_shape(const AndaShape& shape) {
  require(shape.rows >= 1 && shape.values >= 1, "x has shape (", shape.rows, ", ", shape.values,
          "), expected at least (1, 1)");
  require(shape.magnitude_bits >= 1 && shape.magnitude_bits <= kMaxAndaBits, "magnitude_bits is ", shape.magnitude_bits,
          ", expected 1..", kMaxAndaBits);
  require(shape.group == shape.values || (shape.group >= 1 && std::has_single_bit(static_cast<uint64_t>(shape.group))),
          "group_size is ", shape.group, ", expected a power of two, or the whole row");
}

float power_of_two(int e) { return std::bit_cast<float>(static_cast<uint32_t>(e + 127) << 23); }

// For the 64 values from `begin` of a row on, a power of two by their group's exponent.
template <class Power>
void fill(const uint8_t* exponents, const AndaShape& shape, int64_t begin, const Power& power, float* out) {
  const int64_t end = std::min(begin + kAndaWordValues, shape.values);
  std::fill(out, out + kAndaWordValues, 0.0f);
  for (int64_t i = begin; i < end;) {
    const int64_t group = i / shape.group, stop = std::min(end, (group + 1) * shape.group);
    std::fill(out + (i - begin), out + (stop - begin), power_of_two(power(exponents[group])));
    i = stop;
  }
}

template <class Word>
Word* word_at(Word* words, const AndaShape& shape, int64_t index) {
  return words + index / kAndaWordsAtAddress * (shape.magnitude_bits + 1) * kAndaWordsAtAddress +
         index % kAndaWordsAtAddress;
}

template <class Row>
void for_each_row(const AndaShape& shape, const Row& row) {
  const Plan plan = plan_items(shape.rows, shape.values * kPsPerValue, num_threads());
  parallel_for(shape.rows, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

}  // namespace

void anda_pack(const float* x, const AndaShape& shape, bool truncate, uint64_t* words, uint8_t* exponents) {
  check_shape(shape);
  const Kernels& table = kernels();
  const int64_t groups = shape.groups_of_row(), words_of_row = shape.words_of_row();
  std::vector<uint8_t> chosen(static_cast<size_t>(shape.rows * groups));
  for_each_row(shape, [&](int64_t r) {
    const float* row = x + r * shape.values;
    uint8_t* own = chosen.data() + r * groups;
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t most =
          table.largest_bits(row + g * shape.group, std::min(shape.group, shape.values - g * shape.group));
      own[g] = most > kMaxHalfBits ? 0 : static_cast<uint8_t>(std::max(1, static_cast<int>(most >> 23) - 127 + kBias));
      if (own[g] == 0) return;
    }
    float factors[kAndaWordValues];
    uint64_t packed[kMaxAndaBits + 1];
    for (int64_t w = 0; w < words_of_row; ++w) {
      const int64_t begin = w * kAndaWordValues;
      if (w == 0 || shape.group < shape.values) {
        fill(own, shape, begin, [&](int e) { return shape.magnitude_bits - 1 + kBias - e; }, factors);
      }
      table.anda_pack(row + begin, std::min(kAndaWordValues, shape.values - begin), factors, shape.magnitude_bits,
                      truncate, packed);
      uint64_t* at = word_at(words, shape, r * words_of_row + w);
      for (int j = 0; j <= shape.magnitude_bits; ++j) at[j * kAndaWordsAtAddress] = packed[j];
    }
  });
  for (size_t g = 0; g < chosen.size(); ++g) {
    require(chosen[g] != 0, "x holds a value that is not finite or beyond 65504 in row ",
            static_cast<int64_t>(g) / groups);
    const size_t bit = 5 * g;
    const unsigned shifted = static_cast<unsigned>(chosen[g]) << bit % 8;
    exponents[bit / 8] = static_cast<uint8_t>(exponents[bit / 8] | shifted);
    if (shifted > 0xff) exponents[bit / 8 + 1] = static_cast<uint8_t>(shifted >> 8);
  }
}

void anda_unpack(const uint64_t* words, const uint8_t* exponents, const AndaShape& shape, int bits, float* x) {
  check_shape(shape);
  require(bits >= 1 && bits <= shape.magnitude_bits, "magnitude_bits is ", bits, ", expected 1..",
          shape.magnitude_bits);
  const Kernels& table = kernels();
  const int64_t groups = shape.groups_of_row(), words_of_row = shape.words_of_row();
  for_each_row(shape, [&](int64_t r) {
    thread_local std::vector<uint8_t> own;
    own.resize(static_cast<size_t>(groups));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t bit = 5 * (r * groups + g);
      unsigned two = exponents[bit / 8];
      if (bit % 8 > 3) two |= static_cast<unsigned>(exponents[bit / 8 + 1]) << 8;
      own[static_cast<size_t>(g)] = static_cast<uint8_t>(two >> bit % 8 & 31);
    }
    float units[kAndaWordValues];
    uint64_t packed[kMaxAndaBits + 1];
    for (int64_t w = 0; w < words_of_row; ++w) {
      const int64_t begin = w * kAndaWordValues;
      fill(own.data(), shape, begin, [&](int e) { return e - kBias - (bits - 1); }, units);
      const uint64_t* at = word_at(words, shape, r * words_of_row + w);
      for (int j = 0; j <= bits; ++j) packed[j] = at[j * kAndaWordsAtAddress];
      table.anda_unpack(packed, bits, units, std::min(kAndaWordValues, shape.values - begin),
                        x + r * shape.values + begin);
    }
  });
}

}  // namespace taper
