// Runs every operation of every instruction set of this machine (kernel_checks.cpp), and what has no instruction set on
// one thread and on several, on heap arrays of exactly the size that it may touch. Built with the sanitisers
// (CMakePresets.json, "asan"), which see a byte too far.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "apis/outliers.hpp"
#include "apis/planes.hpp"
#include "apis/row_tables.hpp"
#include "apis/solver.hpp"
#include "checks.hpp"
#include "runtime/thread_pool.hpp"

namespace {

using namespace taper;
using namespace taper::checks;

// For what has no instruction set: its result may not depend on the threads.
template <class Operation>
void compare_threads(const std::string& what, const Operation& operation) {
  set_num_threads(1);
  const auto expected = operation();
  set_num_threads(3);
  if (operation() == expected) return;
  std::printf("%s: 3 threads differ from 1\n", what.c_str());
  ++failures;
}

// A matrix with scales and a bias for each width: every width must be that of a matrix with its rows alone.
void check_widths(int64_t in_features, int64_t tokens) {
  const int64_t rows = 21, cols = padded_cols(in_features), levels = kMaxBits;
  std::vector<std::vector<uint8_t>> planes;
  PlanesParts parts{{}, rows, in_features, {}, {}, nullptr, levels, nullptr, levels};
  for (int bits = 1; bits <= kMaxBits; ++bits) {
    parts.planes.push_back(planes.emplace_back(bytes<uint8_t>(rows * cols / 8)).data());
    LevelValues values{{}, nullptr, 0, int64_t{1} << bits};
    for (int64_t i = 0; i < values.size; ++i)
      values.shared.push_back(static_cast<int16_t>(bits < kLeastWideBits ? i - values.size / 2 : 100 * i - 12000));
    parts.values[bits] = values;
    parts.level_scales[bits] = 0.5f;
  }
  const std::vector<float> scales = floats(levels * rows), biases = floats(levels * rows);
  const std::vector<float> x = floats(tokens * in_features);
  parts.row_scales = scales.data();
  parts.bias = biases.data();
  const PlanedMatrix matrix(parts);
  for (const int magnitude_bits : {kNarrowMagnitudeBits, kMaxMagnitudeBits}) {
    const Activations inputs(tokens, cols, magnitude_bits > kNarrowMagnitudeBits);
    prepare(x.data(), in_features, {false, nullptr, 0.0f}, {nullptr, 1}, magnitude_bits, inputs);
    for (int bits = 1; bits <= kMaxBits; ++bits) {
      const std::vector<float> scale(scales.begin() + (bits - 1) * rows, scales.begin() + bits * rows);
      const std::vector<float> bias(biases.begin() + (bits - 1) * rows, biases.begin() + bits * rows);
      PlanesParts alone = parts;
      alone.row_scales = scale.data();
      alone.bias = bias.data();
      alone.num_scale_rows = alone.num_bias_rows = 1;
      std::vector<float> out(tokens * rows), expected(tokens * rows);
      matrix.matmul(inputs, bits, nullptr, out.data());
      PlanedMatrix(alone).matmul(inputs, bits, nullptr, expected.data());
      if (out == expected) continue;
      std::printf("%d bits have another scale or bias than their own\n", bits);
      ++failures;
    }
  }
}

// Rows with 0, 1, 2, ... outliers, the last one in the last column, added to activations of both kinds.
void check_outliers(int64_t in_features, int64_t tokens) {
  const int64_t rows = 9;
  std::vector<int32_t> starts{0};
  std::vector<uint16_t> columns, values;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t left = std::min(row, in_features); left > 0; --left) {
      columns.push_back(static_cast<uint16_t>(in_features - left));
      values.push_back(static_cast<uint16_t>(0x3c00 + random_bits() % 1024));  // 1 to 2 as float16
    }
    starts.push_back(static_cast<int32_t>(columns.size()));
  }
  const Outliers outliers(starts.data(), rows, columns.data(), values.data(), starts.back(), in_features);
  const std::vector<float> x = floats(tokens * in_features);
  const std::vector<int64_t> indices{rows - 1, 0, rows - 1};
  for (const int magnitude_bits : {kNarrowMagnitudeBits, kMaxMagnitudeBits}) {
    compare_threads("outliers of " + std::to_string(in_features) + " columns", [&] {
      const Activations inputs(tokens, padded_cols(in_features), magnitude_bits > kNarrowMagnitudeBits);
      prepare(x.data(), in_features, {false, nullptr, 0.0f}, {nullptr, 1}, magnitude_bits, inputs);
      std::vector<float> out(tokens * rows, 1.0f), read(indices.size() * in_features, 1.0f);
      outliers.add_product(inputs, out.data());
      outliers.add_rows(indices.data(), static_cast<int64_t>(indices.size()), read.data());
      return std::tuple(out, read);
    });
  }
}

// Ascending values of all widths, one after another.
std::vector<float> values_of(int min_bits, int max_bits) {
  std::vector<float> out;
  for (int bits = min_bits; bits <= max_bits; ++bits)
    for (int code = 0; code < 1 << bits; ++code) out.push_back((2.0f * code + 1.0f) / (1 << bits) - 1.0f);
  return out;
}

