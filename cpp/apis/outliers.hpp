// Weights kept apart from the planes in compressed rows of float16 (docs/numerics.md, "Outliers").
#pragma once

#include <cstdint>

#include "apis/activations.hpp"

namespace taper {

// The arrays belong to the caller and outlive the object.
class Outliers {
 public:
  // starts (rows + 1), columns and values (starts[rows]) as float16. Throws std::invalid_argument unless the starts
  // rise from 0 to `count` and the columns of a row rise below in_features.
  Outliers(const int32_t* starts, int64_t rows, const uint16_t* columns, const uint16_t* values, int64_t count,
           int64_t in_features);

  int64_t rows() const { return rows_; }
  int64_t in_features() const { return in_features_; }

  // out (tokens, rows) += the outliers times the activations; rows without outliers stay as they are.
  void add_product(const Activations& activations, float* out) const;

  // The same for rows begin .. end - 1, on this thread; checks nothing.
  void add_product_rows(const ActivationsView& inputs, int64_t cols, int64_t begin, int64_t end,
                        const OutputView& output) const;

  // out (count, in_features) += the rows named by `indices`.
  void add_rows(const int64_t* indices, int64_t count, float* out) const;

  int64_t bytes() const;

 private:
  const int32_t* starts_;
  const uint16_t* columns_;
  const uint16_t* values_;
  int64_t rows_;
  int64_t in_features_;
};

}  // namespace taper
