#include "apis/planes.hpp"

#include <algorithm>
#include <utility>

#include "apis/check.hpp"
#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

constexpr int64_t kPsPerValue = 300;  // of a dequantised row

void check_value(int bits, int value, int most) {
  require(value >= -most && value <= most, "values of ", bits, " bits hold ", value, ", outside ", -most, "..", most);
}

void check_range(int bits, const LevelValues& values, int64_t rows) {
  for (const int16_t value : values.shared) check_value(bits, value, bits < kLeastWideBits ? kNarrowValue : kWideValue);
  if (values.tables == nullptr) return;
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* table = values.tables + row * values.stride;
    for (int64_t i = 0; i < values.size; ++i) check_value(bits, table[i], kNarrowValue);
  }
}

void check_levels(const PlanesParts& parts) {
  require(!parts.values.empty(), "a planed matrix needs the values of at least one width");
  int expected = parts.values.begin()->first;
  require(expected >= 1, "values are for ", expected, " bits, the least width is 1");
  for (const auto& [bits, values] : parts.values) {
    require(bits == expected, "values skip ", expected, " bits, the widths must be consecutive");
    require(bits <= kMaxBits, "values are for ", bits, " bits, the largest width is ", kMaxBits);
    require(values.size == int64_t{1} << bits, "values of ", bits, " bits have ", values.size, " entries, expected ",
            1 << bits);
    check_range(bits, values, parts.rows);
    require(parts.level_scales.count(bits) == 1, "level_scales lacks ", bits, " bits");
    ++expected;
  }
  require(parts.level_scales.size() == parts.values.size(), "level_scales has ", parts.level_scales.size(),
          " widths, values have ", parts.values.size());
}

void check_parts(const PlanesParts& parts) {
  check_levels(parts);
  const int min_bits = parts.values.begin()->first, max_bits = parts.values.rbegin()->first;
  const int num_planes = static_cast<int>(parts.planes.size());
  require(num_planes >= min_bits && num_planes <= max_bits, "a matrix with values for ", min_bits, "..", max_bits,
          " bits has ", num_planes, " planes");
  require(parts.rows >= 1, "a matrix has ", parts.rows, " rows, expected at least 1");
  require(parts.in_features >= 1, "in_features is ", parts.in_features, ", expected at least 1");
  require(parts.in_features <= kMaxCols, "in_features is ", parts.in_features, ", expected at most ", kMaxCols);
  require(parts.bias == nullptr || parts.num_bias_rows == 1 ||
              parts.num_bias_rows == static_cast<int64_t>(parts.values.size()),
          "bias has ", parts.num_bias_rows, " rows, expected 1 or one for each of ", parts.values.size(), " widths");
  require(parts.num_scale_rows == 1 || parts.num_scale_rows == static_cast<int64_t>(parts.values.size()),
          "row_scales has ", parts.num_scale_rows, " rows, expected 1 or one for each of ", parts.values.size(),
          " widths");
}

}  // namespace

PlanedMatrix::PlanedMatrix(PlanesParts parts) : parts_(std::move(parts)) {
  check_parts(parts_);
  cols_ = padded_cols(parts_.in_features);
  min_bits_ = parts_.values.begin()->first;
  tables_.resize(parts_.values.size());
  for (const auto& [bits, values] : parts_.values) {
    Table& table = tables_[bits - min_bits_];
    const auto narrow = [](int16_t value) { return value >= -kNarrowValue && value <= kNarrowValue; };
    table.wide = !std::all_of(values.shared.begin(), values.shared.end(), narrow);
    for (size_t i = 0; i < values.shared.size(); ++i) {
      const int value = values.shared[i], high = table.wide ? (value + 64) >> kValueShift : value;
      table.values[i] = static_cast<int8_t>(high);
      if (table.wide) table.low[i] = static_cast<int8_t>(value - (high << kValueShift));
    }
  }
  for (int bits = min_bits_; bits <= static_cast<int>(parts_.planes.size()); ++bits) views_.push_back(made_view(bits));
}

