// The float operations, written once over sixteen lanes (docs/numerics.md, `sum16`): V is an instruction set's Vec16.
//
// Everything here is a template over V, so that no function compiled for one set is ever linked into another.
#pragma once

#include <cstdint>

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

template <class V>
inline typename V::F exp(typename V::F x) {
  const auto least = V::set(-87.0f);
  const auto bounded = V::max(least, V::min(V::set(88.0f), x));  // NaN passes through both
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
  return V::zero_where_less(x, least, V::mul(p, V::power_of_two(n)));
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

// The butterflies at distances s and 2 s of a block, in one pass over memory.
template <class V>
inline void two_butterflies(float* x, int64_t block, int64_t s) {
  for (int64_t begin = 0; begin < block; begin += 4 * s) {
    for (int64_t i = begin; i < begin + s; i += kLanes) {
      const auto a = V::load(x + i), b = V::load(x + i + s), c = V::load(x + i + 2 * s), d = V::load(x + i + 3 * s);
      const auto a1 = V::add(a, b), b1 = V::sub(a, b), c1 = V::add(c, d), d1 = V::sub(c, d);
      V::store(x + i, V::add(a1, c1));
      V::store(x + i + s, V::add(b1, d1));
      V::store(x + i + 2 * s, V::sub(a1, c1));
      V::store(x + i + 3 * s, V::sub(b1, d1));
    }
  }
}

template <class V>
inline void one_butterfly(float* x, int64_t block, int64_t s) {
  for (int64_t begin = 0; begin < block; begin += 2 * s) {
    for (int64_t i = begin; i < begin + s; i += kLanes) {
      const auto a = V::load(x + i), b = V::load(x + i + s);
      V::store(x + i, V::add(a, b));
      V::store(x + i + s, V::sub(a, b));
    }
  }
}

template <class V>
void rotate(float* x, const float* signs, int64_t n, int64_t block, bool inverse) {
  const auto c = V::set(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block))));
  // A block below sixteen lanes divides them, and n is whole blocks, so a short last group is whole blocks too.
  const auto first_pass = [&](typename V::F v, typename V::F sign) {
    return small_butterflies<V>(inverse ? v : V::mul(v, sign), block);
  };
  const auto last_pass = [&](typename V::F v, typename V::F sign) {
    return inverse ? V::mul(V::mul(v, c), sign) : V::mul(v, c);
  };
  for_each_group<V>(
      n, [&](int64_t i) { V::store(x + i, first_pass(V::load(x + i), V::load(signs + i))); },
      [&](int64_t i, int64_t count) {
        V::store_first(x + i, first_pass(V::load_first(x + i, count), V::load_first(signs + i, count)), count);
      });
  for (int64_t begin = 0; block > kLanes && begin < n; begin += block) {
    int64_t s = kLanes;
    for (; 4 * s <= block; s *= 4) two_butterflies<V>(x + begin, block, s);
    if (s < block) one_butterfly<V>(x + begin, block, s);
  }
  for_each_group<V>(
      n, [&](int64_t i) { V::store(x + i, last_pass(V::load(x + i), V::load(signs + i))); },
      [&](int64_t i, int64_t count) {
        V::store_first(x + i, last_pass(V::load_first(x + i, count), V::load_first(signs + i, count)), count);
      });
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
