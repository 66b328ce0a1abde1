#include "apis/solver_tree.hpp"

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "apis/solver_clones.hpp"

namespace taper {
namespace {

constexpr int kLanes = SolverTree::kLanes;
constexpr int kPrefixBits = 4;
constexpr int kDrawnBits = 8;
constexpr int32_t kLaneMask = kLanes - 1;

// Whole vectors of GCC and Clang, which every instruction set splits as it needs; loops over lanes end up as scalars
// where a minimum follows.
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

[[gnu::always_inline]] inline void load(Floats& vector, const float* from) {
  std::memcpy(&vector, from, sizeof vector);
}

[[gnu::always_inline]] inline void add_error(Floats& costs, const float* values, float target, float weight) {
  Floats error;
  load(error, values);
  error = target - error;
  costs += weight * error * error;
}

// Floats that are not below 0 are in the order of their bits; the lowest four make room for the lane, so that one
// minimum finds both.
[[gnu::always_inline]] inline void to_keys(Ints& keys, const Floats& costs) {
  constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  std::memcpy(&keys, &costs, sizeof keys);
  keys = (keys & ~kLaneMask) | kLane;
}

[[gnu::always_inline]] inline int32_t least(const Ints& keys) {
  const auto high8 = __builtin_shufflevector(keys, keys, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto low8 = __builtin_shufflevector(keys, keys, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto all8 = high8 < low8 ? high8 : low8;
  const auto high4 = __builtin_shufflevector(all8, all8, 4, 5, 6, 7);
  const auto low4 = __builtin_shufflevector(all8, all8, 0, 1, 2, 3);
  const auto all4 = high4 < low4 ? high4 : low4;
  const auto swapped = __builtin_shufflevector(all4, all4, 2, 3, 0, 1);
  const auto all2 = swapped < all4 ? swapped : all4;
  return std::min(static_cast<int32_t>(all2[0]), static_cast<int32_t>(all2[1]));
}

// Prefixes in rising order of a bound: their own cost and the last level's least error among the leaves under them.
// Rounding keeps the order of sums of what is not negative, so no leaf is below its prefix's bound, and the search
// ends where the bound reaches the best leaf: nearly always at the second prefix.
TAPER_CLONES int find(const SolverTree::Nodes& nodes, const float* targets, const float* weights) {
  Floats costs = {}, low, high;
  for (int l = 0; l < nodes.upper_levels; ++l) add_error(costs, nodes.upper[l], targets[l], weights[l]);
  const float last = targets[nodes.levels - 1], last_weight = weights[nodes.levels - 1];
  load(low, nodes.least);
  load(high, nodes.greatest);
  low -= last;
  high = last - high;
  Floats outside = low > high ? low : high;
  outside = outside > 0.0f ? outside : Floats{};
  Ints keys, leaf_keys;
  to_keys(keys, costs + last_weight * outside * outside);
  int32_t first = least(keys), best = INT32_MAX;
  int leaf = 0;
  do {
    const int prefix = first & kLaneMask;
    Floats leaves = Floats{} + costs[prefix];
    for (int l = nodes.upper_levels; l < nodes.levels; ++l)
      add_error(leaves, nodes.lower[prefix][l], targets[l], weights[l]);
    to_keys(leaf_keys, leaves);
    const int32_t found = least(leaf_keys);
    if (found < best) {
      best = found;
      leaf = prefix * kLanes + (found & kLaneMask);
    }
    keys = keys == first ? Ints{} + INT32_MAX : keys;
    first = least(keys);
  } while ((first & ~kLaneMask) < (best & ~kLaneMask));
  return leaf >> nodes.shift;
}

}  // namespace

SolverTree::SolverTree(const float* values, int min_bits, int max_bits) {
  nodes_.levels = max_bits - min_bits + 1;
  nodes_.upper_levels = std::clamp(kPrefixBits - min_bits + 1, 0, nodes_.levels);
  nodes_.shift = kDrawnBits - max_bits;
  std::fill_n(nodes_.least, kLanes, -FLT_MAX);
  std::fill_n(nodes_.greatest, kLanes, FLT_MAX);
  for (int l = 0; l < nodes_.levels; ++l) {
    const int bits = min_bits + l;
    for (int drawn = 0; drawn < kLanes * kLanes; ++drawn) {
      const float value = values[drawn >> (kDrawnBits - bits)];
      const int prefix = drawn / kLanes, lane = drawn % kLanes;
      nodes_.paths[drawn >> nodes_.shift][l] = value;
      if (bits <= kPrefixBits)
        nodes_.upper[l][prefix] = value;
      else
        nodes_.lower[prefix][l][lane] = value;
    }
    values += int64_t{1} << bits;
  }
  if (nodes_.upper_levels == nodes_.levels) return;  // the last level is in the prefixes' own cost
  for (int prefix = 0; prefix < kLanes; ++prefix) {
    const float* last = nodes_.lower[prefix][nodes_.levels - 1];
    nodes_.least[prefix] = *std::min_element(last, last + kLanes);
    nodes_.greatest[prefix] = *std::max_element(last, last + kLanes);
  }
}

int SolverTree::nearest(const float* targets, const float* weights) const { return find(nodes_, targets, weights); }

}  // namespace taper
