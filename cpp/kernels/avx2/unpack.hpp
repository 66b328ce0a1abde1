// Bit planes to weights, eight registers of 32 columns from 32 bytes of each plane (docs/format.md, "A plane").
//
// pshufb reads the low 4 bits of an index, and bit 7 must be zero. Up to 4 bits an index holds a code, or two codes of
// 2 bits, or one bit of four columns, with its bits in any order: the table is permuted to match once a call. Wider
// codes take one table for each value of their leading bits and choose with blends.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "kernels/common/unroll.hpp"

namespace taper::avx2 {

inline constexpr int kGroups = 8;  // bits of a byte: groups of columns in a block

// mask ? a : b, bit by bit.
TAPER_INLINE inline __m256i select(uint8_t mask, __m256i a, __m256i b) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
}

// 16-bit shifts: what crosses a byte is masked by the select or the nibble that follows.
template <int kBy>
TAPER_INLINE inline __m256i left(__m256i x) {
  return _mm256_slli_epi16(x, kBy);
}
template <int kBy>
TAPER_INLINE inline __m256i right(__m256i x) {
  return _mm256_srli_epi16(x, kBy);
}
TAPER_INLINE inline __m256i low_nibble(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(0x0F)); }
TAPER_INLINE inline __m256i high_nibble(__m256i x) { return low_nibble(right<4>(x)); }

// Registers whose bytes hold fields of 2 bits (groups 0 2 4 6, then 1 3 5 7) or 4 bits (04, 26, 15, 37), low field
// first.
struct Pairs {
  __m256i even, odd;
};
struct Nibbles {
  __m256i g04, g26, g15, g37;
};

TAPER_INLINE inline Pairs make_pairs(__m256i high, __m256i low) {
  return {select(0x55, low, left<1>(high)), select(0x55, right<1>(low), high)};
}

TAPER_INLINE inline Nibbles make_nibbles(const Pairs& high, const Pairs& low) {
  return {select(0x33, low.even, left<2>(high.even)), select(0x33, right<2>(low.even), high.even),
          select(0x33, low.odd, left<2>(high.odd)), select(0x33, right<2>(low.odd), high.odd)};
}

// Number of 16-byte tables that the lookup of a width needs.
inline constexpr std::array<int, 9> kTables = {0, 4, 2, 2, 1, 2, 4, 8, 16};

template <int kBits>
class PlaneLookup {
 public:
  // values: 2^kBits int8 in code order.
  explicit PlaneLookup(const int8_t* values);

  // Calls use(group, weights) for the eight groups of the columns whose planes are given, most significant first.
  template <class Use>
  void operator()(const __m256i* planes, Use use) const;

 private:
  __m256i find(int table, __m256i index) const { return _mm256_shuffle_epi8(tables_[table], index); }
  template <int kPlane, int kGroup>
  __m256i find_wide(const __m256i* planes, int table, __m256i index) const;

  __m256i tables_[kTables[kBits]];
};

// Lane i of a table holds the value of this code; position[k] is the index bit that holds bit k of the code, most
// significant first.
template <size_t kBits>
constexpr std::array<uint8_t, 16> table_order(const std::array<int, kBits>& position) {
  std::array<uint8_t, 16> order{};
  for (size_t lane = 0; lane < 16; ++lane) {
    for (int bit : position) order[lane] = static_cast<uint8_t>(2 * order[lane] + ((lane >> bit) & 1));
  }
  return order;
}

