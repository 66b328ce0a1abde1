// The float operations, written once over sixteen lanes (docs/numerics.md, `sum16`): V is an instruction set's Vec16.
//
// Everything here is a template over V, so that no function compiled for one set is ever linked into another.
#pragma once

#include <cstdint>

#include "kernels/common/unroll.hpp"
#include "taper/kernels.hpp"

namespace taper::lanes {

constexpr int64_t kLanes = 16;

// Calls whole(i) for each full group of sixteen elements and rest(i, count) for what is left.
template <class V, class Whole, class Rest>
inline void for_each_group(int64_t n, const Whole& whole, const Rest& rest) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) whole(i);
  if (i < n) rest(i, n - i);
}

// A softmax's weight of what is at most 0, or NaN (docs/numerics.md, `weight32`).
template <class V>
inline typename V::F softmax_weight(typename V::F x) {
  const auto t = V::max(V::set(-100.0f), V::mul(x, V::set(1.44269504f)));  // NaN passes through
  const auto n = V::rint(t), r = V::sub(t, n);
  auto p = V::set(0.00132647273f);
  p = V::fma(p, r, V::set(0.00967151299f));
  p = V::fma(p, r, V::set(0.0555073358f));
  p = V::fma(p, r, V::set(0.240222424f));
  p = V::fma(p, r, V::set(0.693147004f));
  return V::scaled(V::fma(p, r, V::set(1.0f)), n);
}

template <class V>
inline typename V::F exp(typename V::F x) {
  const auto least = V::set(-87.0f);
  const auto bounded = V::max(least, V::min(V::set(88.0f), x));  // NaN passes through
  const auto n = V::rint(V::mul(bounded, V::set(1.44269504f)));
  auto r = V::fma(n, V::set(-0.693145752f), bounded);
  r = V::fma(n, V::set(-1.42860677e-6f), r);
  auto p = V::set(1.0f / 720.0f);
  p = V::fma(p, r, V::set(1.0f / 120.0f));
  p = V::fma(p, r, V::set(1.0f / 24.0f));
  p = V::fma(p, r, V::set(1.0f / 6.0f));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return V::zero_where_less(x, least, V::scaled(p, n));
}

template <class V>
void exp(const float* x, int64_t n, float* y) {
  for_each_group<V>(
      n, [&](int64_t i) { V::store(y + i, exp<V>(V::load(x + i))); },
      [&](int64_t i, int64_t count) { V::store_first(y + i, exp<V>(V::load_first(x + i, count)), count); });
}

template <class V>
inline typename V::F swiglu(typename V::F gate, typename V::F up) {
  const auto one = V::set(1.0f);
  return V::mul(V::div(gate, V::add(one, exp<V>(V::mul(gate, V::set(-1.0f))))), up);
}

template <class V>
void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  for_each_group<V>(
      n, [&](int64_t i) { V::store(y + i, swiglu<V>(V::load(gate + i), V::load(up + i))); },
      [&](int64_t i, int64_t count) {
        V::store_first(y + i, swiglu<V>(V::load_first(gate + i, count), V::load_first(up + i, count)), count);
      });
}

template <class V>
void rms_norm(const float* x, const float* gain, float eps, int64_t n, float* y) {
  auto squares = V::zero();
  for_each_group<V>(
      n,
      [&](int64_t i) {
        const auto v = V::load(x + i);
        squares = V::fma(v, v, squares);
      },
      [&](int64_t i, int64_t count) {
        const auto v = V::load_first(x + i, count);
        squares = V::fma(v, v, squares);
      });
  const auto inv = V::set(1.0f / __builtin_sqrtf(V::tree(squares) / static_cast<float>(n) + eps));
  for_each_group<V>(
      n,
      [&](int64_t i) {
        const auto scaled = V::mul(V::load(x + i), inv);
        V::store(y + i, gain == nullptr ? scaled : V::mul(scaled, V::load(gain + i)));
      },
      [&](int64_t i, int64_t count) {
        const auto scaled = V::mul(V::load_first(x + i, count), inv);
        V::store_first(y + i, gain == nullptr ? scaled : V::mul(scaled, V::load_first(gain + i, count)), count);
      });
}

// The butterflies of a block that stay within sixteen lanes.
template <class V>
inline typename V::F small_butterflies(typename V::F x, int64_t block) {
  if (block >= 2) x = V::template butterfly<1>(x);
  if (block >= 4) x = V::template butterfly<2>(x);
  if (block >= 8) x = V::template butterfly<4>(x);
  if (block >= 16) x = V::template butterfly<8>(x);
  return x;
}

// What a rotation does before its first butterflies between groups of sixteen and after its last.
template <class V>
struct Ends {
  using F = typename V::F;

  F enter(F x, F sign) const { return small_butterflies<V>(inverse ? x : V::mul(x, sign), block); }
  F leave(F x, F sign) const { return inverse ? V::mul(V::mul(x, c), sign) : V::mul(x, c); }

  const float* signs;
  int64_t block;
  bool inverse;
  F c;
};

