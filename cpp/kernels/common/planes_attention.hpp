// Attention over a KV cache of planes (docs/numerics.md, "KV cache as planes"): scores and weighted sums are integer
// dot products. V is an instruction set's Vec16, I its integers:
//
//   I::unpack<kPlanes, kHalf>(planes, at, out) 512 values of the line at this offset: signs, then kPlanes magnitude
//   planes;
//                                            with kHalf a one is added below the last. out: int8, word by word.
//   I::exponents(words, out)                 64 exponents of a group
//   I::Bytes, I::Sums                        64 bytes, 16 int32
//   I::start(sum_of_q), I::key_dot(sums, bytes, four), I::value_dot(sums, bytes, four)
//                                            add for each of 16 lanes the products of its four bytes with four given
//                                            ones, each within -127..127 for keys and 0..127 for values
//   I::shifted(high, low)                    high * 128 + low
//   I::split(x, high, low)                   16 floats of 0..2^14 - 1, rounded, in two parts of seven bits
//
// Vector operations an entry of head_dim 64 and eight heads, AVX-512: 8 dot products for the key, 16 for the value, 2 x
// 5 to unpack them, 10 for the softmax; over float16 64 multiply-adds, 8 conversions and the same softmax.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/common/attention.hpp"
#include "kernels/common/exponent.hpp"
#include "kernels/common/lanes.hpp"
#include "kernels/common/planes_layout.hpp"
#include "kernels/common/scratch.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::lanes {

constexpr int kQueryBits = 7;
constexpr int kWeightBits = 14;  // in two parts of seven bits, which every set multiplies exactly
constexpr int kPartBits = 7;
constexpr int64_t kMaxGroups = kMaxPlanesDim / 16;

// Everything that is unpacked or made on the way, in the scratch of the thread.
struct PlanesScratch {
  alignas(64) float scores[kAttentionHeads * kAttentionChunk];
  alignas(64) int8_t keys[kBlockEntries * kMaxPlanesDim];
  alignas(64) int8_t values[kAttentionChunk * kMaxPlanesDim];
  alignas(64) float units[kMaxGroups * kAttentionChunk];  // of keys a block at a time, then of all values
  alignas(64) int8_t queries[kAttentionHeads * kMaxPlanesDim];
  float query_scales[kAttentionHeads * kMaxGroups];
  int32_t query_sums[kAttentionHeads * kMaxGroups];
  alignas(64) uint8_t weights[kAttentionHeads][2][kAttentionChunk];  // high and low parts
  float weight_scales[kAttentionHeads];
};

// Calls f.template operator()<planes, half>() for what is read of a part.
template <int kPlanes = kMaxPlanesBits, class F>
TAPER_INLINE inline void with_planes(int bits, bool half, const F& f) {
  if constexpr (kPlanes > 1) {
    if (bits < kPlanes) return with_planes<kPlanes - 1>(bits, half, f);
  }
  if constexpr (kPlanes < kMaxPlanesBits) {
    if (half) return f.template operator()<kPlanes, true>();
  }
  f.template operator()<kPlanes, false>();
}

// The first `entries` values of one head in a block, with whole lines to the end.
template <class I>
inline void unpack_part(const PlanesPart& part, int stored, int upper, int64_t dim, int64_t entries, int8_t* out) {
  const int64_t lines = (entries * dim / 8 + kLineBytes - 1) / kLineBytes;
  with_planes(part.bits, part.bits < stored, [&]<int kPlanes, bool kHalf>() TAPER_INLINE {
    const uint8_t* planes[1 + kPlanes] = {part.upper};
    for (int j = 0; j < kPlanes; ++j) planes[1 + j] = magnitude_plane(part, upper, j, dim);
    for (int64_t line = 0; line < lines; ++line) {
      I::template unpack<kPlanes, kHalf>(planes, line * kLineBytes, out + line * kLineBytes * 8);
    }
  });
}

// What one is worth in each entry's group: `units` (64).
template <class I>
inline void unpack_units(const PlanesPart& part, int stored, int64_t group, float* units) {
  alignas(64) uint8_t exponents[kBlockEntries];
  I::exponents(part.exponents + group * kExponentBytes, exponents);
  const int base = 127 - 15 - (part.bits - 1) - (part.bits < stored ? 1 : 0);
  for (int64_t t = 0; t < kBlockEntries; ++t) {
    const uint32_t bits =
        exponents[t] == kNotFiniteExponent ? 0x7fc00000u : static_cast<uint32_t>(exponents[t] + base) << 23;
    std::memcpy(units + t, &bits, sizeof bits);
  }
}

// The largest of sixteen, none of which is below zero; NaN is passed over.
template <class V>
inline float largest(typename V::F x) {
  float lanes[kLanes], most = 0.0f;
  V::store(lanes, x);
  for (const float lane : lanes) most = lane > most ? lane : most;
  return most;
}

