// The tree of nested codes, and the search for the leaf of least error at all widths.
#pragma once

#include <cstdint>

namespace taper {

constexpr int kSolverLevels = 8;  // widths, at most

class SolverTree {
 public:
  // values: 2^min_bits + ... + 2^max_bits, level after level, in code order.
  SolverTree(const float* values, int min_bits, int max_bits);

  int levels() const { return nodes_.levels; }

  // The values of a leaf's path, one for each level.
  const float* values(int leaf) const { return nodes_.paths[leaf]; }

  // The leaf with the least sum over its path of weights[l] (targets[l] - value)^2; weights are not negative. Costs
  // are compared to 2^-19 of themselves, the lesser index in a group of 16 leaves wins among equals.
  int nearest(const float* targets, const float* weights) const;

  // All codes are drawn out to 8 bits: 16 prefixes of 4 bits, and under each 16 leaves.
  static constexpr int kLanes = 16;
  struct Nodes {
    alignas(64) float upper[kSolverLevels][kLanes];          // values of the levels up to 4 bits, for each prefix
    alignas(64) float least[kLanes];                         // of the last level under a prefix
    alignas(64) float greatest[kLanes];                      // of the last level under a prefix
    alignas(64) float lower[kLanes][kSolverLevels][kLanes];  // values of the levels above 4 bits, for each leaf
    alignas(64) float paths[kLanes * kLanes][kSolverLevels];
    int levels;
    int upper_levels;
    int shift;  // leaves are drawn out by 2^shift
  };

 private:
  Nodes nodes_ = {};
};

}  // namespace taper
