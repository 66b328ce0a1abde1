// Rows of floats into the Anda format and back (docs/anda.md).
#pragma once

#include <cstdint>

#include "taper/kernels.hpp"

namespace taper {

struct AndaShape {
  int64_t rows, values;  // (rows, values)
  int64_t group;         // values that share an exponent: a power of two, or all of a row
  int magnitude_bits;    // 1..kMaxAndaBits, stored

  int64_t words_of_row() const { return (values + kAndaWordValues - 1) / kAndaWordValues; }
  int64_t addresses() const { return (rows * words_of_row() + kAndaWordsAtAddress - 1) / kAndaWordsAtAddress; }
  int64_t groups_of_row() const { return (values + group - 1) / group; }
  int64_t exponent_bytes() const { return (rows * groups_of_row() + 15) / 16 * 10; }
};

// x: (rows, values) of `type`. words: (addresses, magnitude_bits + 1, 16), exponents: exponent_bytes; both are
// overwritten as a whole, also where the call throws.
// Throws std::invalid_argument for a shape that the format has not, and for values that are not finite or too large.
void anda_pack(const void* x, KvType type, const AndaShape& shape, bool truncate, uint64_t* words, uint8_t* exponents);

// x: (rows, values) of `type`, overwritten: the rows read at `bits` of the stored magnitude bits; float16 is rounded to
// nearest even.
void anda_unpack(const uint64_t* words, const uint8_t* exponents, const AndaShape& shape, int bits, KvType type,
                 void* x);

}  // namespace taper
