// Attention over sixteen lanes (docs/numerics.md): some query heads of one token over one chunk of the entries that
// they share.
//
// A key or value is widened to float32 once for all these heads. Vector operations a 64-byte line of float16 entries
// and eight heads: 2 conversions and 16 fused multiply-adds, for keys and for values alike. V is an instruction set's
// Vec16, T the element of the cache.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/common/lanes.hpp"
#include "kernels/common/unroll.hpp"

namespace taper::lanes {

constexpr int kIntoL2 = 2;  // of __builtin_prefetch
constexpr int64_t kLine = 64;

// Lines in the order of memory, asked for beside arithmetic: the values while keys are multiplied, the next chunk's
// keys while values are. A few KB ahead of each load, as before, the stream waited at the end of every 32 KB, and two
// blocks of keys at once are no order that a processor's own prefetcher knows.
class Lines {
 public:
  Lines(const void* begin, int64_t bytes) : at_(static_cast<const char*>(begin)), end_(at_ + bytes) {}

  template <int kCount>
  TAPER_INLINE void ask() {
    if (at_ >= end_) return;
    unroll<kCount>([&](auto i) TAPER_INLINE { __builtin_prefetch(at_ + i * kLine, 0, kIntoL2); });
    at_ += kCount * kLine;
  }

 private:
  const char *at_, *end_;
};

// Calls f.template operator()<n>(first) for the heads in runs of n <= V::kHeads from `first` on.
template <class V, class F>
TAPER_INLINE inline void for_heads(int64_t heads, const F& f) {
  for (int64_t first = 0; first < heads; first += V::kHeads) {
    const int64_t count = heads - first < V::kHeads ? heads - first : V::kHeads;
    unroll<V::kHeads>([&](auto n) TAPER_INLINE {
      if (count == n + 1) f.template operator()<n + 1>(first);
    });
  }
}

// kBlocks blocks of sixteen scores of kHeads heads.
template <class V, int kHeads, int kBlocks, class T>
TAPER_INLINE inline void score_blocks(const float* q, const T* keys, int64_t dim, float scale, float* scores,
                                      Lines* values) {
  using F = typename V::F;
  constexpr int64_t kBytes = kBlocks * kKeyBlock * sizeof(T);  // of values for an element of keys
  Lines lines = *values;
  F acc[kHeads * kBlocks];
  unroll<kHeads * kBlocks>([&](auto i) TAPER_INLINE { acc[i] = V::zero(); });
  for (int64_t d = 0; d < dim; ++d) {
    lines.ask<(kBytes + kLine - 1) / kLine>();
    F k[kBlocks];
    unroll<kBlocks>([&](auto b) TAPER_INLINE { k[b] = V::load(keys + (b * dim + d) * kKeyBlock); });
    unroll<kHeads>([&](auto h) TAPER_INLINE {
      const F query = V::set(q[h * dim + d]);
      unroll<kBlocks>([&](auto b) TAPER_INLINE { acc[h * kBlocks + b] = V::fma(query, k[b], acc[h * kBlocks + b]); });
    });
  }
  const F factor = V::set(scale);
  unroll<kHeads>([&](auto h) TAPER_INLINE {
    unroll<kBlocks>([&](auto b) TAPER_INLINE {
      V::store(scores + h * kAttentionChunk + b * kKeyBlock, V::mul(acc[h * kBlocks + b], factor));
    });
  });
  *values = lines;
}

// Registers of sums that each of some heads gets: a multiply-add takes four cycles, so that two ports want eight at
// once.
template <class V, int kHeads>
inline constexpr int kSumsOfHead = V::kSums / kHeads > 8   ? 8
                                   : V::kSums / kHeads > 0 ? V::kSums / kHeads
                                                           : 1;

// Runs body.template operator()<n>(i) over [0, count) in steps of n: kMost, then half of it, and so on down to one.
template <int kMost, class Body>
TAPER_INLINE inline void in_steps(int64_t count, const Body& body, int64_t i = 0) {
  for (; i + kMost <= count; i += kMost) body.template operator()<kMost>(i);
  if constexpr (kMost > 1) in_steps<kMost / 2>(count, body, i);
}

template <class V, int kHeads, class T>
inline void score_heads(const AttentionArgs& args, const float* q, float* scores, Lines* values) {
  const T* keys = static_cast<const T*>(args.keys);
  const int64_t dim = args.head_dim, blocks = (args.num_entries + kKeyBlock - 1) / kKeyBlock;
  in_steps<kSumsOfHead<V, kHeads>>(blocks, [&]<int kBlocks>(int64_t b) TAPER_INLINE {
    score_blocks<V, kHeads, kBlocks>(q, keys + b * kKeyBlock * dim, dim, args.scale, scores + b * kKeyBlock, values);
  });
}

// Turns n scores into weights in place; lanes past n of the last block hold scores of no entry. Calls `beside(t)`
// for every whole sixteen.
template <class V, class Beside>
inline void softmax(float* scores, int64_t n, float* max_score, float* sum, const Beside& beside) {
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t t = n; t % kLanes != 0; ++t) scores[t] = lowest;
  auto most = V::set(lowest);
  for (int64_t t = 0; t < n; t += kLanes) most = V::max(V::load(scores + t), most);  // a NaN score is passed over
  const float max = V::largest(most);
  auto sums = V::zero();
  for_each_group<V>(
      n,
      [&](int64_t t) {
        beside(t);
        const auto w = softmax_weight<V>(V::sub(V::load(scores + t), V::set(max)));
        V::store(scores + t, w);
        sums = V::add(sums, w);
      },
      [&](int64_t t, int64_t count) {
        V::store(scores + t, softmax_weight<V>(V::sub(V::load(scores + t), V::set(max))));
        sums = V::add(sums, V::load_first(scores + t, count));
      });
  *max_score = max;
  *sum = V::tree(sums);
}