// cols beside a multiple of the solver's blocks and tiles, rows beside one of its groups. With a scale that is no
// number every code is as bad as another; the search must stay within the tree.
void check_solver(int64_t rows, int64_t cols, int min_bits, int max_bits) {
  const int64_t levels = max_bits - min_bits + 1;
  const std::vector<float> weights = floats(rows * cols), noise = floats(cols * cols);
  std::vector<float> hessian(cols * cols), factor(cols * cols);
  for (int64_t i = 0; i < cols; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const float coupling = 0.1f / static_cast<float>(cols) * noise[std::min(i, j) * cols + std::max(i, j)];
      hessian[i * cols + j] = i == j ? 1.0f : coupling;
      factor[i * cols + j] = i == j ? 1.0f : i < j ? -0.5f * coupling : 0.0f;
    }
  }
  const std::vector<float> values = values_of(min_bits, max_bits), importance(levels, 2.0f);
  const SolverProblem problem{weights.data(),
                              hessian.data(),
                              factor.data(),
                              values.data(),
                              importance.data(),
                              rows,
                              cols,
                              min_bits,
                              max_bits,
                              2,
                              true};
  const auto solved = [&](float scale) {
    std::vector<uint8_t> codes(rows * cols);
    std::vector<float> scales(levels * rows, scale), errors(levels * rows);
    solve(problem, {codes.data(), scales.data(), errors.data()});
    return std::tuple(codes, scales, errors);
  };
  compare_threads("solver of " + std::to_string(cols) + " columns", [&] { return solved(2.0f); });
  solved(std::nanf(""));
}

void check_row_tables(int64_t cols, int min_bits, int max_bits, bool greedy) {
  const int64_t rows = 3, count = (int64_t{2} << max_bits) - (int64_t{1} << min_bits);
  std::vector<float> weights = floats(rows * cols), sensitivity = floats(rows * cols);
  for (float& x : sensitivity) x = std::abs(x);
  for (int64_t j = 0; j < cols; ++j) weights[j] = 0.0f;  // a row without two distinct weights
  const std::vector<float> importance(max_bits - min_bits + 1, 1.0f);
  for (const int64_t sensitivity_rows : {int64_t{1}, rows}) {
    const std::vector<float> counted(sensitivity.begin(), sensitivity.begin() + sensitivity_rows * cols);
    compare_threads("row tables of " + std::to_string(cols) + " columns", [&] {
      std::vector<uint8_t> codes(rows * cols);
      std::vector<float> values(rows * count);
      fit_row_tables({weights.data(), counted.data(), sensitivity_rows, importance.data(), rows, cols, min_bits,
                      max_bits, 32, greedy, 1},
                     {codes.data(), values.data()});
      return std::tuple(codes, values);
    });
  }
}

// Phases of 0 to 7 pieces; each piece counts itself, and no phase may begin before those ahead of it are whole.
class Counting final : public Program {
 public:
  explicit Counting(int64_t phases) : counts_(phases * 8) {}

  static int64_t pieces(int64_t phase) { return phase * 5 % 8; }

  int64_t begin(int64_t phase) override {
    for (int64_t p = 0; p < phase; ++p) wrong_ += total(p) != pieces(p);
    return pieces(phase);
  }

  void run(int64_t phase, int64_t piece) override {
    if (phase == fails_at && piece == 2) throw std::runtime_error("stop");
    counts_[phase * 8 + piece].fetch_add(1, std::memory_order_relaxed);
  }

  int64_t total(int64_t phase) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < 8; ++i) sum += counts_[phase * 8 + i].load(std::memory_order_relaxed);
    return sum;
  }
  int wrong() const { return wrong_; }

  int64_t fails_at = -1;

 private:
  std::vector<std::atomic<int>> counts_;
  int wrong_ = 0;
};

void check_programs(int threads) {
  constexpr int64_t kPhases = 40;
  set_num_threads(threads);
  const auto expect = [&](bool holds, const char* what) {
    if (holds) return;
    std::printf("program on %d threads: %s\n", threads, what);
    ++failures;
  };
  for (int round = 0; round < 200; ++round) {
    Counting program(kPhases);
    run_program(program, kPhases, threads);
    expect(program.wrong() == 0, "a phase began too early");
    for (int64_t p = 0; p < kPhases; ++p) expect(program.total(p) == Counting::pieces(p), "a piece ran not once");
  }
  Counting broken(kPhases);
  broken.fails_at = 15;  // of three pieces
  bool thrown = false;
  try {
    run_program(broken, kPhases, threads);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect(thrown, "the exception of a piece was lost");
  for (int64_t p = 16; p < kPhases; ++p) expect(broken.total(p) == 0, "a phase ran after an exception");
}

}  // namespace

int main() {
  check_kernels();
  for (const int threads : {1, 2, 5}) check_programs(threads);
  for (const int64_t in_features : {1, 33, 64, 172, 576}) {
    for (const int64_t tokens : {1, 3, 9}) {
      check_widths(in_features, tokens);
      check_outliers(in_features, tokens);
    }
  }
  for (const int64_t cols : {1, 31, 32, 128, 129, 161, 288}) {
    for (const int64_t rows : {1, 3, 8, 11}) {
      for (const auto& [min_bits, max_bits] : {std::pair(1, 1), {1, 8}, {2, 6}, {4, 4}, {8, 8}})
        check_solver(rows, cols, min_bits, max_bits);
    }
  }
  for (const int64_t cols : {1, 3, 64, 300}) {
    for (const auto& [min_bits, max_bits] : {std::pair(1, 4), {2, 6}, {3, 3}}) {
      for (const bool greedy : {false, true}) check_row_tables(cols, min_bits, max_bits, greedy);
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
