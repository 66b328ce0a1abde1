// The arithmetic of the nested solver for a group of rows. Every element is computed in one fixed order with fused
// multiply-adds where written, so instruction sets and thread counts give the same codes.
//
// With H = M M^T, M upper triangular, and F = M^-1, the sweep leaves Q - W = E F for its scaled errors E, so
//   (W - Q) H (W - Q)^T = E E^T and the gradient (W - Q) H = -E M^T,
// which is half the terms of a product with H, as M^T is lower triangular.
//
// A column needs its gradient when a pass comes to it and at no other time. So a block of columns hands its moves to
// the columns ahead only. The next pass goes the other way: those behind are ahead then, and get both passes' moves at
// once. What scales and errors need of whole rows follows each move.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "apis/solver.hpp"
#include "apis/solver_clones.hpp"
#include "apis/solver_product.hpp"
#include "apis/solver_tree.hpp"

namespace taper {
namespace {

constexpr int64_t kGroup = 64;  // rows solved together, so that a block of H is read once for all of them
constexpr int64_t kBunch = 8;   // rows that go through a slice together: enough to hide latencies, and 7 KB of lines
constexpr int64_t kBlock = kProductTerms;    // columns between two updates of all others (GPTQ's lazy batches)
constexpr int64_t kSlice = kProductColumns;  // columns of a block between two updates of the block: one cache line

// Lines of zeros, each at a cache line.
class Lines {
 public:
  Lines(int64_t lines, int64_t stride) : stride_(stride), bytes_(static_cast<size_t>(lines * stride) * sizeof(float)) {
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes_)));
    if (!data_) throw std::bad_alloc();
    clear();
  }

  float* operator[](int64_t line) { return data_.get() + line * stride_; }
  void clear() { std::memset(data_.get(), 0, bytes_); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  int64_t stride_;
  size_t bytes_;
  std::unique_ptr<float[], Free> data_;
};

// Adds factors[l] row to kSlice columns of the line of each level.
TAPER_CLONES void spread(float* lines, int64_t stride, const float* factors, int levels, const float* row) {
  for (int l = 0; l < levels; ++l) {
    float* line = lines + l * stride;
    for (int64_t j = 0; j < kSlice; ++j) line[j] = __builtin_fmaf(factors[l], row[j], line[j]);
  }
}

