// Bit planes to weights, eight registers of 64 columns from one 64-byte load a plane (docs/format.md, "A plane").
//
// vpermb reads the low 6 bits of an index and vpermi2b the low 7, so an index needs no cleaning: the table repeats over
// the bits that hold no part of the code, and the code's bits may sit in any order, since the table is permuted to
// match once a call. Vector operations a 64-byte line, with the lookups and one vpdpbusd a register:
//   bits        1     2     3    4    5    6    7     8
//   operations  17    11    9.7  9    9.4  9    11.3  14
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>

#include "kernels/common/unroll.hpp"

namespace taper::avx512 {

inline constexpr int kGroups = 8;       // bits of a byte: groups of columns in a block
inline constexpr int kSignFlip = 0x80;  // w ^ 0x80 is w + 128 as an unsigned byte, what vpdpbusd multiplies

// mask ? a : b, bit by bit.
inline __m512i select(uint8_t mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xCA);
}

// 16-bit shifts: what crosses a byte is masked by the select that follows, or lies above the index.
template <int kBy>
inline __m512i left(__m512i x) {
  return _mm512_slli_epi16(x, kBy);
}
template <int kBy>
inline __m512i right(__m512i x) {
  return _mm512_srli_epi16(x, kBy);
}

// Registers whose bytes hold fields of 2 bits (groups 0 2 4 6, then 1 3 5 7) or 4 bits (04, 26, 15, 37), low field
// first.
struct Pairs {
  __m512i even, odd;
};
struct Nibbles {
  __m512i g04, g26, g15, g37;
};

inline Pairs make_pairs(__m512i high, __m512i low) {
  return {select(0x55, low, left<1>(high)), select(0x55, right<1>(low), high)};
}

inline Nibbles make_nibbles(const Pairs& high, const Pairs& low) {
  return {select(0x33, low.even, left<2>(high.even)), select(0x33, right<2>(low.even), high.even),
          select(0x33, low.odd, left<2>(high.odd)), select(0x33, right<2>(low.odd), high.odd)};
}

// Number of 64-byte tables that the lookup of a width needs.
inline constexpr std::array<int, 9> kTables = {0, 6, 3, 6, 1, 2, 1, 2, 4};

// Lane i of a table holds the value of this code; position[k] is the index bit that holds bit k of the code, most
// significant first.
template <size_t kBits, size_t kLanes = 64>
constexpr std::array<uint8_t, kLanes> table_order(const std::array<int, kBits>& position) {
  std::array<uint8_t, kLanes> order{};
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (int bit : position) order[lane] = static_cast<uint8_t>(2 * order[lane] + ((lane >> bit) & 1));
  }
  return order;
}

// Registers that hold the codes of one block between the two steps of a lookup.
inline constexpr std::array<int, 9> kFields = {0, 1, 2, 4, 4, 5, 6, 8, 8};

template <int kBits>
class PlaneLookup {
 public:
  struct Fields {
    __m512i at[kFields[kBits]];
  };

  // values: 2^kBits int8 in code order; flip is XORed to each.
  PlaneLookup(const int8_t* values, int flip);

  // planes: the same 64 bytes of each plane, most significant first.
  static Fields gather(const __m512i* planes);
  // The values of a group, 0..7, of the block's columns.
  template <int kGroup>
  __m512i find(const Fields& fields) const;

 private:
  __m512i narrow(int table, __m512i index) const { return _mm512_permutexvar_epi8(index, tables_[table]); }
  __m512i wide(__m512i index) const;

  __m512i tables_[kTables[kBits]];
};

