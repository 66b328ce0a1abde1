// Bit planes to weights, eight registers of 16 columns from 16 bytes of each plane (docs/format.md, "A plane").
//
// Bits are transposed in steps, each a shift and a bitwise select a register: two planes make fields of 2 bits, two of
// those make nibbles. tbl reads the low 4 bits of an index and gives zero when another is set. Up to 4 bits an index
// holds a code, or two codes of 2 bits, or four of 1; what lies above a code of 3 bits is another column's bit, and the
// table repeats. Wider codes are whole bytes and read a table of 2 or 4 registers, two or four times at 7 and 8 bits.
//
// Vector instructions for 512 columns (a 64-byte line of each plane) and one row of activations, 32 of them sdot, as
// GCC 12 makes them of planes_gemv; loads (32 of activations, 4 a plane) come on top:
//
//   bits              1    2    3    4    5    6    7    8
//   for the columns  72   96  156  160  208  220  312  472
//   a line           72   48   52   40   42   37   45   59
//
// An estimate, not a measurement: at two such instructions a cycle and 3 GHz, 4 bits read 9.6 GB/s on one core.
#pragma once

#include <arm_neon.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/common/unroll.hpp"

namespace taper::neon {
namespace {  // neon_i8mm compiles its own

constexpr int kGroups = 8;  // bits of a byte: groups of columns in a block

// Registers whose bytes hold fields of 2 bits (groups 0 2 4 6, then 1 3 5 7) or 4 bits (04, 15, 26, 37), low field
// first.
struct Pairs {
  uint8x16_t even, odd;
};
struct Nibbles {
  uint8x16_t g04, g15, g26, g37;
};

// mask ? a : b, bit by bit.
TAPER_INLINE inline uint8x16_t select(uint8_t mask, uint8x16_t a, uint8x16_t b) {
  return vbslq_u8(vdupq_n_u8(mask), a, b);
}

TAPER_INLINE inline Pairs make_pairs(uint8x16_t high, uint8x16_t low) {
  return {select(0x55, low, vshlq_n_u8(high, 1)), select(0x55, vshrq_n_u8(low, 1), high)};
}

// The codes of 1..4 planes in nibbles; what is above a code is not zero.
template <int kPlanes>
TAPER_INLINE inline Nibbles make_nibbles(const uint8x16_t* p) {
  if constexpr (kPlanes == 1) {
    return {p[0], vshrq_n_u8(p[0], 1), vshrq_n_u8(p[0], 2), vshrq_n_u8(p[0], 3)};
  } else {
    const Pairs low = make_pairs(p[kPlanes - 2], p[kPlanes - 1]);
    const uint8x16_t even = vshrq_n_u8(low.even, 2), odd = vshrq_n_u8(low.odd, 2);
    if constexpr (kPlanes == 2) {
      return {low.even, low.odd, even, odd};
    } else if constexpr (kPlanes == 3) {
      return {select(0x33, low.even, vshlq_n_u8(p[0], 2)), select(0x33, low.odd, vshlq_n_u8(p[0], 1)),
              select(0x33, even, p[0]), select(0x33, odd, vshrq_n_u8(p[0], 1))};
    } else {
      const Pairs high = make_pairs(p[0], p[1]);
      return {select(0x33, low.even, vshlq_n_u8(high.even, 2)), select(0x33, low.odd, vshlq_n_u8(high.odd, 2)),
              select(0x33, even, high.even), select(0x33, odd, high.odd)};
    }
  }
}

TAPER_INLINE inline uint8x16_t low_nibble(uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(0x0F)); }
TAPER_INLINE inline uint8x16_t high_nibble(uint8x16_t x) { return vshrq_n_u8(x, 4); }

template <int kBits>
class PlaneLookup {
 public:
  // values: 2^kBits int8 in code order.
  TAPER_INLINE explicit PlaneLookup(const int8_t* values);

  // Calls use(group, weights) for the eight groups of the columns whose planes are given, most significant first.
  template <class Use>
  TAPER_INLINE void operator()(const uint8x16_t* planes, Use use) const;

 private:
  static constexpr int kCodes = kBits > 4 ? 1 : 4 / kBits;  // in an index
  static constexpr int kTables = kBits > 4 ? (kBits > 6 ? 1 << (kBits - 6) : 1) : kCodes;
  using Table = std::conditional_t<kBits <= 4, int8x16_t, std::conditional_t<kBits == 5, int8x16x2_t, int8x16x4_t>>;

