// Attention over a KV cache of planes (docs/numerics.md, "KV cache as planes"): scores and weighted sums are integer
// dot products. V is an instruction set's Vec16, I its integers:
//
//   I::unpack<kPlanes, kHalf, kKeys>(planes, at, out)
//                                            512 values of the line at this offset: signs, then kPlanes
//                                            magnitude planes; with kHalf a one is added below the last. out:
//                                            word by word, int8 or, with kKeys, what load_keys reads
//   I::exponents(words, out)                 64 exponents of a group
//   I::Bytes, I::Sums                        64 bytes, 16 int32
//   I::sum_of(q, n), I::start(sum)           what sums of key_dot begin with
//   I::key_dot(sums, bytes, four), I::value_dot(sums, bytes, four)
//                                            add for each of 16 lanes the products of its four bytes with four given
//                                            ones, each within -127..127, those given with values within 0..127
//   I::to_bytes(x, q)                        16 floats rounded to int8, NaN to zero
//   I::to_block(x, q)                        the same of 64 floats without NaN
//
// Vector operations an entry of head_dim 64 and eight heads, AVX-512: 8 dot products each for the key and the value,
// 2 x 5 to unpack them, 8 for the softmax; over float16 64 multiply-adds, 8 conversions and the same softmax.
#pragma once

#include <algorithm>
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
constexpr int kWeightBits = 7;
constexpr int64_t kMaxGroups = kMaxPlanesDim / 16;

// Everything that is unpacked or made on the way, in the scratch of the thread; keys, values and units of one block.
struct PlanesScratch {
  alignas(64) float scores[kAttentionHeads * kAttentionChunk];
  alignas(64) int8_t entries[kBlockEntries * kMaxPlanesDim];
  alignas(64) float units[kMaxGroups * kBlockEntries];
  alignas(64) int8_t queries[kAttentionHeads * kMaxPlanesDim];
  float query_scales[kAttentionHeads * kMaxGroups];
  int32_t query_sums[kAttentionHeads * kMaxGroups];
  alignas(64) int8_t weights[kAttentionHeads * kBlockEntries];
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

// What one is worth in each entry's group: `units` (64). Returns whether the first n are finite.
template <class I>
inline bool unpack_units(const PlanesPart& part, int stored, int64_t group, int64_t n, float* units) {
  alignas(64) uint8_t exponents[kBlockEntries];
  I::exponents(part.exponents + group * kExponentBytes, exponents);
  const int base = 127 - 15 - (part.bits - 1) - (part.bits < stored ? 1 : 0);
  for (int64_t t = 0; t < kBlockEntries; ++t) {
    const uint32_t bits =
        exponents[t] == kNotFiniteExponent ? 0x7fc00000u : static_cast<uint32_t>(exponents[t] + base) << 23;
    std::memcpy(units + t, &bits, sizeof bits);
  }
  bool finite = true;
  for (int64_t t = 0; t < n; ++t) finite &= exponents[t] != kNotFiniteExponent;
  return finite;
}

// Query integers of one group and their scale.
template <class V, class I>
inline void quantize_query(const float* x, int64_t n, int8_t* q, float* scale) {
  auto most = V::zero(), zeros = V::zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const auto v = V::load(x + i);
    most = V::max(V::abs(v), most);
    zeros = V::fma(v, V::zero(), zeros);  // NaN unless all are finite
  }
  const float a = V::largest(most);
  const bool finite = V::all_zero(zeros);
  const bool empty = !finite || a == 0.0f;
  const int e = empty ? 0 : choose_exponent(a, kQueryBits);
  *scale = finite ? power_of_two(e) : std::numeric_limits<float>::quiet_NaN();
  if (empty) std::memset(q, 0, static_cast<size_t>(n));
  const auto factor = V::set(power_of_two(-e));
  for (int64_t i = 0; i < n && !empty; i += kLanes) I::to_bytes(V::mul(V::load(x + i), factor), q + i);
}

inline int32_t four_bytes(const void* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, sizeof four);
  return four;
}