template <int kBits>
PlaneLookup<kBits>::PlaneLookup(const int8_t* values, int flip) {
  constexpr int kRegisters = kBits <= 6 ? 1 : 1 << (kBits - 6);
  constexpr __mmask64 kMask = kBits >= 6 ? ~__mmask64{0} : (__mmask64{1} << (1 << (kBits % 6))) - 1;
  __m512i parts[kRegisters];
  for (int i = 0; i < kRegisters; ++i) {
    parts[i] =
        _mm512_xor_si512(_mm512_maskz_loadu_epi8(kMask, values + 64 * i), _mm512_set1_epi8(static_cast<char>(flip)));
  }
  auto place = [&](int table, const std::array<uint8_t, 64>& order) {
    tables_[table] = _mm512_permutexvar_epi8(_mm512_loadu_si512(order.data()), parts[0]);
  };
  if constexpr (kBits == 1) {
    static constexpr std::array<std::array<uint8_t, 64>, 6> kOrders = {table_order<1>({0}), table_order<1>({1}),
                                                                       table_order<1>({2}), table_order<1>({3}),
                                                                       table_order<1>({4}), table_order<1>({5})};
    for (int i = 0; i < 6; ++i) place(i, kOrders[i]);
  } else if constexpr (kBits == 2) {
    static constexpr std::array<std::array<uint8_t, 64>, 3> kOrders = {table_order<2>({1, 0}), table_order<2>({3, 2}),
                                                                       table_order<2>({5, 4})};
    for (int i = 0; i < 3; ++i) place(i, kOrders[i]);
  } else if constexpr (kBits == 3) {
    static constexpr std::array<std::array<uint8_t, 64>, 6> kOrders = {
        table_order<3>({0, 2, 4}), table_order<3>({1, 3, 5}), table_order<3>({2, 4, 0}),
        table_order<3>({3, 5, 1}), table_order<3>({4, 0, 2}), table_order<3>({5, 1, 3})};
    for (int i = 0; i < 6; ++i) place(i, kOrders[i]);
  } else if constexpr (kBits == 4) {
    static constexpr auto kOrder = table_order<4>({3, 2, 1, 0});
    place(0, kOrder);
  } else if constexpr (kBits == 5) {
    static constexpr std::array<std::array<uint8_t, 64>, 2> kOrders = {table_order<5>({3, 2, 1, 0, 4}),
                                                                       table_order<5>({3, 2, 1, 0, 5})};
    for (int i = 0; i < 2; ++i) place(i, kOrders[i]);
  } else if constexpr (kBits == 6) {
    static constexpr auto kOrder = table_order<6>({3, 2, 1, 0, 5, 4});
    place(0, kOrder);
  } else if constexpr (kBits == 7) {
    static constexpr auto kOrder = table_order<7, 128>({3, 2, 1, 0, 5, 4, 6});
    for (int i = 0; i < 2; ++i) {
      tables_[i] = _mm512_permutex2var_epi8(parts[0], _mm512_loadu_si512(kOrder.data() + 64 * i), parts[1]);
    }
  } else {
    for (int i = 0; i < 4; ++i) tables_[i] = parts[i];
  }
}

// Two lookups of 128 entries for 8 bits, merged by the top bit; one for 7.
template <int kBits>
TAPER_INLINE inline __m512i PlaneLookup<kBits>::wide(__m512i index) const {
  const __m512i low = _mm512_permutex2var_epi8(tables_[0], index, tables_[1]);
  if constexpr (kBits == 7) {
    return low;
  } else {
    const __m512i high = _mm512_permutex2var_epi8(tables_[2], index, tables_[3]);
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index), high);
  }
}

