// The KV cache as planes, bit by bit (docs/numerics.md, "KV cache as planes").
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/common/planes_layout.hpp"
#include "kernels/reference/reference.hpp"
#include "kernels/reference/sum16.hpp"

namespace taper::reference {
namespace {

constexpr float kMaxHalf = 65504.0f;
constexpr int kHalfBias = 15;
constexpr int kQueryBits = 7;
constexpr int kWeightBits = 7;

struct Place {
  int64_t byte;
  int bit;
};

Place place(int64_t word, int64_t bit) { return {byte_of(word, bit / 8), static_cast<int>(bit % 8)}; }

Place key_place(int64_t head_dim, int64_t t, int64_t d) {
  return place(t / kKeyEntries * (head_dim / kKeyElements) + d / kKeyElements,
               t % kKeyEntries * kKeyElements + d % kKeyElements);
}

Place value_place(int64_t head_dim, int64_t t, int64_t d) {
  return place(t / kValueEntries * (head_dim / kValueElements) + d / kValueElements,
               d % kValueElements * kValueEntries + t % kValueEntries);
}

using PlaceOf = Place (*)(int64_t head_dim, int64_t t, int64_t d);

bool get(const uint8_t* plane, Place at) { return plane[at.byte] >> at.bit & 1; }

void set(uint8_t* plane, Place at, bool value) {
  plane[at.byte] = static_cast<uint8_t>((plane[at.byte] & ~(1 << at.bit)) | value << at.bit);
}

// The shared exponent, as float16 has it.
int group_exponent(const float* x, int64_t n) {
  float a = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (!(std::fabs(x[i]) <= kMaxHalf)) return kNotFiniteExponent;
    a = std::max(a, std::fabs(x[i]));
  }
  return a == 0.0f ? 1 : std::max(1, std::ilogb(a) + kHalfBias);
}

void store_head(const float* x, int64_t dim, int bits, int upper_planes, uint8_t* upper, uint8_t* lower,
                uint8_t* exponents, int64_t t, PlaceOf place_of) {
  const int64_t group = planes_group(dim), bytes = plane_bytes(dim);
  for (int64_t g = 0; g < dim / group; ++g) {
    const int e = group_exponent(x + g * group, group);
    for (int j = 0; j < kExponentBits; ++j) {
      set(exponents + g * kExponentBytes + j * 8, {t / 8, static_cast<int>(t % 8)}, e >> (kExponentBits - 1 - j) & 1);
    }
    for (int64_t d = g * group; d < (g + 1) * group; ++d) {
      const Place at = place_of(dim, t, d);
      const bool finite = e != kNotFiniteExponent;
      const float scaled = finite ? std::ldexp(std::fabs(x[d]), bits - 1 + kHalfBias - e) : 0.0f;
      const int m = std::min(static_cast<int>(std::nearbyint(scaled)), (1 << bits) - 1);
      set(upper, at, finite && std::signbit(x[d]));
      for (int j = 0; j < bits; ++j) {
        uint8_t* plane = j < upper_planes ? upper + (1 + j) * bytes : lower + (j - upper_planes) * bytes;
        set(plane, at, m >> (bits - 1 - j) & 1);
      }
    }
  }
}

// What is read of one element: an integer in units of unit().
int read(const PlanesPart& part, int stored, int upper, int64_t dim, Place at) {
  int m = 0;
  for (int j = 0; j < part.bits; ++j) m = 2 * m + get(magnitude_plane(part, upper, j, dim), at);
  if (part.bits < stored) m = 2 * m + 1;
  return get(part.upper, at) ? -m : m;
}

float unit(const PlanesPart& part, int stored, int64_t group, int64_t t) {
  int e = 0;
  for (int j = 0; j < kExponentBits; ++j) {
    e = 2 * e + get(part.exponents + group * kExponentBytes + j * 8, {t / 8, static_cast<int>(t % 8)});
  }
  if (e == kNotFiniteExponent) return std::numeric_limits<float>::quiet_NaN();
  return std::ldexp(1.0f, e - kHalfBias - (part.bits - 1) - (part.bits < stored ? 1 : 0));
}

// Integers of a row by the rule of "Activations". Returns the scale.
float to_integers(const float* x, int64_t n, int magnitude_bits, int32_t* q) {
  float a = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    a = std::max(a, std::fabs(x[i]));
    q[i] = 0;
  }
  if (!finite || a == 0.0f) return finite ? 1.0f : std::numeric_limits<float>::quiet_NaN();
  const float limit = static_cast<float>((1 << magnitude_bits) - 1);
  int e = -100;
  while (std::nearbyint(std::ldexp(a, -e)) > limit) ++e;
  for (int64_t i = 0; i < n; ++i) q[i] = static_cast<int32_t>(std::nearbyint(std::ldexp(x[i], -e)));
  return std::ldexp(1.0f, e);
}