// Lines that will be read soon, asked for two at a time beside arithmetic: a burst would wait for the few that may be
// under way, and one at a time asking took a tenth of the time (Zen 4, all in the L2).
class Ahead {
 public:
  // What is read of the upper parts in about `asks` calls of ask().
  Ahead(const PlanesPart* parts, int64_t count, int upper, int64_t dim, int64_t asks)
      : part_(parts), last_(parts + count), upper_(upper), plane_(plane_bytes(dim)) {
    const int64_t pairs = count * (1 + upper) * plane_ / (2 * kLineBytes);  // a plane is whole pairs
    pairs_ = (pairs + asks - 1) / asks;
  }

  TAPER_INLINE void ask() {
    for (int64_t i = 0; i < pairs_; ++i) {
      if (at_ == end_ && !begin_part()) return;
      __builtin_prefetch(at_, 0, kIntoL2);
      __builtin_prefetch(at_ + kLineBytes, 0, kIntoL2);
      at_ += 2 * kLineBytes;
    }
  }

 private:
  bool begin_part() {
    if (part_ == last_ || part_->upper == nullptr) return false;
    __builtin_prefetch(part_->exponents, 0, kIntoL2);
    at_ = part_->upper;
    end_ = at_ + (1 + (part_->bits < upper_ ? part_->bits : upper_)) * plane_;
    ++part_;
    return true;
  }

  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
  const PlanesPart* part_;
  const PlanesPart* last_;
  int upper_;
  int64_t plane_, pairs_;
};

// Asks stand beside all that takes time: one for a line of every plane that is unpacked, for one head's weights, and
// for two steps of a product or of the softmax. With none in unpacking and weights a core waited for its line buffers a
// quarter of the time (Xeon, 7 bits, 8192 entries).
constexpr int kStepsOfAsk = 2;
constexpr int64_t kEntriesOfAsk = kStepsOfAsk * kValueEntries;  // of a weighted sum

// The first `entries` values of one head in a block, with whole lines to the end.
template <class I, bool kKeys>
inline void unpack_part(const PlanesPart& part, int stored, int upper, int64_t dim, int64_t entries, Ahead* ahead,
                        int8_t* out) {
  const int64_t lines = (entries * dim / 8 + kLineBytes - 1) / kLineBytes;
  with_planes(part.bits, part.bits < stored, [&]<int kPlanes, bool kHalf>() TAPER_INLINE {
    const uint8_t* planes[1 + kPlanes] = {part.upper};
    for (int j = 0; j < kPlanes; ++j) planes[1 + j] = magnitude_plane(part, upper, j, dim);
    for (int64_t line = 0; line < lines; ++line) {
      ahead->ask();
      I::template unpack<kPlanes, kHalf, kKeys>(planes, line * kLineBytes, out + line * kLineBytes * 8);
    }
  });
}

// Scores of kHeads heads for kRuns sixteens of entries. A word of q is loaded for both: with one run the loads, nine
// for eight dot products, were the limit.
template <class V, class I, int kHeads, int kRuns>
TAPER_INLINE inline void score_entries(const PlanesScratch& work, int64_t dim, int64_t first_head, int64_t entry,
                                       float scale, Ahead* ahead, float* scores) {
  const int64_t group = planes_group(dim), groups = dim / group, words = group / kKeyElements;
  Ahead lines = *ahead;
  for (int64_t g = 0; g < groups; ++g) {
    typename I::Sums dots[kHeads * kRuns];
    unroll<kHeads>([&](auto h) TAPER_INLINE {
      const auto start = I::start(work.query_sums[(first_head + h) * kMaxGroups + g]);
      unroll<kRuns>([&](auto r) TAPER_INLINE { dots[h * kRuns + r] = start; });
    });
    const int8_t* q = work.queries + first_head * kMaxPlanesDim + g * group;
    const int8_t* keys = work.entries + entry * dim + g * words * kLineBytes;
    for (int64_t pair = 0; pair < words; pair += kStepsOfAsk) {
      lines.ask();
      unroll<kStepsOfAsk>([&](auto step) TAPER_INLINE {
        const int64_t w = pair + step;
        typename I::Bytes k[kRuns];
        unroll<kRuns>([&](auto r) TAPER_INLINE { k[r] = I::load_keys(keys + w * kLineBytes + r * kKeyEntries * dim); });
        unroll<kHeads>([&](auto h) TAPER_INLINE {
          const int32_t four = four_bytes(q + h * kMaxPlanesDim + w * kKeyElements);
          unroll<kRuns>([&](auto r)
                            TAPER_INLINE { dots[h * kRuns + r] = I::key_dot(dots[h * kRuns + r], k[r], four); });
        });
      });
    }
    unroll<kRuns>([&](auto r) TAPER_INLINE {
      const auto unit = V::load(work.units + g * kBlockEntries + entry + r * kKeyEntries);
      unroll<kHeads>([&](auto h) TAPER_INLINE {
        float* at = scores + (first_head + h) * kAttentionChunk + entry + r * kKeyEntries;
        const auto factor = V::mul(V::set(work.query_scales[(first_head + h) * kMaxGroups + g]), unit);
        const auto score = V::fma(I::to_float(dots[h * kRuns + r]), factor, g == 0 ? V::zero() : V::load(at));
        V::store(at, g + 1 == groups ? V::mul(score, V::set(scale)) : score);
      });
    });
  }
  *ahead = lines;
}

