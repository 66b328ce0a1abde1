// Greedy nested tables: seed by weighted k-means, then split (Any-Precision LLM, arXiv 2402.10517, section 3.2).
#include <cmath>
#include <limits>

#include "apis/row_tables_rows.hpp"

namespace taper {
namespace {

constexpr int kLloydSteps = 50;

// splitmix64 (Steele, Lea and Flood, 2014): the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  double uniform() {  // [0, 1)
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }

 private:
  uint64_t state_;
};

// Greedy k-means++ (Arthur and Vassilvitskii, 2007): the best of 2 + log k draws for each centre.
class Seeds {
 public:
  Seeds(const SortedRow& row, uint64_t seed)
      : row_(row), random_(seed), nearest_(row.size(), std::numeric_limits<double>::infinity()) {}

  std::vector<double> draw(int64_t count) {
    std::vector<double> centres;
    const int trials = 2 + static_cast<int>(std::log(static_cast<double>(count)));
    while (static_cast<int64_t>(centres.size()) < count) {
      double least = std::numeric_limits<double>::infinity(), chosen = 0.0;
      for (int trial = 0; trial < (centres.empty() ? 1 : trials); ++trial) {
        const double centre = row_.value(drawn(centres.empty()));
        const double potential = total_with(centre);
        if (potential < least) least = potential, chosen = centre;
      }
      for (int64_t i = 0; i < row_.size(); ++i) nearest_[i] = std::min(nearest_[i], square(row_.value(i) - chosen));
      centres.push_back(chosen);
    }
    std::sort(centres.begin(), centres.end());
    return centres;
  }

 private:
  static double square(double x) { return x * x; }

  // An element with the odds of its weight (times its squared distance from the nearest centre).
  int64_t drawn(bool first) {
    double total = 0.0;
    for (int64_t i = 0; i < row_.size(); ++i) total += first ? row_.weight(i) : row_.weight(i) * nearest_[i];
    double left = random_.uniform() * total;
    for (int64_t i = 0; i < row_.size(); ++i) {
      left -= first ? row_.weight(i) : row_.weight(i) * nearest_[i];
      if (left < 0.0) return i;
    }
    return row_.size() - 1;
  }

  double total_with(double centre) const {
    double total = 0.0;
    for (int64_t i = 0; i < row_.size(); ++i)
      total += row_.weight(i) * std::min(nearest_[i], square(row_.value(i) - centre));
    return total;
  }

  const SortedRow& row_;
  Random random_;
  std::vector<double> nearest_;  // squared distance from the nearest centre
};

// Begins of the clusters and the row's end: an element on the border belongs to the right.
std::vector<int64_t> assigned(const SortedRow& row, const std::vector<double>& centres) {
  std::vector<int64_t> edges{0};
  for (size_t c = 1; c < centres.size(); ++c) edges.push_back(row.position(0.5 * (centres[c - 1] + centres[c])));
  edges.push_back(row.size());
  return edges;
}

struct Clusters {
  std::vector<int64_t> edges;
  std::vector<double> centres;
};

Clusters k_means(const SortedRow& row, int64_t count, uint64_t seed) {
  Clusters found;
  found.centres = Seeds(row, seed).draw(count);
  found.edges = assigned(row, found.centres);
  for (int step = 0; step < kLloydSteps; ++step) {
    for (int64_t c = 0; c < count; ++c)
      found.centres[c] = row.centroid(found.edges[c], found.edges[c + 1], found.centres[c]);
    std::vector<int64_t> edges = assigned(row, found.centres);
    if (edges == found.edges) break;
    found.edges = std::move(edges);
  }
  for (int64_t c = 0; c < count; ++c)
    found.centres[c] = row.centroid(found.edges[c], found.edges[c + 1], found.centres[c]);
  return found;
}

// Where the elements i..j-1 part in two: a place that weighted 2-means leaves alone, found by bisection.
int64_t split(const SortedRow& row, int64_t i, int64_t j) {
  if (j - i < 2) return j;
  int64_t low = i + 1, high = j - 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const double border =
        0.5 * (row.centroid(i, middle, row.value(middle - 1)) + row.centroid(middle, j, row.value(middle)));
    if (border < row.value(middle - 1)) {
      high = middle - 1;
    } else if (border > row.value(middle)) {
      low = middle + 1;
    } else {
      return middle;
    }
  }
  return low;
}

}  // namespace

RowTree greedy_tree(const SortedRow& row, const RowTablesProblem& p, uint64_t seed) {
  RowTree tree;
  tree.levels.resize(p.max_bits + 1);
  Clusters clusters = k_means(row, int64_t{1} << p.min_bits, seed);
  tree.levels[p.min_bits] = clusters.centres;
  for (int bits = p.min_bits + 1; bits <= p.max_bits; ++bits) {
    Clusters next;
    for (size_t c = 0; c < clusters.centres.size(); ++c) {
      const int64_t i = clusters.edges[c], j = clusters.edges[c + 1], k = split(row, i, j);
      const double centre = clusters.centres[c];
      next.edges.insert(next.edges.end(), {i, k});
      next.centres.insert(next.centres.end(), {row.centroid(i, k, centre), row.centroid(k, j, centre)});
    }
    next.edges.push_back(row.size());
    clusters = std::move(next);
    tree.levels[bits] = clusters.centres;
  }
  tree.edges = clusters.edges;
  return tree;
}

}  // namespace taper
