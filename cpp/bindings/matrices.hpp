// The matrices of Python: views of arrays that they keep alive.
#pragma once

#include <algorithm>
#include <deque>
#include <optional>

#include "apis/check.hpp"
#include "apis/outliers.hpp"
#include "apis/planes.hpp"
#include "bindings/buffers.hpp"

namespace taper {

// A matrix and the arrays that it points into.
class Planes {
 public:
  Planes(nb::sequence planes, nb::dict values, nb::dict level_scales, nb::handle row_scales, nb::handle bias,
         int64_t in_features) {
    PlanesParts parts;
    parts.in_features = in_features;
    Buffer& scales = keep(borrow<float>(row_scales, "row_scales", 2));
    parts.row_scales = scales.as<float>();
    parts.num_scale_rows = scales.shape(0);
    parts.rows = scales.shape(1);
    for (nb::handle plane : planes) parts.planes.push_back(checked_plane(plane, parts));
    for (auto [bits, table] : values) {
      parts.values[nb::cast<int>(bits)] = level_values(table, parts.rows);
    }
    for (auto [bits, scale] : level_scales) parts.level_scales[nb::cast<int>(bits)] = nb::cast<float>(scale);
    if (!bias.is_none()) {
      Buffer& biases = keep(borrow<float>(bias, "bias", -1));
      parts.num_bias_rows = biases.ndim() == 2 ? biases.shape(0) : 1;
      require(biases.ndim() <= 2 && biases.size() == parts.num_bias_rows * parts.rows, "bias has ", biases.size(),
              " elements, expected ", parts.rows, ", or so many for each width");
      parts.bias = biases.as<float>();
    }
    matrix_.emplace(std::move(parts));
  }

  Planes(const Planes&) = delete;

  const PlanedMatrix& matrix() const { return *matrix_; }

 private:
  Buffer& keep(Buffer buffer) { return buffers_.emplace_back(std::move(buffer)); }

  const uint8_t* checked_plane(nb::handle plane, const PlanesParts& parts) {
    Buffer& bytes = keep(borrow<uint8_t>(plane, "a plane", 2));
    const int64_t stride = padded_cols(parts.in_features) / 8;
    require(bytes.shape(0) == parts.rows && bytes.shape(1) == stride, "a plane has shape (", bytes.shape(0), ", ",
            bytes.shape(1), "), expected (", parts.rows, ", ", stride, ")");
    return bytes.as<uint8_t>();
  }

  LevelValues level_values(nb::handle table, int64_t rows) {
    Buffer entries(table, "values", {Dtype::i8, Dtype::i16}, -1, false, true);
    const bool wide = entries.dtype() == Dtype::i16;
    require(entries.ndim() == 1 || (entries.ndim() == 2 && !wide && entries.shape(0) == rows), "values of ",
            wide ? "int16" : "int8", " have ", entries.ndim(), " dimensions, expected 1, or int8 (", rows, ", 2^bits)");
    LevelValues made;
    made.size = entries.shape(entries.ndim() - 1);
    if (entries.ndim() == 2) {
      made.tables = entries.as<int8_t>();
      made.stride = entries.stride_bytes(0);
      keep(std::move(entries));
    } else if (wide) {
      made.shared.assign(entries.as<int16_t>(), entries.as<int16_t>() + made.size);
    } else {
      made.shared.assign(entries.as<int8_t>(), entries.as<int8_t>() + made.size);
    }
    return made;
  }

  std::deque<Buffer> buffers_;
  std::optional<PlanedMatrix> matrix_;
};

// The outliers and the arrays that they point into.
class HeldOutliers {
 public:
  HeldOutliers(nb::handle starts, nb::handle columns, nb::handle values, int64_t in_features)
      : starts_(borrow<int32_t>(starts, "starts", 1)),
        columns_(columns, "columns", {Dtype::u16}, 1),
        values_(values, "values", {Dtype::f16}, 1),
        outliers_(starts_.as<int32_t>(), starts_.size() - 1, columns_.as<uint16_t>(), values_.as<uint16_t>(),
                  counted(columns_, values_), in_features) {}

  HeldOutliers(const HeldOutliers&) = delete;

  const Outliers& outliers() const { return outliers_; }

 private:
  static int64_t counted(const Buffer& columns, const Buffer& values) {
    require_size(columns, "columns", values.size());
    return values.size();
  }

  Buffer starts_;
  Buffer columns_;
  Buffer values_;
  Outliers outliers_;
};

}  // namespace taper