template <class V, class I>
inline void score_block(const PlanesAttentionArgs& args, PlanesScratch& work, int64_t block, Ahead* ahead) {
  const PlanesFormat& f = args.format;
  const int64_t dim = f.head_dim, groups = dim / planes_group(dim);
  const int64_t left = args.num_entries - block * kBlockEntries, entries = left < kBlockEntries ? left : kBlockEntries;
  const PlanesPart& part = args.keys[block];
  unpack_part<I, true>(part, f.key_bits, f.key_upper, dim, (entries + kKeyEntries - 1) / kKeyEntries * kKeyEntries,
                       ahead, work.entries);
  for (int64_t g = 0; g < groups; ++g) unpack_units<I>(part, f.key_bits, g, entries, work.units + g * kBlockEntries);
  const int64_t runs = (entries + kKeyEntries - 1) / kKeyEntries;
  float* scores = work.scores + block * kBlockEntries;
  for (int64_t r = 0; r < runs; r += 2) {
    for_heads<V>(args.heads, [&]<int kHeads>(int64_t h) TAPER_INLINE {
      r + 1 < runs ? score_entries<V, I, kHeads, 2>(work, dim, h, r * kKeyEntries, args.scale, ahead, scores)
                   : score_entries<V, I, kHeads, 1>(work, dim, h, r * kKeyEntries, args.scale, ahead, scores);
    });
  }
}

// The weights of kHeads heads' block of n entries times the values' units, as integers; what follows them is zero. The
// largest of four heads are found together.
template <class V, class I, int kHeads, bool kWhole>
inline void quantize_weights(const float* weights, const float* units, int64_t n, bool finite, int8_t* q,
                             float* scales) {
  constexpr int kVectors = kBlockEntries / kLanes;
  typename V::F p[kHeads][kVectors], most[kHeads];
  unroll<kHeads>([&](auto h) TAPER_INLINE { most[h] = V::zero(); });
  unroll<kVectors>([&](auto i) TAPER_INLINE {
    const int64_t left = n - i * kLanes, count = left < 0 ? 0 : left < kLanes ? left : kLanes;
    const auto unit = V::load(units + i * kLanes);
    unroll<kHeads>([&](auto h) TAPER_INLINE {
      const float* at = weights + h * kAttentionChunk + i * kLanes;
      const auto weight = kWhole || count == kLanes ? V::load(at) : V::load_first(at, count);
      p[h][i] = V::max(V::mul(weight, unit), V::zero());  // NaN becomes zero
      most[h] = V::max(p[h][i], most[h]);
    });
  });
  float largest[kHeads];
  if constexpr (kHeads == 4) {
    V::largest_of_four(most, largest);
  } else {
    unroll<kHeads>([&](auto h) TAPER_INLINE { largest[h] = V::largest(most[h]); });
  }
  unroll<kHeads>([&](auto h) TAPER_INLINE {
    const int e = largest[h] == 0.0f ? 0 : choose_exponent(largest[h], kWeightBits);
    const auto factor = V::set(power_of_two(-e));
    unroll<kVectors>([&](auto i) TAPER_INLINE { p[h][i] = V::mul(p[h][i], factor); });
    I::to_block(p[h], q + h * kBlockEntries);
    scales[h] = finite ? power_of_two(e) : std::numeric_limits<float>::quiet_NaN();
  });
}

