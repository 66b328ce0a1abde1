// One row in rising order with running sums: the weighted squared error of any run of it in O(1).
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace taper {

class SortedRow {
 public:
  SortedRow(const float* weights, const float* sensitivity, int64_t cols)
      : order_(cols), values_(cols), weights_(cols), sums_{sum_t(cols + 1), sum_t(cols + 1), sum_t(cols + 1)} {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::sort(order_.begin(), order_.end(),
              [&](int64_t a, int64_t b) { return weights[a] != weights[b] ? weights[a] < weights[b] : a < b; });
    const bool blind = std::all_of(sensitivity, sensitivity + cols, [](float f) { return f == 0.0f; });
    for (int64_t i = 0; i < cols; ++i) {
      const double w = weights[order_[i]], f = blind ? 1.0 : sensitivity[order_[i]];
      values_[i] = w;
      weights_[i] = f;
      sums_[0][i + 1] = sums_[0][i] + f;
      sums_[1][i + 1] = sums_[1][i] + f * w;
      sums_[2][i + 1] = sums_[2][i] + f * w * w;
    }
  }

  int64_t size() const { return static_cast<int64_t>(values_.size()); }
  int64_t column(int64_t i) const { return order_[i]; }
  double value(int64_t i) const { return values_[i]; }
  double weight(int64_t i) const { return weights_[i]; }
  double mass(int64_t i, int64_t j) const { return sums_[0][j] - sums_[0][i]; }

  // Centroid of the elements i..j-1; `otherwise` where they weigh nothing.
  double centroid(int64_t i, int64_t j, double otherwise) const {
    const double m = mass(i, j);
    return m > 0.0 ? (sums_[1][j] - sums_[1][i]) / m : otherwise;
  }

  // Weighted squared error of the elements i..j-1 about their centroid.
  double cost(int64_t i, int64_t j) const {
    const double m = mass(i, j);
    if (!(m > 0.0)) return 0.0;
    const double first = sums_[1][j] - sums_[1][i];
    return std::max(0.0, sums_[2][j] - sums_[2][i] - first * first / m);
  }

  // First element that is not less than `value`.
  int64_t position(double value) const {
    return std::lower_bound(values_.begin(), values_.end(), value) - values_.begin();
  }

 private:
  using sum_t = std::vector<double>;

  std::vector<int64_t> order_;
  std::vector<double> values_;
  std::vector<double> weights_;
  std::vector<double> sums_[3];
};

// Begins of the leaves and, for every width, the nodes' values.
struct RowTree {
  std::vector<int64_t> edges;               // (2^max_bits + 1) positions in the sorted row
  std::vector<std::vector<double>> levels;  // [bits] (2^bits); those below min_bits may be empty
};

}  // namespace taper
