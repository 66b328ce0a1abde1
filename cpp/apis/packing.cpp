#include "apis/check.hpp"
#include "apis/planes.hpp"
#include "heuristics/plan.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kPsPerBit = 500;  // scalar code

// Calls visit(first column, V) for each block of a row (docs/format.md, "A plane").
template <class Visit>
void for_each_block(int64_t cols, const Visit& visit) {
  int64_t begin = 0;
  for (int64_t width = kBlock; begin < cols;) {
    if (cols - begin < width) {
      width /= 2;
      continue;
    }
    visit(begin, width / 8);
    begin += width;
  }
}

void check_shape(int64_t rows, int64_t in_features, int bits) {
  require(rows >= 1 && in_features >= 1, "codes have shape (", rows, ", ", in_features, "), expected at least (1, 1)");
  require(bits >= 1 && bits <= kMaxBits, "bits ", bits, " is outside 1..", kMaxBits);
}

}  // namespace

void pack_planes(const uint8_t* codes, int64_t rows, int64_t in_features, int parent_bits, uint8_t* const* planes) {
  check_shape(rows, in_features, parent_bits);
  for (int64_t i = 0; i < rows * in_features; ++i) {
    require(codes[i] >> parent_bits == 0, "code ", int{codes[i]}, " does not fit ", parent_bits, " bits");
  }
  const int64_t cols = padded_cols(in_features), stride = cols / 8;
  const Plan plan = plan_items(rows, cols * parent_bits * kPsPerBit, num_threads());
  parallel_for(rows, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* code = codes + row * in_features;
      for_each_block(cols, [&](int64_t first, int64_t bytes) {
        for (int p = 0; p < parent_bits; ++p) {
          uint8_t* block = planes[p] + row * stride + first / 8;
          for (int64_t j = 0; j < bytes; ++j) {
            unsigned byte = 0;
            for (int g = 0; g < 8; ++g) {
              const int64_t column = first + bytes * g + j;
              if (column < in_features) byte |= ((code[column] >> (parent_bits - 1 - p)) & 1u) << g;
            }
            block[j] = static_cast<uint8_t>(byte);
          }
        }
      });
    }
  });
}

void unpack_codes(const uint8_t* const* planes, int bits, int64_t rows, int64_t in_features, uint8_t* codes) {
  check_shape(rows, in_features, bits);
  const int64_t cols = padded_cols(in_features), stride = cols / 8;
  const Plan plan = plan_items(rows, cols * bits * kPsPerBit, num_threads());
  parallel_for(rows, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* code = codes + row * in_features;
      for_each_block(cols, [&](int64_t first, int64_t bytes) {
        for (int64_t column = first; column < first + 8 * bytes && column < in_features; ++column) {
          const int64_t g = (column - first) / bytes, j = (column - first) % bytes;
          unsigned value = 0;
          for (int p = 0; p < bits; ++p) value = value << 1 | ((planes[p][row * stride + first / 8 + j] >> g) & 1u);
          code[column] = static_cast<uint8_t>(value);
        }
      });
    }
  });
}

}  // namespace taper