// Adds kHeads heads' weighted sums of kVectors sixteens of elements from `element` on over n entries of a block.
template <class V, class I, int kHeads, int kVectors>
TAPER_INLINE inline void weigh_entries(const PlanesScratch& work, int64_t dim, int64_t n, int64_t first_head,
                                       int64_t element, Ahead* ahead, float* acc) {
  Ahead lines = *ahead;
  typename I::Sums sums[kHeads * kVectors];
  unroll<kHeads * kVectors>([&](auto i) TAPER_INLINE { sums[i] = I::zero(); });
  const int64_t row = dim / kValueElements * kLineBytes;  // bytes of four entries
  const int8_t* values = work.entries + element / kValueElements * kLineBytes;
  for (int64_t pair = 0; pair < n; pair += kEntriesOfAsk) {  // weights past n are zero
    lines.ask();
    unroll<kStepsOfAsk>([&](auto step) TAPER_INLINE {
      typename I::Bytes v[kVectors];
      unroll<kVectors>([&](auto i) TAPER_INLINE { v[i] = I::load_values(values + i * kLineBytes); });
      unroll<kHeads>([&](auto h) TAPER_INLINE {
        const int8_t* weights = work.weights + (first_head + h) * kBlockEntries;
        const int32_t four = four_bytes(weights + pair + step * kValueEntries);
        unroll<kVectors>(
            [&](auto i) TAPER_INLINE { sums[h * kVectors + i] = I::value_dot(sums[h * kVectors + i], v[i], four); });
      });
      values += row;
    });
  }
  unroll<kHeads>([&](auto h) TAPER_INLINE {
    const auto scale = V::set(work.weight_scales[first_head + h]);
    unroll<kVectors>([&](auto i) TAPER_INLINE {
      float* at = acc + (first_head + h) * dim + element + i * kLanes;
      V::store(at, V::fma(I::to_float(sums[h * kVectors + i]), scale, V::load(at)));
    });
  });
  *ahead = lines;
}

template <class I, int kVectors>
inline constexpr int kHeadsOfSums = std::clamp<int>(I::kSums / kVectors, 1, kAttentionHeads);

// Calls f.template operator()<sixteens>() for the elements of a group.
template <class F>
TAPER_INLINE inline void with_sixteens(int64_t group, const F& f) {
  group == 16 ? f.template operator()<1>() : group == 32 ? f.template operator()<2>() : f.template operator()<4>();
}

template <class V, class I>
inline void weigh_block(const PlanesAttentionArgs& args, PlanesScratch& work, int64_t block, Ahead* ahead, float* acc) {
  const PlanesFormat& f = args.format;
  const int64_t dim = f.head_dim, group = planes_group(dim), begin = block * kBlockEntries;
  const int64_t left = args.num_entries - begin, n = left < kBlockEntries ? left : kBlockEntries;
  const PlanesPart& part = args.values[block];
  unpack_part<I, false>(part, f.value_bits, f.value_upper, dim, (n + kEntriesOfAsk - 1) / kEntriesOfAsk * kEntriesOfAsk,
                        ahead, work.entries);
  for (int64_t g = 0; g < dim / group; ++g) {
    const bool finite = unpack_units<I>(part, f.value_bits, g, n, work.units);
    const auto quantize = [&]<int kHeads>(int64_t h) TAPER_INLINE {
      for (int i = 0; i < kHeads; ++i) ahead->ask();
      const auto integers =
          n == kBlockEntries ? quantize_weights<V, I, kHeads, true> : quantize_weights<V, I, kHeads, false>;
      integers(work.scores + h * kAttentionChunk + begin, work.units, n, finite, work.weights + h * kBlockEntries,
               work.weight_scales + h);
    };
    for (int64_t h = 0, step; h < args.heads; h += step) {
      step = args.heads - h < 4 ? 1 : 4;
      step == 4 ? quantize.template operator()<4>(h) : quantize.template operator()<1>(h);
    }
    with_sixteens(group, [&]<int kVectors>() TAPER_INLINE {
      constexpr int kHeads = kHeadsOfSums<I, kVectors>;
      int64_t h = 0;
      for (; h + kHeads <= args.heads; h += kHeads) {
        weigh_entries<V, I, kHeads, kVectors>(work, dim, n, h, g * group, ahead, acc);
      }
      for (; h < args.heads; ++h) weigh_entries<V, I, 1, kVectors>(work, dim, n, h, g * group, ahead, acc);
    });
  }
}