// The butterflies at distances s, 2 s, .. of the block at `begin`, kLevels of them in one pass over memory.
template <class V, int kLevels, bool kFirst, bool kLast>
void butterflies(float* x, const Ends<V>& ends, int64_t begin, int64_t s) {
  constexpr int kCount = 1 << kLevels;
  for (int64_t group = begin; group < begin + ends.block; group += kCount * s) {
    for (int64_t i = group; i < group + s; i += kLanes) {
      typename V::F v[kCount];
      unroll<kCount>([&](auto j) TAPER_INLINE {
        v[j] = V::load(x + i + j * s);
        if (kFirst) v[j] = ends.enter(v[j], V::load(ends.signs + i + j * s));
      });
      unroll<kLevels>([&](auto level) TAPER_INLINE {
        unroll<kCount / 2>([&](auto pair) TAPER_INLINE {
          constexpr int kStep = 1 << level, kA = pair / kStep * 2 * kStep + pair % kStep, kB = kA + kStep;
          const auto a = v[kA], b = v[kB];
          v[kA] = V::add(a, b);
          v[kB] = V::sub(a, b);
        });
      });
      unroll<kCount>([&](auto j) TAPER_INLINE {
        V::store(x + i + j * s, kLast ? ends.leave(v[j], V::load(ends.signs + i + j * s)) : v[j]);
      });
    }
  }
}

// The same for a run-time number of levels up to kMost.
template <class V, int kMost>
void butterflies(float* x, const Ends<V>& ends, int64_t begin, int64_t s, int levels, bool last) {
  if constexpr (kMost > 1) {
    if (levels < kMost) return butterflies<V, kMost - 1>(x, ends, begin, s, levels, last);
  }
  if (s == kLanes) {
    last ? butterflies<V, kMost, true, true>(x, ends, begin, s) : butterflies<V, kMost, true, false>(x, ends, begin, s);
  } else {
    last ? butterflies<V, kMost, false, true>(x, ends, begin, s)
         : butterflies<V, kMost, false, false>(x, ends, begin, s);
  }
}

template <class V>
void rotate(float* x, const float* signs, int64_t n, int64_t block, bool inverse) {
  const Ends<V> ends{signs, block, inverse,
                     V::set(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block))))};
  if (block <= kLanes) {
    // Such a block divides the lanes, and n is whole blocks, so a short last group is whole blocks too.
    const auto all = [&](typename V::F v, typename V::F sign) { return ends.leave(ends.enter(v, sign), sign); };
    return for_each_group<V>(
        n, [&](int64_t i) { V::store(x + i, all(V::load(x + i), V::load(signs + i))); },
        [&](int64_t i, int64_t count) {
          V::store_first(x + i, all(V::load_first(x + i, count), V::load_first(signs + i, count)), count);
        });
  }
  for (int64_t begin = 0; begin < n; begin += block) {
    int left = __builtin_ctzll(static_cast<uint64_t>(block / kLanes));
    for (int64_t s = kLanes; left > 0;) {
      const int passes = (left + V::kLevels - 1) / V::kLevels, levels = (left + passes - 1) / passes;
      left -= levels;
      butterflies<V, V::kLevels>(x, ends, begin, s, levels, left == 0);
      s <<= levels;
    }
  }
}

template <class V>
inline void rope(float* head, int64_t half, const float* cos, const float* sin) {
  const auto low = [](auto x0, auto x1, auto c, auto s) { return V::fnma(x1, s, V::mul(x0, c)); };
  const auto high = [](auto x0, auto x1, auto c, auto s) { return V::fma(x0, s, V::mul(x1, c)); };
  for_each_group<V>(
      half,
      [&](int64_t i) {
        const auto x0 = V::load(head + i), x1 = V::load(head + half + i), c = V::load(cos + i), s = V::load(sin + i);
        V::store(head + i, low(x0, x1, c, s));
        V::store(head + half + i, high(x0, x1, c, s));
      },
      [&](int64_t i, int64_t count) {
        const auto x0 = V::load_first(head + i, count), x1 = V::load_first(head + half + i, count);
        const auto c = V::load_first(cos + i, count), s = V::load_first(sin + i, count);
        V::store_first(head + i, low(x0, x1, c, s), count);
        V::store_first(head + half + i, high(x0, x1, c, s), count);
      });
}

// Element i of a key goes to line i of its block of sixteen.
template <class V, class T>
inline void store_key(const float* x, int64_t n, T* line) {
  for (int64_t i = 0; i < n; i += kLanes) {
    T elements[kLanes];
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    V::store(elements, V::load_first(x + i, count));
    for (int64_t k = 0; k < count; ++k) line[(i + k) * kKeyBlock] = elements[k];
  }
}

template <class V, class T>
inline void store_value(const float* x, int64_t n, T* out) {
  for_each_group<V>(
      n, [&](int64_t i) { V::store(out + i, V::load(x + i)); },
      [&](int64_t i, int64_t count) { V::store_first(out + i, V::load_first(x + i, count), count); });
}

template <class V, class T>
inline void store_entries(const float* keys, const KvView& kv, int64_t position) {
  const float* values = keys + kv.kv_heads * kv.head_dim;
  for (int64_t h = 0; h < kv.kv_heads; ++h) {
    const int64_t head = h * kv.capacity * kv.head_dim, block = position / kKeyBlock * kKeyBlock;
    store_key<V>(keys + h * kv.head_dim, kv.head_dim,
                 static_cast<T*>(kv.keys) + head + block * kv.head_dim + position % kKeyBlock);
    store_value<V>(values + h * kv.head_dim, kv.head_dim, static_cast<T*>(kv.values) + head + position * kv.head_dim);
  }
}

template <class V>
void rope_store(float* qkv, int64_t heads, const KvView& kv, int64_t position, const float* cos, const float* sin) {
  for (int64_t h = 0; h < heads + kv.kv_heads; ++h) rope<V>(qkv + h * kv.head_dim, kv.head_dim / 2, cos, sin);
  if (kv.type == KvType::f16) {
    store_entries<V, uint16_t>(qkv + heads * kv.head_dim, kv, position);
  } else {
    store_entries<V, float>(qkv + heads * kv.head_dim, kv, position);
  }
}

}  // namespace taper::lanes