// Nearest float16, as a float; ties to even.
float round_to_half(float x) {
  if (std::fabs(x) < 6.103515625e-5f) return std::rint(x * 16777216.0f) * (1.0f / 16777216.0f);  // subnormal: 2^-24
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0xfffu + ((bits >> 13) & 1u);
  bits &= ~0x1fffu;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// What a row needs at each width.
struct RowState {
  float scales[kSolverLevels];
  float inverses[kSolverLevels];  // of the scales; 0 where the scale is
  float weights[kSolverLevels];   // importance, in units of the scales
  double cross[kSolverLevels];    // w H q^T
  double errors[kSolverLevels];   // (w - q) H (w - q)^T
  double energy;                  // w H w^T
};

// One group of rows; line level * height + row of the work arrays belongs to one row at one width.
class Group {
 public:
  Group(const SolverProblem& p, const SolverResult& result, int64_t begin, int64_t rows)
      : p_(p),
        result_(result),
        tree_(p.values, p.min_bits, p.max_bits),
        begin_(begin),
        rows_(rows),
        height_((rows + kProductLines - 1) / kProductLines * kProductLines),
        levels_(tree_.levels()),
        lines_(levels_ * height_),
        // An odd number of cache lines: the same column of all lines would fall on a few sets of the cache else.
        stride_(((p.cols / 16 + 1) | 1) * 16),
        values_(lines_, stride_),
        gradient_(lines_, stride_),
        pending_(lines_, stride_),
        weighted_(height_, stride_),
        fresh_(lines_, kBlock),
        states_(static_cast<size_t>(rows)) {}

  void solve() {
    load();
    sweep();
    measure();
    if (p_.passes > 0) find_gradient();
    for (int pass = 0; pass < p_.passes; ++pass) {
      refit();
      descend(pass % 2 == 1);
    }
    refit();
    store();
  }

 private:
  uint8_t& code(int64_t row, int64_t col) { return result_.codes[(begin_ + row) * p_.cols + col]; }
  int64_t line(int level, int64_t row) const { return level * height_ + row; }
  RowState& state(int64_t row) { return states_[static_cast<size_t>(row)]; }

  void load() {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int l = 0; l < levels_; ++l) {
        set_scale(l, r, result_.scales[l * p_.rows + begin_ + r]);
        std::memcpy(gradient_[line(l, r)], p_.weights + (begin_ + r) * p_.cols,
                    static_cast<size_t>(p_.cols) * sizeof(float));
      }
    }
    for (int64_t c = 0; c < p_.cols; c += kBlock)
      add_dense({weighted_[0], stride_, gradient_[0] + c, stride_, p_.hessian + c * p_.cols, p_.cols, height_,
                 std::min(kBlock, p_.cols - c), p_.cols});
  }

  void set_scale(int level, int64_t row, float scale) {
    state(row).scales[level] = scale;
    state(row).inverses[level] = scale > 0.0f ? 1.0f / scale : 0.0f;
    state(row).weights[level] = p_.importance[level] * scale * scale;
  }

  // The leaf for targets[level], in the units of the weights.
  int choose(int64_t row, const float* targets) {
    float normal[kSolverLevels];
    for (int l = 0; l < levels_; ++l) normal[l] = targets[l] * state(row).inverses[l];
    return tree_.nearest(normal, state(row).weights);
  }

  // GPTQ (arXiv 2210.17323, algorithm 1) with one compensated copy of the remaining columns per width, which lies in
  // gradient_; the errors E, of the opposite sign to GPTQ's, are left in pending_.
  void sweep() {
    for (int64_t c0 = 0; c0 < p_.cols; c0 += kBlock) {
      const int64_t c1 = std::min(c0 + kBlock, p_.cols);
      for (int64_t s0 = c0; s0 < c1; s0 += kSlice) {
        const int64_t s1 = std::min(s0 + kSlice, c1);
        for (int64_t r = 0; r < rows_; r += kBunch)
          for (int64_t c = s0; c < s1; ++c) sweep_column(r, std::min(r + kBunch, rows_), c, s0, s1);
        add_dense(onto(p_.factor, s0, s1, s1, c1));
      }
      add_dense(onto(p_.factor, c0, c1, c1, p_.cols));
    }
  }

  void sweep_column(int64_t begin, int64_t end, int64_t c, int64_t s0, int64_t s1) {
    const float* factor = p_.factor + c * p_.cols;
    const float inverse = 1.0f / factor[c];
    alignas(64) float row[kSlice] = {};
    for (int64_t j = c + 1; j < s1; ++j) row[j - s0] = factor[j];
    for (int64_t r = begin; r < end; ++r) {
      const RowState& at = state(r);
      float targets[kSolverLevels], errors[kSolverLevels];
      for (int l = 0; l < levels_; ++l) targets[l] = gradient_[line(l, r)][c];
      const int leaf = choose(r, targets);
      code(r, c) = static_cast<uint8_t>(leaf);
      for (int l = 0; l < levels_; ++l) {
        const float value = at.scales[l] * tree_.values(leaf)[l];
        values_[line(l, r)][c] = value;
        errors[l] = (value - targets[l]) * inverse;
        pending_[line(l, r)][c] = errors[l];
      }
      spread(gradient_[r] + s0, height_ * stride_, errors, levels_, row);
    }
  }

  // What pending_'s columns [from, to) add to columns [begin, end) of the gradient by those rows of a square matrix.
  Product onto(const float* square, int64_t from, int64_t to, int64_t begin, int64_t end) {
    return {gradient_[0] + begin,
            stride_,
            pending_[0] + from,
            stride_,
            square + from * p_.cols + begin,
            p_.cols,
            lines_,
            to - from,
            end - begin};
  }

  // What the scales are fitted from, after the sweep.
  void measure() {
    for (int64_t r = 0; r < rows_; ++r) {
      const float* w = p_.weights + (begin_ + r) * p_.cols;
      const float* weighted = weighted_[r];
      RowState& at = state(r);
      at.energy = 0.0;
      for (int64_t c = 0; c < p_.cols; ++c) at.energy += static_cast<double>(w[c]) * weighted[c];
      for (int l = 0; l < levels_; ++l) {
        const float* q = values_[line(l, r)];
        const float* errors = pending_[line(l, r)];
        at.cross[l] = at.errors[l] = 0.0;
        for (int64_t c = 0; c < p_.cols; ++c) {
          at.cross[l] += static_cast<double>(weighted[c]) * q[c];
          at.errors[l] += static_cast<double>(errors[c]) * errors[c];
        }
      }
    }
  }

  // -E M^T: all of the gradient, nothing is pending after it.
  void find_gradient() {
    gradient_.clear();
    for (int64_t line = 0; line < lines_; ++line)
      for (int64_t c = 0; c < p_.cols; ++c) pending_[line][c] = -pending_[line][c];
    for (int64_t c0 = 0; c0 < p_.cols; c0 += kBlock) {
      const int64_t c1 = std::min(c0 + kBlock, p_.cols);
      add_dense(onto(p_.root, c0, c1, 0, c1));
    }
    pending_.clear();
  }

  // One pass of coordinate descent over sum_l importance_l (w - q_l) H (w - q_l)^T.
  void descend(bool backward) {
    const int64_t blocks = (p_.cols + kBlock - 1) / kBlock;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t c0 = (backward ? blocks - 1 - i : i) * kBlock, c1 = std::min(c0 + kBlock, p_.cols);
      descend_block(c0, c1, backward);
      add_sparse(onto(p_.hessian, c0, c1, backward ? 0 : c1, backward ? c0 : p_.cols));
      for (int64_t line = 0; line < lines_; ++line) std::copy_n(fresh_[line], c1 - c0, pending_[line] + c0);
    }
  }

  // Leaves this pass's moves in fresh_ and adds them to pending_.
  void descend_block(int64_t c0, int64_t c1, bool backward) {
    const int64_t slices = (c1 - c0 + kSlice - 1) / kSlice;
    fresh_.clear();
    for (int64_t i = 0; i < slices; ++i) {
      const int64_t s0 = c0 + (backward ? slices - 1 - i : i) * kSlice, s1 = std::min(s0 + kSlice, c1);
      for (int64_t r = 0; r < rows_; r += kBunch)
        for (int64_t c = s0; c < s1; ++c) descend_column(r, std::min(r + kBunch, rows_), c, s0, s1, c0);
      for (int64_t line = 0; line < lines_; ++line)
        for (int64_t c = s0; c < s1; ++c) pending_[line][c] += fresh_[line][c - c0];
      add_sparse(onto(p_.hessian, s0, s1, backward ? c0 : s1, backward ? s0 : c1));
    }
  }

  void descend_column(int64_t begin, int64_t end, int64_t c, int64_t s0, int64_t s1, int64_t c0) {
    const float* hessian = p_.hessian + c * p_.cols;
    const float diagonal = hessian[c], inverse = 1.0f / diagonal;
    alignas(64) float row[kSlice] = {};
    std::copy(hessian + s0, hessian + s1, row);
    for (int64_t r = begin; r < end; ++r) {
      RowState& at = state(r);
      float targets[kSolverLevels], moves[kSolverLevels];
      for (int l = 0; l < levels_; ++l) targets[l] = values_[line(l, r)][c] + gradient_[line(l, r)][c] * inverse;
      const int leaf = choose(r, targets);
      if (leaf == code(r, c)) continue;
      code(r, c) = static_cast<uint8_t>(leaf);
      for (int l = 0; l < levels_; ++l) {
        float& value = values_[line(l, r)][c];
        const float next = at.scales[l] * tree_.values(leaf)[l], move = value - next;
        value = next;
        moves[l] = fresh_[line(l, r)][c - c0] = move;
        at.cross[l] -= static_cast<double>(move) * weighted_[r][c];
        at.errors[l] += move * (2.0 * gradient_[line(l, r)][c] + static_cast<double>(move) * diagonal);
      }
      spread(gradient_[r] + s0, height_ * stride_, moves, levels_, row);
    }
  }

  // The scale of least error for the present codes: s = (w H v) / (v H v), v the values at scale 1.
  void refit() {
    if (!p_.refit_scales) return;
    for (int64_t r = 0; r < rows_; ++r)
      for (int l = 0; l < levels_; ++l) refit_line(l, r);
  }

  void refit_line(int l, int64_t r) {
    RowState& at = state(r);
    const double square = at.errors[l] - at.energy + 2.0 * at.cross[l];  // q H q^T
    if (!(at.cross[l] > 0.0 && square > 0.0)) return;
    const float before = at.scales[l];
    const float after = round_to_half(static_cast<float>(before * (at.cross[l] / square)));
    if (!(after > 0.0f) || after == before) return;
    set_scale(l, r, after);
    const float ratio = after / before;
    const double growth = static_cast<double>(ratio) - 1.0, rest = at.energy - at.errors[l] - at.cross[l];
    at.errors[l] += growth * (growth * square - 2.0 * rest);  // rest is (w - q) H q^T
    at.cross[l] *= ratio;
    float *q = values_[line(l, r)], *g = gradient_[line(l, r)], *moves = pending_[line(l, r)];
    const float* weighted = weighted_[r];
    for (int64_t c = 0; c < p_.cols; ++c) {
      q[c] *= ratio;
      g[c] = ratio * g[c] + (1.0f - ratio) * weighted[c];
      moves[c] *= ratio;
    }
  }

  void store() {
    for (int64_t r = 0; r < rows_; ++r) {
      result_.energies[begin_ + r] = static_cast<float>(state(r).energy);
      for (int l = 0; l < levels_; ++l) {
        result_.scales[l * p_.rows + begin_ + r] = state(r).scales[l];
        result_.errors[l * p_.rows + begin_ + r] = static_cast<float>(state(r).errors[l]);
      }
    }
  }

  const SolverProblem& p_;
  const SolverResult& result_;
  SolverTree tree_;
  int64_t begin_;
  int64_t rows_;
  int64_t height_;
  int levels_;
  int64_t lines_;
  int64_t stride_;
  Lines values_;    // dequantised, (levels * height, cols)
  Lines gradient_;  // what of (W - Q) H has reached each column, (levels * height, cols); in the sweep, its copies
  Lines pending_;   // the sweep's errors, then the last pass's moves, (levels * height, cols)
  Lines weighted_;  // W H, (height, cols)
  Lines fresh_;     // this pass's moves in a block, (levels * height, kBlock)
  std::vector<RowState> states_;
};

}  // namespace

void solve_rows(const SolverProblem& problem, const SolverResult& result, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kGroup) Group(problem, result, row, std::min(kGroup, end - row)).solve();
}

}  // namespace taper