// Query integers of one group, their scale and their sum.
template <class V>
inline void quantize_query(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum) {
  auto most = V::zero(), zeros = V::zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const auto v = V::load(x + i);
    most = V::max(V::abs(v), most);
    zeros = V::fma(v, V::zero(), zeros);  // NaN unless all are finite
  }
  *sum = 0;
  const float a = largest<V>(most);
  if (!(V::tree(zeros) == 0.0f) || a == 0.0f) {
    *scale = a == 0.0f && V::tree(zeros) == 0.0f ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    std::memset(q, 0, static_cast<size_t>(n));
    return;
  }
  const int e = choose_exponent(a, kQueryBits);
  const auto factor = V::set(std::ldexp(1.0f, -e));
  for (int64_t i = 0; i < n; i += kLanes) {
    float rounded[kLanes];
    V::store(rounded, V::rint(V::mul(V::load(x + i), factor)));
    for (int64_t l = 0; l < kLanes; ++l) {
      q[i + l] = static_cast<int8_t>(rounded[l]);
      *sum += q[i + l];
    }
  }
  *scale = std::ldexp(1.0f, e);
}

inline int32_t four_bytes(const void* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, sizeof four);
  return four;
}

// Adds the products of a group of sixteen entries' keys to kHeads heads' scores: `keys` are the words of that group.
template <class V, class I, int kHeads>
TAPER_INLINE inline void score_entries(const PlanesScratch& work, int64_t dim, int64_t first_head, const int8_t* keys,
                                       const float* units, int64_t unit_stride, float scale, float* scores) {
  const int64_t group = planes_group(dim), groups = dim / group, words = group / kKeyElements;
  typename V::F score[kHeads];
  unroll<kHeads>([&](auto h) TAPER_INLINE { score[h] = V::zero(); });
  for (int64_t g = 0; g < groups; ++g) {
    typename I::Sums dots[kHeads];
    unroll<kHeads>([&](auto h)
                       TAPER_INLINE { dots[h] = I::start(work.query_sums[(first_head + h) * kMaxGroups + g]); });
    const int8_t* q = work.queries + first_head * kMaxPlanesDim + g * group;
    const int8_t* k = keys + g * words * kLineBytes;
    for (int64_t w = 0; w < words; ++w) {
      const auto bytes = I::load_keys(k + w * kLineBytes);
      unroll<kHeads>([&](auto h) TAPER_INLINE {
        dots[h] = I::key_dot(dots[h], bytes, four_bytes(q + h * kMaxPlanesDim + w * kKeyElements));
      });
    }
    const auto unit = V::load(units + g * unit_stride);
    unroll<kHeads>([&](auto h) TAPER_INLINE {
      const auto factor = V::mul(V::set(work.query_scales[(first_head + h) * kMaxGroups + g]), unit);
      score[h] = V::fma(I::to_float(dots[h]), factor, score[h]);
    });
  }
  unroll<kHeads>([&](auto h) TAPER_INLINE {
    V::store(scores + (first_head + h) * kAttentionChunk, V::mul(score[h], V::set(scale)));
  });
}

template <class V, class I>
inline void score_block(const PlanesAttentionArgs& args, PlanesScratch& work, int64_t block) {
  const PlanesFormat& f = args.format;
  const int64_t dim = f.head_dim, groups = dim / planes_group(dim);
  const int64_t left = args.num_entries - block * kBlockEntries, entries = left < kBlockEntries ? left : kBlockEntries;
  const PlanesPart& part = args.keys[block];
  unpack_part<I>(part, f.key_bits, f.key_upper, dim, (entries + kKeyEntries - 1) / kKeyEntries * kKeyEntries,
                 work.keys);
  for (int64_t g = 0; g < groups; ++g) unpack_units<I>(part, f.key_bits, g, work.units + g * kBlockEntries);
  for (int64_t t = 0; t < entries; t += kKeyEntries) {
    for_heads<V>(args.heads, [&]<int kHeads>(int64_t h) TAPER_INLINE {
      score_entries<V, I, kHeads>(work, dim, h, work.keys + t * dim, work.units + t, kBlockEntries, args.scale,
                                  work.scores + block * kBlockEntries + t);
    });
  }
}

// The weights of one head times the values' units, as integers in two parts; what follows the n entries is zero.
template <class V, class I>
inline void quantize_weights(const float* weights, const float* units, int64_t n, uint8_t* high, uint8_t* low,
                             float* scale) {
  alignas(64) float products[kAttentionChunk];
  auto most = V::zero(), zeros = V::zero();
  const auto take = [&](int64_t t, auto p) TAPER_INLINE {
    V::store(products + t, p);
    most = V::max(p, most);
    zeros = V::fma(p, V::zero(), zeros);
  };
  for_each_group<V>(
      n, [&](int64_t t) { take(t, V::mul(V::load(weights + t), V::load(units + t))); },
      [&](int64_t t, int64_t count) {
        take(t, V::mul(V::load_first(weights + t, count), V::load_first(units + t, count)));
      });
  const float a = largest<V>(most);
  const bool finite = V::tree(zeros) == 0.0f;
  const int64_t end = (n + kLanes - 1) / kLanes * kLanes;
  if (!finite || a == 0.0f) {
    *scale = finite ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    std::memset(high, 0, static_cast<size_t>(end));
    std::memset(low, 0, static_cast<size_t>(end));
    return;
  }
  const int e = choose_exponent(a, kWeightBits);
  const auto factor = V::set(std::ldexp(1.0f, -e));
  for (int64_t t = 0; t < end; t += kLanes) I::split(V::mul(V::load(products + t), factor), high + t, low + t);
  *scale = std::ldexp(1.0f, e);
}