// Made once a row where rows have tables of their own: a shuffle a register, and no byte is read past 2^kBits.
template <int kBits>
PlaneLookup<kBits>::PlaneLookup(const int8_t* values) {
  [[maybe_unused]] auto place = [&](int table, const std::array<uint8_t, 16>& order) {
    alignas(16) int8_t lanes[16] = {};
    std::memcpy(lanes, values, std::min(16, 1 << kBits));
    const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
    const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order.data()));
    tables_[table] = _mm256_broadcastsi128_si256(_mm_shuffle_epi8(part, index));
  };
  if constexpr (kBits == 1) {
    static constexpr std::array<std::array<uint8_t, 16>, 4> kOrders = {table_order<1>({0}), table_order<1>({1}),
                                                                       table_order<1>({2}), table_order<1>({3})};
    for (int i = 0; i < 4; ++i) place(i, kOrders[i]);
  } else if constexpr (kBits == 2) {
    static constexpr std::array<std::array<uint8_t, 16>, 2> kOrders = {table_order<2>({0, 2}), table_order<2>({1, 3})};
    for (int i = 0; i < 2; ++i) place(i, kOrders[i]);
  } else if constexpr (kBits == 3) {
    static constexpr std::array<std::array<uint8_t, 16>, 2> kOrders = {table_order<3>({1, 0, 2}),
                                                                       table_order<3>({1, 0, 3})};
    for (int i = 0; i < 2; ++i) place(i, kOrders[i]);
  } else {
    for (int i = 0; i < kTables[kBits]; ++i) {
      tables_[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * i)));
    }
  }
}

// Index = the last four bits of the code; planes 0 .. kBits - 5 choose the table, the last of them first.
template <int kBits>
template <int kPlane, int kGroup>
TAPER_INLINE inline __m256i PlaneLookup<kBits>::find_wide(const __m256i* planes, int table, __m256i index) const {
  if constexpr (kPlane == kBits - 4) {
    return find(table, index);
  } else {
    const __m256i zero = find_wide<kPlane + 1, kGroup>(planes, 2 * table, index);
    const __m256i one = find_wide<kPlane + 1, kGroup>(planes, 2 * table + 1, index);
    return _mm256_blendv_epi8(zero, one, left<7 - kGroup>(planes[kPlane]));
  }
}

template <int kBits>
template <class Use>
TAPER_INLINE inline void PlaneLookup<kBits>::operator()(const __m256i* p, Use use) const {
  if constexpr (kBits == 1) {
    const __m256i low = low_nibble(p[0]), high = high_nibble(p[0]);
    unroll<4>([&](auto g) TAPER_INLINE {
      use(g, find(g, low));
      use(g + 4, find(g, high));
    });
  } else if constexpr (kBits == 2) {
    // Two columns an index: table 0 reads the even group, table 1 the odd one.
    const __m256i g0145 = select(0x33, p[0], left<2>(p[1])), g2367 = select(0x33, right<2>(p[0]), p[1]);
    auto both = [&](int group, __m256i index) TAPER_INLINE {
      use(group, find(0, index));
      use(group + 1, find(1, index));
    };
    both(0, low_nibble(g0145));
    both(4, high_nibble(g0145));
    both(2, low_nibble(g2367));
    both(6, high_nibble(g2367));
  } else {
    // Up to 4 bits the nibble is the code; at 3 bits the last plane lands on index bit 2 of an even group and 3 of an
    // odd.
    Nibbles n;
    if constexpr (kBits == 3) {
      const Pairs a = make_pairs(p[0], p[1]);
      const __m256i up = left<2>(p[2]);
      n = {select(0x33, a.even, up), select(0x33, right<2>(a.even), p[2]), select(0x33, a.odd, up),
           select(0x33, right<2>(a.odd), p[2])};
    } else {
      n = make_nibbles(make_pairs(p[kBits - 4], p[kBits - 3]), make_pairs(p[kBits - 2], p[kBits - 1]));
    }
    auto value = [&](auto group, __m256i index) TAPER_INLINE {
      if constexpr (kBits == 3) {
        use(group, find(group % 2, index));
      } else {
        use(group, find_wide<0, group>(p, 0, index));
      }
    };
    auto both = [&](auto group, __m256i nibbles) TAPER_INLINE {
      value(group, low_nibble(nibbles));
      value(std::integral_constant<int, group + 4>{}, high_nibble(nibbles));
    };
    both(std::integral_constant<int, 0>{}, n.g04);
    both(std::integral_constant<int, 1>{}, n.g15);
    both(std::integral_constant<int, 2>{}, n.g26);
    both(std::integral_constant<int, 3>{}, n.g37);
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

}  // namespace taper::avx2
