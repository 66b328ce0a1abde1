// Rows in and out of the Anda format: the top bits of 32 bytes are half a word of a plane.
#include "kernels/common/anda.hpp"

#include <immintrin.h>

#include "kernels/avx2/avx2.hpp"
#include "kernels/avx2/vec16.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::avx2 {
namespace {

struct MovemaskWord {
  using Common = lanes::BytesWord<Vec16>;

  template <class T>
  static uint32_t largest(const T* x, int64_t n) {
    return Common::largest(x, n);
  }

  // 32 values as words of 16 bits in the order of packs.
  struct Words {
    __m256i first, second;
  };

  // Sixteen rounded magnitudes as words, the most significant bit at bit 15: four of the first eight values, four of
  // the second, the rest likewise.
  TAPER_INLINE static __m256i rounded(Vec16::F scaled, bool truncate, __m128i to_top) {
    const auto whole = [&](__m256 v) TAPER_INLINE { return truncate ? _mm256_cvttps_epi32(v) : _mm256_cvtps_epi32(v); };
    return _mm256_sll_epi16(_mm256_packus_epi32(whole(scaled.lo), whole(scaled.hi)), to_top);
  }

  // The `kHigh` byte of each word of 32 values, in their order.
  template <bool kHigh>
  TAPER_INLINE static __m256i bytes(const Words& words) {
    const auto byte = [](__m256i v) TAPER_INLINE {
      return kHigh ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(0xff));
    };
    return in_order(_mm256_packus_epi16(byte(words.first), byte(words.second)));
  }

  // Both packs work within 128 bits: there lie four values of each of the four eights.
  TAPER_INLINE static __m256i in_order(__m256i packed) {
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  TAPER_INLINE static uint64_t top_bits(__m256i first, __m256i second) {
    return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(second))) << 32 |
           static_cast<uint32_t>(_mm256_movemask_epi8(first));
  }

  TAPER_INLINE static void put(__m256i first, __m256i second, int count, uint64_t* words) {
    for (int j = 0; j < count; ++j) {
      words[j * kAndaWordsAtAddress] = top_bits(first, second);
      first = _mm256_add_epi8(first, first);
      second = _mm256_add_epi8(second, second);
    }
  }

  template <class T, class P>
  TAPER_INLINE static void pack(const T* x, int64_t count, const P& factors, int magnitude_bits, bool truncate,
                                uint64_t* words) {
    const auto limit = Vec16::set(static_cast<float>((1 << magnitude_bits) - 1));
    const __m128i to_top = _mm_cvtsi32_si128(16 - magnitude_bits);
    __m256i m[4];
    uint64_t signs = 0;
    unroll<4>([&](auto k) TAPER_INLINE {
      constexpr int64_t kFirst = 16 * k;
      const auto v = count >= kFirst + 16 ? Vec16::load(x + kFirst)
                     : count > kFirst     ? Vec16::load_first(x + kFirst, count - kFirst)
                                          : Vec16::zero();
      const uint32_t negative = static_cast<uint32_t>(_mm256_movemask_ps(v.lo) | _mm256_movemask_ps(v.hi) << 8);
      signs |= static_cast<uint64_t>(negative) << kFirst;
      // The limit comes before the rounding, which leaves a whole number what it is.
      const auto scaled = Vec16::min(Vec16::mul(Vec16::abs(v), Common::power(factors, kFirst)), limit);
      m[k] = rounded(scaled, truncate, to_top);
    });
    const Words first{m[0], m[1]}, second{m[2], m[3]};
    words[0] = signs;
    put(bytes<true>(first), bytes<true>(second), magnitude_bits < 8 ? magnitude_bits : 8, words + kAndaWordsAtAddress);
    if (magnitude_bits > 8) {
      put(bytes<false>(first), bytes<false>(second), magnitude_bits - 8, words + 9 * kAndaWordsAtAddress);
    }
  }

  // 32 bits as 32 bytes, each all ones or zero.
  TAPER_INLINE static __m256i spread(uint32_t bits) {
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i unit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i own = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of);
    return _mm256_cmpeq_epi8(_mm256_and_si256(own, unit), unit);
  }

  // `count` planes of 32 values as bytes, the last at bit 0.
  TAPER_INLINE static __m256i get(const uint64_t* words, int count, int shift) {
    __m256i found = _mm256_setzero_si256();
    for (int j = 0; j < count; ++j) {
      // All ones are -1.
      found = _mm256_sub_epi8(_mm256_add_epi8(found, found),
                              spread(static_cast<uint32_t>(words[j * kAndaWordsAtAddress] >> shift)));
    }
    return found;
  }

  // Eight of 16 bytes, from kFirst on, as int32.
  template <int kFirst>
  TAPER_INLINE static __m256i eight(__m128i bytes) {
    return _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, kFirst));
  }

  template <class T, class P>
  TAPER_INLINE static void unpack(const uint64_t* words, int bits, const P& units, int64_t count, T* x) {
    const int more = bits > 8 ? bits - 8 : 0;
    const __m128i shift = _mm_cvtsi32_si128(more);
    unroll<2>([&](auto half) TAPER_INLINE {
      const __m256i high = get(words + kAndaWordsAtAddress, bits - more, 32 * half);
      const __m256i low = get(words + 9 * kAndaWordsAtAddress, more, 32 * half);
      const __m256i negative = spread(static_cast<uint32_t>(words[0] >> (32 * half)));
      unroll<2>([&](auto quarter) TAPER_INLINE {
        constexpr int64_t kFirst = 32 * half + 16 * quarter;
        const __m128i h = _mm256_extracti128_si256(high, quarter), l = _mm256_extracti128_si256(low, quarter);
        const __m128i n = _mm256_extracti128_si256(negative, quarter);
        const auto joined = [&](auto first) TAPER_INLINE {
          return _mm256_cvtepi32_ps(_mm256_or_si256(_mm256_sll_epi32(eight<first>(h), shift), eight<first>(l)));
        };
        const auto sign = [&](auto first)
                              TAPER_INLINE { return _mm256_castsi256_ps(_mm256_slli_epi32(eight<first>(n), 31)); };
        constexpr std::integral_constant<int, 0> kLower;
        constexpr std::integral_constant<int, 8> kUpper;
        const auto a = Vec16::mul({joined(kLower), joined(kUpper)}, Common::power(units, kFirst));
        const Vec16::F found{_mm256_xor_ps(a.lo, sign(kLower)), _mm256_xor_ps(a.hi, sign(kUpper))};
        if (count >= kFirst + 16) {
          Vec16::store(x + kFirst, found);
        } else if (count > kFirst) {
          Vec16::store_first(x + kFirst, found, count - kFirst);
        }
      });
    });
  }
};

}  // namespace

bool anda_exponents(const void* x, const AndaRow& row, uint8_t* exponents) {
  return lanes::anda_exponents<MovemaskWord>(x, row, exponents);
}

void anda_pack(const void* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words) {
  lanes::anda_pack<MovemaskWord>(x, row, exponents, truncate, words);
}

void anda_unpack(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, void* x) {
  lanes::anda_unpack<MovemaskWord>(words, row, exponents, bits, x);
}

}  // namespace taper::avx2
