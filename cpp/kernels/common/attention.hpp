// Attention over sixteen lanes (docs/numerics.md): one token, one KV head, all query heads that share it.
//
// A key is widened to float32 once for the whole group of heads, and a value once for V::kHeads of them. V is an
// instruction set's Vec16, T the element of the cache.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/common/lanes.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::lanes {

// The parts of AttentionArgs::scratch.
template <class V>
struct Scratch {
  Scratch(float* memory, int64_t group, int64_t num_entries, int64_t head_dim)
      : row(round_up(head_dim)),
        stride(round_up(num_entries)),
        queries(memory),
        keys(queries + group * row),
        scores(keys + kLanes * row),
        factors(scores + group * stride) {}

  static int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

  int64_t row;     // floats of a padded query or key
  int64_t stride;  // floats of a head's padded scores
  float* queries;  // (group, row)
  float* keys;     // (16, row)
  float* scores;   // (group, stride)
  float* factors;  // (group): 1 / sum of a head's weights
};

// Widens `count` vectors of `dim` elements to rows of `row` floats, zeros in the padding.
template <class V, class T>
inline void widen(const T* vectors, int64_t count, int64_t dim, float* out, int64_t row) {
  for (int64_t r = 0; r < count; ++r) {
    const T* x = vectors + r * dim;
    float* y = out + r * row;
    for_each_group<V>(
        dim, [&](int64_t i) { V::store(y + i, V::load(x + i)); },
        [&](int64_t i, int64_t rest) { V::store(y + i, V::load_first(x + i, rest)); });
  }
}

// kDots scores of every head of the group against the keys in scratch.
template <class V>
inline void score_keys(const Scratch<V>& scratch, int64_t group, float scale, int64_t t) {
  using F = typename V::F;
  const int64_t row = scratch.row;
  for (int64_t h = 0; h < group; ++h) {
    const float* query = scratch.queries + h * row;
    F dots[V::kDots];
    unroll<V::kDots / V::kRows>([&](auto block) TAPER_INLINE {
      constexpr int first = block * V::kRows;
      const float* keys = scratch.keys + first * row;
      unroll<V::kRows>([&](auto r) TAPER_INLINE { dots[first + r] = V::zero(); });
      for (int64_t i = 0; i < row; i += kLanes) {
        const F q = V::load(query + i);
        unroll<V::kRows>(
            [&](auto r) TAPER_INLINE { dots[first + r] = V::fma(q, V::load(keys + r * row + i), dots[first + r]); });
      }
    });
    V::store_dots(scratch.scores + h * scratch.stride + t, V::mul(V::trees(dots), V::set(scale)));
  }
}

// Turns n scores into weights in place; returns the factor 1 / sum of the weights.
template <class V>
inline float softmax(float* scores, int64_t n) {
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t t = n; t % kLanes != 0; ++t) scores[t] = lowest;
  auto most = V::set(lowest);
  for (int64_t t = 0; t < n; t += kLanes) most = V::max(V::load(scores + t), most);  // a NaN score is passed over
  float lanes[kLanes];
  V::store(lanes, most);
  float max = lowest;
  for (const float lane : lanes) max = lane > max ? lane : max;
  auto sums = V::zero();
  for_each_group<V>(
      n,
      [&](int64_t t) {
        const auto w = exp<V>(V::sub(V::load(scores + t), V::set(max)));
        V::store(scores + t, w);
        sums = V::add(sums, w);
      },
      [&](int64_t t, int64_t count) {
        V::store(scores + t, exp<V>(V::sub(V::load(scores + t), V::set(max))));
        sums = V::add(sums, V::load_first(scores + t, count));
      });
  return 1.0f / V::tree(sums);
}

// Where the weighted sum of some heads reads and writes.
template <class T>
struct WeightedSum {
  const T* values;  // (num_entries, dim)
  int64_t dim;
  int64_t num_entries;
  const float* weights;  // (heads, stride)
  int64_t stride;
  const float* factors;  // (heads)
  float* out;            // (heads, dim)
};

