#include <vector>

#include "kernels/reference/reference.hpp"

namespace taper::reference {

namespace {

// docs/format.md, "A plane": bit g of byte j of a block of V bytes is the column V * g + j of the block.
// Calls visit(column, code) for every column of a row.
template <class Visit>
void for_each_code(const PlanesView& weights, int64_t row, const Visit& visit) {
  const int64_t stride = weights.cols / 8;
  int64_t begin = 0;
  for (int64_t width = 512; begin < weights.cols;) {
    if (weights.cols - begin < width) {
      width /= 2;
      continue;
    }
    for (int64_t column = 0; column < width; ++column) {
      const int64_t bytes = width / 8, g = column / bytes, j = column % bytes;
      int code = 0;
      for (int p = 0; p < weights.bits; ++p) {
        code = code << 1 | ((weights.planes[p][row * stride + begin / 8 + j] >> g) & 1);
      }
      visit(begin + column, code);
    }
    begin += width;
  }
}

}  // namespace

void planes_unpack(const PlanesView& weights, int64_t row, int8_t* out) {
  const int8_t* table = weights.table + row * weights.table_stride;
  for_each_code(weights, row, [&](int64_t column, int code) { out[column] = table[code]; });
}

void planes_gemv(const PlanesView& weights, const ActivationsView& inputs, const OutputView& output, int64_t row_begin,
                 int64_t row_end) {
  thread_local std::vector<int32_t> values;
  values.resize(weights.cols);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int8_t* table = weights.table + row * weights.table_stride;
    for_each_code(weights, row, [&](int64_t column, int code) {
      values[column] =
          weights.low_table == nullptr ? table[code] : (table[code] << kValueShift) + weights.low_table[code];
    });
    for (int64_t t = 0; t < inputs.tokens; ++t) {
      int64_t sum = 0;
      for (int64_t j = 0; j < weights.cols; ++j) {
        const int64_t at = t * weights.cols + j, high = inputs.q[at];
        sum += values[j] * (inputs.low == nullptr ? high : (high << kInputShift) + inputs.low[at]);
      }
      const float alpha = inputs.scale[t] * weights.level_scale;
      float y = static_cast<float>(sum) * (weights.row_scale[row] * alpha);
      if (weights.bias != nullptr) y = y + weights.bias[row];
      const int64_t at = output.at(t, row);
      if (output.residual != nullptr) y = output.residual[at] + y;
      output.out[at] = y;
    }
  }
}

void planes_gemm(const PlanesView& weights, const ActivationsView& inputs, const OutputView& output, int64_t row_begin,
                 int64_t row_end) {
  planes_gemv(weights, inputs, output, row_begin, row_end);
}

}  // namespace taper::reference