// kHeads heads' weighted sums of a group's kVectors sixteens of elements.
template <class V, class I, int kHeads, int kVectors>
TAPER_INLINE inline void weigh_group(const PlanesScratch& work, int64_t dim, int64_t n, int64_t first_head,
                                     int64_t element, float* acc) {
  typename I::Sums high[kHeads * kVectors], low[kHeads * kVectors];
  unroll<kHeads * kVectors>([&](auto i) TAPER_INLINE { high[i] = low[i] = I::zero(); });
  const int64_t row = dim / kValueElements * kLineBytes;  // bytes of four entries
  const int8_t* values = work.values + element / kValueElements * kLineBytes;
  for (int64_t t = 0; t < n; t += kValueEntries, values += row) {
    typename I::Bytes v[kVectors];
    unroll<kVectors>([&](auto i) TAPER_INLINE { v[i] = I::load_values(values + i * kLineBytes); });
    unroll<kHeads>([&](auto h) TAPER_INLINE {
      const int32_t high_four = four_bytes(work.weights[first_head + h][0] + t);
      const int32_t low_four = four_bytes(work.weights[first_head + h][1] + t);
      unroll<kVectors>([&](auto i) TAPER_INLINE {
        high[h * kVectors + i] = I::value_dot(high[h * kVectors + i], v[i], high_four);
        low[h * kVectors + i] = I::value_dot(low[h * kVectors + i], v[i], low_four);
      });
    });
  }
  unroll<kHeads>([&](auto h) TAPER_INLINE {
    const auto scale = V::set(work.weight_scales[first_head + h]);
    unroll<kVectors>([&](auto i) TAPER_INLINE {
      const auto total = I::to_float(I::shifted(high[h * kVectors + i], low[h * kVectors + i]));
      V::store(acc + (first_head + h) * dim + element + i * kLanes, V::mul(total, scale));
    });
  });
}

template <class V, class I, int kVectors>
inline void weigh_heads(const PlanesAttentionArgs& args, const PlanesScratch& work, int64_t element, float* acc) {
  const int64_t dim = args.format.head_dim, n = args.num_entries;
  constexpr int kHeads = I::kSums / (2 * kVectors) > 1 ? I::kSums / (2 * kVectors) : 1;
  int64_t h = 0;
  for (; h + kHeads <= args.heads; h += kHeads) weigh_group<V, I, kHeads, kVectors>(work, dim, n, h, element, acc);
  for (; h < args.heads; ++h) weigh_group<V, I, 1, kVectors>(work, dim, n, h, element, acc);
}

template <class V, class I>
void planes_attention(const PlanesAttentionArgs& args, const AttentionState& out) {
  PlanesScratch& work = *reinterpret_cast<PlanesScratch*>(scratch(sizeof(PlanesScratch)));
  const PlanesFormat& f = args.format;
  const int64_t dim = f.head_dim, group = planes_group(dim), groups = dim / group, n = args.num_entries;
  const int64_t blocks = (n + kBlockEntries - 1) / kBlockEntries;
  for (int64_t h = 0; h < args.heads; ++h) {
    for (int64_t g = 0; g < groups; ++g) {
      quantize_query<V>(args.q + h * dim + g * group, group, work.queries + h * kMaxPlanesDim + g * group,
                        work.query_scales + h * kMaxGroups + g, work.query_sums + h * kMaxGroups + g);
    }
  }
  for (int64_t b = 0; b < blocks; ++b) score_block<V, I>(args, work, b);
  for (int64_t h = 0; h < args.heads; ++h) {
    softmax<V>(work.scores + h * kAttentionChunk, n, out.max + h, out.sum + h);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t left = n - b * kBlockEntries, entries = left < kBlockEntries ? left : kBlockEntries;
    unpack_part<I>(args.values[b], f.value_bits, f.value_upper, dim,
                   (entries + kValueEntries - 1) / kValueEntries * kValueEntries,
                   work.values + b * kBlockEntries * dim);
    for (int64_t g = 0; g < groups; ++g) {
      unpack_units<I>(args.values[b], f.value_bits, g, work.units + g * kAttentionChunk + b * kBlockEntries);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t h = 0; h < args.heads; ++h) {
      quantize_weights<V, I>(work.scores + h * kAttentionChunk, work.units + g * kAttentionChunk, n, work.weights[h][0],
                             work.weights[h][1], work.weight_scales + h);
    }
    switch (group / kLanes) {
      case 1:
        weigh_heads<V, I, 1>(args, work, g * group, out.acc);
        break;
      case 2:
        weigh_heads<V, I, 2>(args, work, g * group, out.acc);
        break;
      default:
        weigh_heads<V, I, 4>(args, work, g * group, out.acc);
    }
  }
}

}  // namespace taper::lanes