// kVectors groups of lanes of the values' elements, or, with a `count`, the first `count` lanes of one.
template <class V, int kHeads, int kVectors, class T>
TAPER_INLINE inline void weighted_block(const T* values, int64_t dim, int64_t num_entries, const float* weights,
                                        float* out, Lines* next_keys, int64_t count = 0) {
  using F = typename V::F;
  Lines lines = *next_keys;
  F acc[kHeads * kVectors];
  unroll<kHeads * kVectors>([&](auto i) TAPER_INLINE { acc[i] = V::zero(); });
  for (int64_t t = 0; t < num_entries; ++t) {
    const T* value = values + t * dim;
    lines.ask<(kVectors * kLanes * sizeof(T) + kLine - 1) / kLine>();
    F v[kVectors];
    unroll<kVectors>([&](auto n)
                         TAPER_INLINE { v[n] = count ? V::load_first(value, count) : V::load(value + n * kLanes); });
    unroll<kHeads>([&](auto h) TAPER_INLINE {
      const F w = V::set(weights[h * kAttentionChunk + t]);
      unroll<kVectors>([&](auto n) TAPER_INLINE { acc[h * kVectors + n] = V::fma(w, v[n], acc[h * kVectors + n]); });
    });
  }
  unroll<kHeads>([&](auto h) TAPER_INLINE {
    unroll<kVectors>([&](auto n) TAPER_INLINE {
      float* target = out + h * dim + n * kLanes;
      count ? V::store_first(target, acc[h * kVectors + n], count) : V::store(target, acc[h * kVectors + n]);
    });
  });
  *next_keys = lines;
}

template <class V, int kHeads, class T>
inline void weigh_heads(const AttentionArgs& args, const float* weights, float* out, Lines* next_keys) {
  const T* values = static_cast<const T*>(args.values);
  const int64_t dim = args.head_dim, entries = args.num_entries, whole = dim / kLanes * kLanes;
  in_steps<kSumsOfHead<V, kHeads>>(dim / kLanes, [&]<int kVectors>(int64_t v) TAPER_INLINE {
    weighted_block<V, kHeads, kVectors>(values + v * kLanes, dim, entries, weights, out + v * kLanes, next_keys);
  });
  if (whole < dim) {
    weighted_block<V, kHeads, 1>(values + whole, dim, entries, weights, out + whole, next_keys, dim - whole);
  }
}