// kHeads heads and kVectors groups of lanes from element d on, or, with a `count`, the first `count` lanes of one.
template <class V, int kHeads, int kVectors, class T>
inline void weighted_block(const WeightedSum<T>& sum, int64_t d, int64_t count = 0) {
  using F = typename V::F;
  F acc[kHeads * kVectors];
  unroll<kHeads * kVectors>([&](auto i) TAPER_INLINE { acc[i] = V::zero(); });
  const T* value = sum.values + d;
  for (int64_t t = 0; t < sum.num_entries; ++t, value += sum.dim) {
    F v[kVectors];
    unroll<kVectors>([&](auto n)
                         TAPER_INLINE { v[n] = count ? V::load_first(value, count) : V::load(value + n * kLanes); });
    unroll<kHeads>([&](auto h) TAPER_INLINE {
      const F w = V::set(sum.weights[h * sum.stride + t]);
      unroll<kVectors>([&](auto n) TAPER_INLINE { acc[h * kVectors + n] = V::fma(w, v[n], acc[h * kVectors + n]); });
    });
  }
  unroll<kHeads>([&](auto h) TAPER_INLINE {
    const F factor = V::set(sum.factors[h]);
    float* out = sum.out + h * sum.dim + d;
    unroll<kVectors>([&](auto n) TAPER_INLINE {
      const F y = V::mul(acc[h * kVectors + n], factor);
      count ? V::store_first(out, y, count) : V::store(out + n * kLanes, y);
    });
  });
}

template <class V, int kHeads, class T>
inline void weighted_heads(const WeightedSum<T>& sum) {
  constexpr int64_t block = V::kVectors * kLanes;
  int64_t d = 0;
  for (; d + block <= sum.dim; d += block) weighted_block<V, kHeads, V::kVectors>(sum, d);
  for (; d + kLanes <= sum.dim; d += kLanes) weighted_block<V, kHeads, 1>(sum, d);
  if (d < sum.dim) weighted_block<V, kHeads, 1>(sum, d, sum.dim - d);
}

template <class V, class T>
inline void attend(const AttentionArgs& args, int64_t token, int64_t kv_head) {
  const KvView& kv = args.kv;
  const int64_t group = args.heads / kv.kv_heads, dim = kv.head_dim, num_entries = args.position + token + 1;
  const int64_t offset = kv_head * kv.capacity * dim;
  const T* keys = static_cast<const T*>(kv.keys) + offset;
  const Scratch<V> scratch(args.scratch, group, num_entries, dim);
  widen<V>(args.q + token * args.q_stride + kv_head * group * dim, group, dim, scratch.queries, scratch.row);
  for (int64_t t = 0; t < num_entries; t += V::kDots) {
    const int64_t count = num_entries - t < V::kDots ? num_entries - t : V::kDots;
    widen<V>(keys + t * dim, count, dim, scratch.keys, scratch.row);
    score_keys<V>(scratch, group, args.scale, t);  // past `count` it scores old keys, which softmax passes over
  }
  for (int64_t h = 0; h < group; ++h) {
    scratch.factors[h] = softmax<V>(scratch.scores + h * scratch.stride, num_entries);
  }
  WeightedSum<T> sum{static_cast<const T*>(kv.values) + offset,
                     dim,
                     num_entries,
                     scratch.scores,
                     scratch.stride,
                     scratch.factors,
                     args.out + (token * args.heads + kv_head * group) * dim};
  for (int64_t left = group; left > 0;) {
    const int64_t heads = left >= V::kHeads ? V::kHeads : left >= 2 ? 2 : 1;
    if (heads == V::kHeads) {
      weighted_heads<V, V::kHeads>(sum);
    } else if (heads == 2) {
      weighted_heads<V, 2>(sum);
    } else {
      weighted_heads<V, 1>(sum);
    }
    left -= heads;
    sum.weights += heads * sum.stride;
    sum.factors += heads;
    sum.out += heads * dim;
  }
}

template <class V>
void attention(const AttentionArgs& args, int64_t token, int64_t kv_head) {
  if (args.kv.type == KvType::f16) {
    attend<V, uint16_t>(args, token, kv_head);
  } else {
    attend<V, float>(args, token, kv_head);
  }
}

}  // namespace taper::lanes