void attend(const PlanesAttentionArgs& args, const float* q, float* max, float* sum, float* acc) {
  const PlanesFormat& f = args.format;
  const int64_t dim = f.head_dim, group = planes_group(dim), n = args.num_entries;
  float w[kAttentionChunk] = {}, p[kBlockEntries];
  int32_t query[kMaxPlanesDim], weights[kBlockEntries];
  *max = -std::numeric_limits<float>::infinity();
  for (int64_t g = 0; g < dim / group; ++g) {
    const float scale = to_integers(q + g * group, group, kQueryBits, query + g * group);
    for (int64_t t = 0; t < n; ++t) {
      const PlanesPart& part = args.keys[t / kBlockEntries];
      const int64_t entry = t % kBlockEntries;
      int32_t dot = 0;
      for (int64_t d = g * group; d < (g + 1) * group; ++d) {
        dot += query[d] * read(part, f.key_bits, f.key_upper, dim, key_place(dim, entry, d));
      }
      w[t] = std::fma(static_cast<float>(dot), scale * unit(part, f.key_bits, g, entry), w[t]);
    }
  }
  for (int64_t t = 0; t < n; ++t) {
    w[t] *= args.scale;
    if (w[t] > *max) *max = w[t];
  }
  for (int64_t t = 0; t < n; ++t) w[t] = weight32(w[t] - *max);
  *sum = sum16(w, n);
  std::fill(acc, acc + dim, 0.0f);
  for (int64_t g = 0; g < dim / group; ++g) {
    for (int64_t begin = 0; begin < n; begin += kBlockEntries) {
      const PlanesPart& part = args.values[begin / kBlockEntries];
      const int64_t entries = std::min(kBlockEntries, n - begin);
      bool finite = true;
      for (int64_t t = 0; t < entries; ++t) {
        const float one = unit(part, f.value_bits, g, t), product = w[begin + t] * one;
        finite = finite && !std::isnan(one);
        p[t] = std::isnan(product) ? 0.0f : product;  // of a weight that is NaN, which the sum of weights then is too
      }
      float scale = to_integers(p, entries, kWeightBits, weights);
      if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
      for (int64_t d = g * group; d < (g + 1) * group; ++d) {
        int32_t total = 0;
        for (int64_t t = 0; t < entries; ++t) {
          total += weights[t] * read(part, f.value_bits, f.value_upper, dim, value_place(dim, t, d));
        }
        acc[d] = std::fma(static_cast<float>(total), scale, acc[d]);
      }
    }
  }
}

}  // namespace

void planes_store(float* qkv, int64_t heads, const PlanesFormat& format, const PlanesBlock& block, int64_t entry,
                  const float* cos, const float* sin) {
  const int64_t dim = format.head_dim, rotated = (heads + format.kv_heads) * dim, bytes = plane_bytes(dim);
  for (int64_t i = 0; i < rotated; i += dim) rope(qkv + i, dim / 2, cos, sin);
  const std::vector<float> ones(static_cast<size_t>(dim), 1.0f);
  for (int64_t i = 0; i < rotated; i += dim) rotate(qkv + i, ones.data(), dim, dim & -dim, false);
  const float* keys = qkv + heads * dim;
  const float* values = keys + format.kv_heads * dim;
  const int64_t exponents = dim / planes_group(dim) * kExponentBytes;
  for (int64_t h = 0; h < format.kv_heads; ++h) {
    store_head(keys + h * dim, dim, format.key_bits, format.key_upper, block.keys + h * (1 + format.key_upper) * bytes,
               block.low_keys + h * (format.key_bits - format.key_upper) * bytes, block.key_exponents + h * exponents,
               entry, key_place);
    store_head(values + h * dim, dim, format.value_bits, format.value_upper,
               block.values + h * (1 + format.value_upper) * bytes,
               block.low_values + h * (format.value_bits - format.value_upper) * bytes,
               block.value_exponents + h * exponents, entry, value_place);
  }
}

void planes_attention(const PlanesAttentionArgs& args, const AttentionState& out) {
  const int64_t dim = args.format.head_dim;
  for (int64_t h = 0; h < args.heads; ++h) attend(args, args.q + h * dim, out.max + h, out.sum + h, out.acc + h * dim);
}

}  // namespace taper::reference