template <class V, class T>
inline void attend(const AttentionArgs& args, const AttentionState& out) {
  alignas(64) float scores[kAttentionHeads * kAttentionChunk];
  constexpr int64_t kBytes = kAttentionChunk * sizeof(T);  // of an element of all entries
  Lines values(args.values, args.num_entries * args.head_dim * static_cast<int64_t>(sizeof(T)));
  Lines next_keys(static_cast<const char*>(args.keys) + kBytes * args.head_dim,
                  args.num_entries < kAttentionChunk ? 0 : kBytes * args.head_dim);
  for_heads<V>(args.heads, [&]<int kHeads>(int64_t h) TAPER_INLINE {
    score_heads<V, kHeads, T>(args, args.q + h * args.head_dim, scores + h * kAttentionChunk, &values);
  });
  for (int64_t h = 0; h < args.heads; ++h) {
    softmax<V>(scores + h * kAttentionChunk, args.num_entries, out.max + h, out.sum + h, [](int64_t) {});
  }
  for_heads<V>(args.heads, [&]<int kHeads>(int64_t h) TAPER_INLINE {
    weigh_heads<V, kHeads, T>(args, scores + h * kAttentionChunk, out.acc + h * args.head_dim, &next_keys);
  });
}

template <class V>
void attention(const AttentionArgs& args, const AttentionState& out) {
  if (args.type == KvType::f16) {
    attend<V, uint16_t>(args, out);
  } else {
    attend<V, float>(args, out);
  }
}

// Sixteen heads' factors at a time: an exp for each head took most of the merges, 0.9 ms of a token at 8,192 entries.
template <class V>
void attention_merge(int64_t heads, int64_t dim, const AttentionState& chunk, const AttentionState& into) {
  for (int64_t first = 0; first < heads; first += kLanes) {
    const int64_t count = heads - first < kLanes ? heads - first : kLanes;
    const auto before = V::load_first(into.max + first, count), after = V::load_first(chunk.max + first, count);
    const auto max = V::max(after, before);
    const auto a = exp<V>(V::sub(before, max)), b = exp<V>(V::sub(after, max));
    const auto sum = V::mul(V::load_first(chunk.sum + first, count), b);
    V::store_first(into.sum + first, V::fma(V::load_first(into.sum + first, count), a, sum), count);
    V::store_first(into.max + first, max, count);
    float factors[2][kLanes];
    V::store(factors[0], a);
    V::store(factors[1], b);
    for (int64_t h = 0; h < count; ++h) {
      const auto earlier = V::set(factors[0][h]), later = V::set(factors[1][h]);
      float* y = into.acc + (first + h) * dim;
      const float* x = chunk.acc + (first + h) * dim;
      for_each_group<V>(
          dim, [&](int64_t d) { V::store(y + d, V::fma(V::load(y + d), earlier, V::mul(V::load(x + d), later))); },
          [&](int64_t d, int64_t n) {
            V::store_first(y + d, V::fma(V::load_first(y + d, n), earlier, V::mul(V::load_first(x + d, n), later)), n);
          });
    }
  }
}

template <class V>
void attention_finish(int64_t heads, int64_t dim, const AttentionState& state, float* out) {
  for (int64_t h = 0; h < heads; ++h) {
    const auto factor = V::set(1.0f / state.sum[h]);
    const float* x = state.acc + h * dim;
    float* y = out + h * dim;
    for_each_group<V>(
        dim, [&](int64_t d) { V::store(y + d, V::mul(V::load(x + d), factor)); },
        [&](int64_t d, int64_t n) { V::store_first(y + d, V::mul(V::load_first(x + d, n), factor), n); });
  }
}

}  // namespace taper::lanes