const PlanesView& PlanedMatrix::view(int bits) const {
  require(bits >= min_bits_ && bits <= max_bits(), "bits ", bits, " is outside this matrix's ", min_bits_, "..",
          max_bits());
  return views_[static_cast<size_t>(bits - min_bits_)];
}

PlanesView PlanedMatrix::made_view(int bits) const {
  const int64_t level = bits - min_bits_;
  const float* row_scale = parts_.row_scales + (parts_.num_scale_rows == 1 ? 0 : level * parts_.rows);
  const float* bias =
      parts_.bias == nullptr ? nullptr : parts_.bias + (parts_.num_bias_rows == 1 ? 0 : level * parts_.rows);
  const LevelValues& own = parts_.values.at(bits);
  const Table& table = tables_[level];
  return {parts_.planes.data(),
          parts_.rows,
          cols_,
          bits,
          own.tables == nullptr ? table.values.data() : own.tables,
          row_scale,
          parts_.level_scales.at(bits),
          bias,
          own.stride,
          table.wide ? table.low.data() : nullptr};
}

void PlanedMatrix::matmul(const Activations& activations, int bits, const float* residual, float* out) const {
  const PlanesView& weights = view(bits);
  require(activations.cols() == cols_, "activations have ", activations.cols(), " columns, the matrix has ", cols_);
  const int64_t input_rows = activations.tokens() * (activations.wide() ? 2 : 1);
  const Kernels& table = kernels();
  const MatmulPlan plan = plan_matmul(weights.rows, cols_, bits, input_rows, table.gemm_inputs, num_threads());
  const auto kernel = plan.gemm ? table.planes_gemm : table.planes_gemv;
  const ActivationsView inputs = activations.view();
  const OutputView output{out, residual, weights.rows};
  parallel_for(weights.rows, plan.rows.chunk, plan.rows.threads,
               [&](int64_t begin, int64_t end) { kernel(weights, inputs, output, begin, end); });
}

void PlanedMatrix::read_row(const Kernels& kernels, int64_t index, const PlanesView& weights, float* out) const {
  thread_local std::vector<int8_t> memory;
  memory.resize(std::max<size_t>(memory.size(), static_cast<size_t>(2 * cols_)));
  int8_t *values = memory.data(), *low = values + cols_;
  kernels.planes_unpack(weights, index, values);
  if (weights.low_table != nullptr) {
    PlanesView low_weights = weights;
    low_weights.table = weights.low_table;
    kernels.planes_unpack(low_weights, index, low);
  }
  const float factor = weights.row_scale[index] * weights.level_scale;
  for (int64_t j = 0; j < parts_.in_features; ++j) {
    const int value = weights.low_table == nullptr ? values[j] : (values[j] << kValueShift) + low[j];
    out[j] = static_cast<float>(value) * factor;
  }
}

void PlanedMatrix::read_rows(const int64_t* indices, int64_t count, int bits, float* out) const {
  const PlanesView& weights = view(bits);
  for (int64_t i = 0; i < count; ++i) {
    require(indices[i] >= 0 && indices[i] < weights.rows, "row ", indices[i], " is outside the matrix's ", weights.rows,
            " rows");
  }
  const Kernels& table = kernels();
  const Plan plan = plan_items(count, cols_ * kPsPerValue, num_threads());
  parallel_for(count, plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) read_row(table, indices[i], weights, out + i * parts_.in_features);
  });
}

int64_t PlanedMatrix::bytes_read(int bits) const {
  const PlanesView& weights = view(bits);
  const int64_t table_bytes = weights.table_stride == 0 ? 0 : int64_t{1} << bits;
  const int64_t floats = weights.bias == nullptr ? 1 : 2;
  return weights.rows * (bits * cols_ / 8 + floats * static_cast<int64_t>(sizeof(float)) + table_bytes);
}

}  // namespace taper
