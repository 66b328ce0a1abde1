#include "apis/outliers.hpp"

#include "apis/check.hpp"
#include "apis/planes.hpp"
#include "heuristics/plan.hpp"
#include "kernels/reference/half.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

constexpr int64_t kPsPerOutlier = 1500;  // a load out of order, and a product

void check_row(const uint16_t* columns, int64_t begin, int64_t end, int64_t row, int64_t in_features) {
  for (int64_t i = begin; i < end; ++i) {
    require(columns[i] < in_features, "outlier ", i, " of row ", row, " is in column ", columns[i], ", the matrix has ",
            in_features);
    require(i == begin || columns[i - 1] < columns[i], "outliers ", i - 1, " and ", i, " of row ", row,
            " are in columns ", columns[i - 1 < 0 ? 0 : i - 1], " and ", columns[i], ", which must rise");
  }
}

}  // namespace

Outliers::Outliers(const int32_t* starts, int64_t rows, const uint16_t* columns, const uint16_t* values, int64_t count,
                   int64_t in_features)
    : starts_(starts), columns_(columns), values_(values), rows_(rows), in_features_(in_features) {
  require(rows >= 1, "outliers have ", rows, " rows, expected at least 1");
  require(starts[0] == 0 && starts[rows] == count, "outliers start at ", starts[0], " and end at ", starts[rows],
          ", expected 0 and ", count);
  for (int64_t row = 0; row < rows; ++row)
    require(starts[row] <= starts[row + 1] && starts[row + 1] <= count, "outliers of row ", row, " are ", starts[row],
            "..", starts[row + 1], " of ", count, ", which must rise");
  for (int64_t row = 0; row < rows; ++row) check_row(columns, starts[row], starts[row + 1], row, in_features);
}

void Outliers::add_product(const Activations& activations, float* out) const {
  require(activations.cols() == padded_cols(in_features_), "activations have ", activations.cols(),
          " columns, the outliers have ", padded_cols(in_features_));
  const ActivationsView inputs = activations.view();
  const int64_t cols = activations.cols(), mean = starts_[rows_] / rows_ + 1;
  const Plan plan = plan_items(rows_, mean * inputs.tokens * kPsPerOutlier, num_threads());
  parallel_for(rows_, plan.chunk, plan.threads,
               [&](int64_t begin, int64_t end) { add_product_rows(inputs, cols, begin, end, {out, nullptr, rows_}); });
}

void Outliers::add_product_rows(const ActivationsView& inputs, int64_t cols, int64_t begin, int64_t end,
                                const OutputView& output) const {
  for (int64_t row = begin; row < end; ++row) {
    if (starts_[row] == starts_[row + 1]) continue;
    for (int64_t t = 0; t < inputs.tokens; ++t) {
      float sum = 0.0f;
      for (int32_t i = starts_[row]; i < starts_[row + 1]; ++i) {
        const int64_t at = t * cols + columns_[i];
        const int q = inputs.low == nullptr ? inputs.q[at] : (inputs.q[at] << kInputShift) + inputs.low[at];
        sum = sum + reference::from_half(values_[i]) * static_cast<float>(q);
      }
      float& y = output.out[output.at(t, row)];
      y = y + sum * inputs.scale[t];
    }
  }
}

void Outliers::add_rows(const int64_t* indices, int64_t count, float* out) const {
  for (int64_t i = 0; i < count; ++i) {
    require(indices[i] >= 0 && indices[i] < rows_, "row ", indices[i], " is outside the matrix's ", rows_, " rows");
    float* row = out + i * in_features_;
    for (int32_t o = starts_[indices[i]]; o < starts_[indices[i] + 1]; ++o)
      row[columns_[o]] = row[columns_[o]] + reference::from_half(values_[o]);
  }
}

int64_t Outliers::bytes() const {
  return (rows_ + 1) * static_cast<int64_t>(sizeof(int32_t)) +
         starts_[rows_] * static_cast<int64_t>(sizeof(uint16_t) + sizeof(uint16_t));
}

}  // namespace taper