  // Table i of an index with several codes: lane l holds the value of the code at bit i * kBits of l.
  static constexpr std::array<std::array<uint8_t, 16>, kCodes> make_orders() {
    std::array<std::array<uint8_t, 16>, kCodes> orders{};
    for (int i = 0; i < kCodes; ++i) {
      for (int lane = 0; lane < 16; ++lane) {
        orders[i][lane] = static_cast<uint8_t>((lane >> (i * kBits)) & ((1 << kBits) - 1));
      }
    }
    return orders;
  }

  template <int kGroup, class Use>
  TAPER_INLINE void find_both(uint8x16_t nibbles, Use use) const;
  TAPER_INLINE int8x16_t find_byte(uint8x16_t code) const;

  Table tables_[kTables];
};

// Made once a row where rows have tables of their own; no byte is read past 2^kBits.
template <int kBits>
TAPER_INLINE inline PlaneLookup<kBits>::PlaneLookup(const int8_t* values) {
  if constexpr (kBits < 4) {
    static constexpr auto kOrders = make_orders();
    int8_t padded[16] = {};
    std::memcpy(padded, values, 1 << kBits);
    for (int i = 0; i < kTables; ++i) tables_[i] = vqtbl1q_s8(vld1q_s8(padded), vld1q_u8(kOrders[i].data()));
  } else if constexpr (kBits == 4) {
    tables_[0] = vld1q_s8(values);
  } else if constexpr (kBits == 5) {
    tables_[0] = vld1q_s8_x2(values);
  } else {
    for (int i = 0; i < kTables; ++i) tables_[i] = vld1q_s8_x4(values + 64 * i);
  }
}

// Groups kGroup.. of the low nibbles and those four later of the high ones; two groups of an index are two apart.
template <int kBits>
template <int kGroup, class Use>
TAPER_INLINE inline void PlaneLookup<kBits>::find_both(uint8x16_t nibbles, Use use) const {
  const uint8x16_t low = low_nibble(nibbles), high = high_nibble(nibbles);
  unroll<kCodes>([&](auto i) TAPER_INLINE {
    constexpr int group = kGroup + (kBits == 2 ? 2 : 1) * i;
    use(std::integral_constant<int, group>{}, vqtbl1q_s8(tables_[i], low));
    use(std::integral_constant<int, group + 4>{}, vqtbl1q_s8(tables_[i], high));
  });
}

// tbx leaves a lane as it is where its index is not in the table.
template <int kBits>
TAPER_INLINE inline int8x16_t PlaneLookup<kBits>::find_byte(uint8x16_t code) const {
  if constexpr (kBits == 5) {
    return vqtbl2q_s8(tables_[0], code);
  } else {
    int8x16_t value = vqtbl4q_s8(tables_[0], code);
    unroll<kTables - 1>([&](auto i) TAPER_INLINE {
      value = vqtbx4q_s8(value, tables_[i + 1], vsubq_u8(code, vdupq_n_u8(64 * (i + 1))));
    });
    return value;
  }
}

template <int kBits>
template <class Use>
TAPER_INLINE inline void PlaneLookup<kBits>::operator()(const uint8x16_t* p, Use use) const {
  if constexpr (kBits == 1) {
    find_both<0>(p[0], use);
  } else if constexpr (kBits == 2) {
    const Pairs pairs = make_pairs(p[0], p[1]);
    find_both<0>(pairs.even, use);
    find_both<1>(pairs.odd, use);
  } else if constexpr (kBits <= 4) {
    const Nibbles n = make_nibbles<kBits>(p);
    find_both<0>(n.g04, use);
    find_both<1>(n.g15, use);
    find_both<2>(n.g26, use);
    find_both<3>(n.g37, use);
  } else {
    constexpr uint8_t mask = ((1 << (kBits - 4)) - 1) * 0x11;
    const Nibbles high = make_nibbles<kBits - 4>(p), low = make_nibbles<4>(p + kBits - 4);
    const auto both = [&](auto group, uint8x16_t h, uint8x16_t l) TAPER_INLINE {
      if constexpr (kBits < 8) h = vandq_u8(h, vdupq_n_u8(mask));
      use(group, find_byte(vsliq_n_u8(l, h, 4)));
      use(std::integral_constant<int, group + 4>{}, find_byte(vsriq_n_u8(h, l, 4)));
    };
    both(std::integral_constant<int, 0>{}, high.g04, low.g04);
    both(std::integral_constant<int, 1>{}, high.g15, low.g15);
    both(std::integral_constant<int, 2>{}, high.g26, low.g26);
    both(std::integral_constant<int, 3>{}, high.g37, low.g37);
  }
}

// Calls f.template operator()<bits>() for the run-time number of bits, 1..8.
template <class F>
void with_bits(int bits, F f) {
  unroll<8>([&](auto i) TAPER_INLINE {
    if (bits == i + 1) f.template operator()<i + 1>();
  });
}

}  // namespace
}  // namespace taper::neon