inline int64_t asks_of_unpacking(const PlanesAttentionArgs& args) {
  return args.num_entries * args.format.head_dim / (8 * kLineBytes);
}

// How often weigh_block asks for a line of what comes next, all blocks together.
template <class I>
inline int64_t asks_of_weights(const PlanesAttentionArgs& args) {
  const int64_t group = planes_group(args.format.head_dim);
  int64_t passes = 0;
  with_sixteens(group, [&]<int kVectors>() TAPER_INLINE {
    constexpr int kHeads = kHeadsOfSums<I, kVectors>;
    passes = args.heads / kHeads + args.heads % kHeads;
  });
  const int64_t blocks = (args.num_entries + kBlockEntries - 1) / kBlockEntries;
  const int64_t of_group = passes * ((args.num_entries + kEntriesOfAsk - 1) / kEntriesOfAsk) + blocks * args.heads;
  return args.format.head_dim / group * of_group + asks_of_unpacking(args);
}

// The same of score_block and the softmax. Scores alone would ask for a line every twelve cycles, more than a core has
// under way while memory takes its time.
template <class V>
inline int64_t asks_of_scores(const PlanesAttentionArgs& args) {
  constexpr int64_t kPair = 2 * kKeyEntries;
  const int64_t passes = (args.heads + V::kHeads - 1) / V::kHeads, pairs = (args.num_entries + kPair - 1) / kPair;
  return (passes * pairs * args.format.head_dim / kKeyElements + args.heads * (args.num_entries / kLanes)) /
             kStepsOfAsk +
         asks_of_unpacking(args);
}

template <class V, class I>
void planes_attention(const PlanesAttentionArgs& args, const AttentionState& out) {
  PlanesScratch& work = *reinterpret_cast<PlanesScratch*>(scratch(sizeof(PlanesScratch)));
  const int64_t dim = args.format.head_dim, group = planes_group(dim), n = args.num_entries;
  const int64_t blocks = (n + kBlockEntries - 1) / kBlockEntries;
  const auto for_queries = [&](const auto& f) {
    // Nobody has asked for the first block of a thread's first chunk; quantising the queries takes as long as memory.
    Ahead first(args.keys, 1, args.format.key_upper, dim, 1);
    first.ask();
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t g = 0; g < dim / group; ++g)
        f(h * dim + g * group, h * kMaxPlanesDim + g * group, h * kMaxGroups + g);
    }
  };
  for_queries([&](int64_t from, int64_t to, int64_t index) {
    quantize_query<V, I>(args.q + from, group, work.queries + to, work.query_scales + index);
  });
  // Apart from what stores the bytes, sixteen at a time: a load of 64 that follows has to wait for them.
  for_queries(
      [&](int64_t, int64_t at, int64_t index) { work.query_sums[index] = I::sum_of(work.queries + at, group); });
  Ahead values(args.values, blocks, args.format.value_upper, dim, asks_of_scores<V>(args));
  for (int64_t b = 0; b < blocks; ++b) score_block<V, I>(args, work, b, &values);
  for (int64_t h = 0; h < args.heads; ++h) {
    softmax<V>(work.scores + h * kAttentionChunk, n, out.max + h, out.sum + h, [&](int64_t t) TAPER_INLINE {
      if (t % (kStepsOfAsk * kLanes) == 0) values.ask();
    });
  }
  std::memset(out.acc, 0, static_cast<size_t>(args.heads * dim) * sizeof(float));
  Ahead ahead(args.next_keys, kChunkBlocks, args.format.key_upper, dim, asks_of_weights<I>(args));
  for (int64_t b = 0; b < blocks; ++b) weigh_block<V, I>(args, work, b, &ahead, out.acc);
}

}  // namespace taper::lanes
