// Sixteen int32 sums and 64 bytes; kernels/common/planes_attention.hpp is written over this.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "kernels/common/planes_bits.hpp"
#include "kernels/common/unroll.hpp"
#include "kernels/neon/vec16.hpp"

namespace taper::neon {

struct Ints {
  struct Bytes {
    int8x16_t at[4];
  };
  struct Sums {
    int32x4_t at[4];
  };
  static constexpr int kSums = 4;

  static Sums zero() {
    const int32x4_t none = vdupq_n_s32(0);
    return {{none, none, none, none}};
  }
  static int32_t sum_of(const int8_t*, int64_t) { return 0; }  // products are signed here
  static Sums start(int32_t) { return zero(); }
  static Bytes load_keys(const int8_t* p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
  }
  static Bytes load_values(const int8_t* p) { return load_keys(p); }
  static Sums key_dot(Sums sums, const Bytes& bytes, int32_t four) {
    const int8x16_t given = vreinterpretq_s8_s32(vdupq_n_s32(four));
    unroll<4>([&](auto i) TAPER_INLINE { sums.at[i] = vdotq_s32(sums.at[i], bytes.at[i], given); });
    return sums;
  }
  static Sums value_dot(Sums sums, const Bytes& bytes, int32_t four) { return key_dot(sums, bytes, four); }
  static Vec16::F to_float(const Sums& sums) {
    return {vcvtq_f32_s32(sums.at[0]), vcvtq_f32_s32(sums.at[1]), vcvtq_f32_s32(sums.at[2]), vcvtq_f32_s32(sums.at[3])};
  }

  static void to_bytes(Vec16::F x, int8_t* q) {
    int32_t v[16];
    round(x, v);
    for (int l = 0; l < 16; ++l) q[l] = static_cast<int8_t>(v[l]);
  }
  static void to_block(const Vec16::F* x, int8_t* q) {
    unroll<4>([&](auto i) TAPER_INLINE { to_bytes(x[i], q + 16 * i); });
  }
  static void exponents(const uint8_t* words, uint8_t* out) { unpack_exponents(words, out); }

  template <int kPlanes, bool kHalf, bool kKeys>
  static void unpack(const uint8_t* const* planes, int64_t at, int8_t* out) {
    unroll<4>([&](auto quarter)
                  TAPER_INLINE { unpack_quarter<kPlanes, kHalf>(planes, at + 16 * quarter, out + 16 * quarter); });
  }

 private:
  static void round(Vec16::F x, int32_t* v) {
    vst1q_s32(v, vcvtnq_s32_f32(x.a));
    vst1q_s32(v + 4, vcvtnq_s32_f32(x.b));
    vst1q_s32(v + 8, vcvtnq_s32_f32(x.c));
    vst1q_s32(v + 12, vcvtnq_s32_f32(x.d));
  }

  // A quarter of each word of a line, as in avx512/ints.hpp; the matrices' least significant plane comes first.
  template <int kPlanes, bool kHalf>
  static void unpack_quarter(const uint8_t* const* planes, int64_t at, int8_t* out) {
    uint8x16_t p[8];
    unroll<8>([&](auto i) TAPER_INLINE { p[i] = vdupq_n_u8(0); });
    p[7] = vld1q_u8(planes[0] + at);
    constexpr int kLast = kPlanes - 1 + (kHalf ? 1 : 0);
    unroll<kPlanes>([&](auto j) TAPER_INLINE { p[kLast - j] = vld1q_u8(planes[1 + j] + at); });
    uint16x8_t pairs[8];
    uint32x4_t quads[8];
    unroll<4>([&](auto i) TAPER_INLINE {
      pairs[2 * i] = vreinterpretq_u16_u8(vzip1q_u8(p[2 * i], p[2 * i + 1]));
      pairs[2 * i + 1] = vreinterpretq_u16_u8(vzip2q_u8(p[2 * i], p[2 * i + 1]));
    });
    unroll<4>([&](auto n) TAPER_INLINE {
      constexpr int i = n / 2, k = n % 2;
      quads[4 * i + 2 * k] = vreinterpretq_u32_u16(vzip1q_u16(pairs[4 * i + k], pairs[4 * i + 2 + k]));
      quads[4 * i + 2 * k + 1] = vreinterpretq_u32_u16(vzip2q_u16(pairs[4 * i + k], pairs[4 * i + 2 + k]));
    });
    unroll<4>([&](auto k) TAPER_INLINE {
      store<kHalf>(vreinterpretq_u64_u32(vzip1q_u32(quads[k], quads[4 + k])), out + 128 * k);
      store<kHalf>(vreinterpretq_u64_u32(vzip2q_u32(quads[k], quads[4 + k])), out + 128 * k + 64);
    });
  }

  template <int kShift>
  static uint64x2_t exchange(uint64x2_t x, uint64_t mask) {
    const uint64x2_t moved = vandq_u64(veorq_u64(x, vshrq_n_u64(x, kShift)), vdupq_n_u64(mask));
    return veorq_u64(veorq_u64(x, moved), vshlq_n_u64(moved, kShift));
  }

  template <bool kHalf>
  static void store(uint64x2_t matrices, int8_t* out) {
    const uint64x2_t v =
        exchange<28>(exchange<14>(exchange<7>(matrices, kTransposeBits), kTransposePairs), kTransposeNibbles);
    const int8x16_t codes = vreinterpretq_s8_u64(v);
    int8x16_t magnitude = vandq_s8(codes, vdupq_n_s8(127));
    if (kHalf) magnitude = vorrq_s8(magnitude, vdupq_n_s8(1));
    vst1q_s8(out, vbslq_s8(vcltzq_s8(codes), vnegq_s8(magnitude), magnitude));
  }
};

}  // namespace taper::neon