template <int kBits>
TAPER_INLINE inline typename PlaneLookup<kBits>::Fields PlaneLookup<kBits>::gather(const __m512i* p) {
  if constexpr (kBits == 1) {
    return {{p[0]}};
  } else if constexpr (kBits == 2) {
    const Pairs a = make_pairs(p[0], p[1]);
    return {{a.even, a.odd}};
  } else if constexpr (kBits == 3) {
    // Two groups in six bits: two bits of each plane, and no more shifts (tables 0 2 4: the even group, 1 3 5: the
    // odd).
    const __m512i p1_up = left<2>(p[1]), p1_down = right<4>(p[1]), p2_down = right<2>(p[2]);
    return {{select(0x03, p[0], select(0x0C, p1_up, left<4>(p[2]))), select(0x0C, p[0], select(0x30, p1_up, p2_down)),
             select(0x30, p[0], select(0x0C, p2_down, p1_down)),
             select(0x03, right<6>(p[0]), select(0x0C, p1_down, p2_down))}};
  } else {
    const Nibbles n = make_nibbles(make_pairs(p[0], p[1]), make_pairs(p[2], p[3]));
    if constexpr (kBits == 4) {
      return {{n.g04, n.g15, n.g26, n.g37}};
    } else if constexpr (kBits == 5) {
      return {{n.g04, n.g15, n.g26, n.g37, p[4]}};
    } else {
      const Pairs c = make_pairs(p[4], p[5]);
      if constexpr (kBits == 6) {
        return {{n.g04, n.g15, n.g26, n.g37, c.even, c.odd}};
      } else if constexpr (kBits == 7) {
        // Three bits of each group above the nibble: a pair, the last plane on index bit 6, garbage on bit 7.
        return {{select(0x33, c.even, left<2>(p[6])), select(0x33, c.odd, left<1>(p[6])),
                 select(0x33, right<2>(c.even), p[6]), select(0x33, right<2>(c.odd), right<1>(p[6])), n.g04, n.g15,
                 n.g26, n.g37}};
      } else {
        const Nibbles m = make_nibbles(c, make_pairs(p[6], p[7]));
        return {{n.g04, n.g15, n.g26, n.g37, m.g04, m.g15, m.g26, m.g37}};
      }
    }
  }
}

template <int kBits>
template <int kGroup>
TAPER_INLINE inline __m512i PlaneLookup<kBits>::find(const Fields& f) const {
  constexpr int kOdd = kGroup % 2, kPair = kGroup / 2, kQuad = kGroup % 4;
  constexpr bool kUpper = kGroup >= 4;  // the group lies in the high nibble
  if constexpr (kBits == 1) {
    return kGroup < 6 ? narrow(kGroup % 6, f.at[0]) : narrow(kGroup - 2, right<2>(f.at[0]));
  } else if constexpr (kBits == 2) {
    return kPair < 3 ? narrow(kPair % 3, f.at[kOdd]) : narrow(2, right<2>(f.at[kOdd]));
  } else if constexpr (kBits == 3) {
    return narrow(kPair % 3 * 2 + kOdd, f.at[kPair]);
  } else if constexpr (kBits >= 7) {
    const __m512i high = f.at[kQuad], low = f.at[kQuad + 4];
    return wide(kUpper ? select(0x0F, right<4>(low), high) : select(0x0F, low, left<4>(high)));
  } else {
    const __m512i nibble = kUpper ? right<4>(f.at[kQuad]) : f.at[kQuad];
    if constexpr (kBits == 4) {
      return narrow(0, nibble);
    } else {
      // The fifth bit of an even group lands on index bit 4 (table 0), of an odd one on bit 5 (table 1); a pair on
      // both.
      const __m512i top = f.at[kBits == 5 ? 4 : 4 + kOdd];
      constexpr int kTable = kBits == 5 ? kOdd : 0;
      if constexpr (kPair == 0) return narrow(kTable, select(0x0F, nibble, left<4>(top)));
      if constexpr (kPair == 1) return narrow(kTable, select(0x0F, nibble, left<2>(top)));
      if constexpr (kPair == 2) return narrow(kTable, select(0x0F, nibble, top));
      if constexpr (kPair == 3) return narrow(kTable, select(0x0F, nibble, right<2>(top)));
    }
  }
}

// Calls f.template operator()<bits>() for the run-time number of bits, 1..8.
template <class F>
void with_bits(int bits, F f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    default:
      return f.template operator()<8>();
  }
}

}  // namespace taper::avx512
