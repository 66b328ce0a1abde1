#include "apis/anda.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "apis/check.hpp"
#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"
#include "taper/kernels.hpp"

namespace taper {
namespace {

// 64 values take 12 ns (AVX-512).
constexpr int64_t kPsPerValue = 200;
constexpr int kExponentsTogether = 8;  // of 5 bits are 5 bytes

void check_shape(const AndaShape& shape) {
  require(shape.rows >= 1 && shape.values >= 1, "x has shape (", shape.rows, ", ", shape.values,
          "), expected at least (1, 1)");
  require(shape.magnitude_bits >= 1 && shape.magnitude_bits <= kMaxAndaBits, "magnitude_bits is ", shape.magnitude_bits,
          ", expected 1..", kMaxAndaBits);
  require(shape.group == shape.values || (shape.group >= 1 && std::has_single_bit(static_cast<uint64_t>(shape.group))),
          "group_size is ", shape.group, ", expected a power of two, or the whole row");
}

AndaRow row_of(const AndaShape& shape, int64_t row, KvType type) {
  return {shape.values, shape.group, row * shape.words_of_row(), shape.magnitude_bits, type};
}

int64_t bytes_of(KvType type) { return type == KvType::f32 ? 4 : 2; }

// count: all groups; what fills up the bytes is zero.
void pack_exponents(const uint8_t* chosen, int64_t count, uint8_t* packed, int64_t num_bytes) {
  std::memset(packed, 0, static_cast<size_t>(num_bytes));
  for (int64_t g = 0; g < count; g += kExponentsTogether, packed += kExponentBits) {
    uint64_t bits = 0;
    for (int64_t k = 0; k < std::min<int64_t>(kExponentsTogether, count - g); ++k) {
      bits |= static_cast<uint64_t>(chosen[g + k]) << kExponentBits * k;
    }
    for (int k = 0; k < kExponentBits; ++k) packed[k] = static_cast<uint8_t>(bits >> 8 * k);
  }
}

template <class Row>
void for_each_row(const AndaShape& shape, const Row& row) {
  const Plan plan = plan_items(shape.rows, shape.values * kPsPerValue, num_threads());
  parallel_for(shape.rows, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

}  // namespace

void anda_pack(const void* x, KvType type, const AndaShape& shape, bool truncate, uint64_t* words, uint8_t* exponents) {
  check_shape(shape);
  const Kernels& table = kernels();
  const int64_t groups = shape.groups_of_row(), row_bytes = shape.values * bytes_of(type);
  std::vector<uint8_t> chosen(static_cast<size_t>(shape.rows * groups));
  for_each_row(shape, [&](int64_t r) {
    const auto* row = static_cast<const char*>(x) + r * row_bytes;
    uint8_t* own = chosen.data() + r * groups;
    if (table.anda_exponents(row, row_of(shape, r, type), own)) {
      table.anda_pack(row, row_of(shape, r, type), own, truncate, words);
    }
  });
  const int64_t bad = std::find(chosen.begin(), chosen.end(), 0) - chosen.begin();
  require(bad == shape.rows * groups, "x holds a value that is not finite or beyond 65504 in row ", bad / groups);
  pack_exponents(chosen.data(), shape.rows * groups, exponents, shape.exponent_bytes());
  // What the last address has beyond the last word.
  const AndaRow all = row_of(shape, 0, type);
  for (int64_t w = shape.rows * shape.words_of_row(); w < shape.addresses() * kAndaWordsAtAddress; ++w) {
    for (int j = 0; j <= shape.magnitude_bits; ++j) words[all.word(w) + j * kAndaWordsAtAddress] = 0;
  }
}

void anda_unpack(const uint64_t* words, const uint8_t* exponents, const AndaShape& shape, int bits, KvType type,
                 void* x) {
  check_shape(shape);
  require(bits >= 1 && bits <= shape.magnitude_bits, "magnitude_bits is ", bits, ", expected 1..",
          shape.magnitude_bits);
  const Kernels& table = kernels();
  const int64_t groups = shape.groups_of_row(), row_bytes = shape.values * bytes_of(type);
  for_each_row(shape, [&](int64_t r) {
    thread_local std::vector<uint8_t> own;
    own.resize(static_cast<size_t>(groups));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t bit = kExponentBits * (r * groups + g);
      unsigned two = exponents[bit / 8];
      if (bit % 8 > 3) two |= static_cast<unsigned>(exponents[bit / 8 + 1]) << 8;
      own[static_cast<size_t>(g)] = static_cast<uint8_t>(two >> bit % 8 & 31);
    }
    table.anda_unpack(words, row_of(shape, r, type), own.data(), bits, static_cast<char*>(x) + r * row_bytes);
  });
}

}  // namespace taper
