// The arithmetic of the nested solver for a group of rows. Every element is computed in one fixed order with fused
// multiply-adds where written, so instruction sets and thread counts give the same codes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "apis/solver.hpp"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)  // musl has no ifunc
#define TAPER_CLONES __attribute__((target_clones("default", "fma", "avx512f")))
#else
#define TAPER_CLONES
#endif

namespace taper {
namespace {

constexpr int kMaxLevels = 8;
constexpr int64_t kGroup = 32;   // rows solved together, so that a block of the factor is read once for all of them
constexpr int64_t kBlock = 128;  // columns between two updates of all columns to the right (GPTQ's lazy batches)
constexpr int64_t kTile = 64;    // columns of a product kept in registers: 4 by 64 are 16 of AVX-512's 32
constexpr int64_t kTileRows = 4;

// Indices t of the terms that some of `height` lines of a have: where codes stay, moves are zero, and at the narrow
// widths nine in ten codes stay in a pass.
int64_t used_terms(const float* a, int64_t a_stride, int64_t height, int64_t k, int32_t* terms) {
  int64_t count = 0;
  for (int64_t t = 0; t < k; ++t) {
    bool used = false;
    for (int64_t i = 0; i < height; ++i) used |= a[i * a_stride + t] != 0.0f;
    terms[count] = static_cast<int32_t>(t);
    count += used;
  }
  return count;
}

// A tile of the product below: kTileRows lines of out and a, kTile columns, b's packed.
TAPER_CLONES void add_tile(float* out, int64_t out_stride, const float* a, int64_t a_stride, const float* b,
                           const int32_t* terms, int64_t num_terms) {
  float sums[kTileRows][kTile];
  for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(sums[i], out + i * out_stride, sizeof sums[i]);
  for (int64_t u = 0; u < num_terms; ++u) {
    const int64_t t = terms[u];
    const float* source = b + t * kTile;
    for (int64_t i = 0; i < kTileRows; ++i) {
      const float factor = a[i * a_stride + t];
      for (int64_t j = 0; j < kTile; ++j) sums[i][j] = __builtin_fmaf(factor, source[j], sums[i][j]);
    }
  }
  for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(out + i * out_stride, sums[i], sizeof sums[i]);
}

// Copies k lines of kTile columns side by side. Returns whether any is not zero: of an untied embedding's moments only
// the diagonal's are.
TAPER_CLONES bool pack_tile(const float* b, int64_t b_stride, int64_t k, float* packed) {
  uint32_t any = 0;
  for (int64_t t = 0; t < k; ++t) {
    uint32_t words[kTile];
    std::memcpy(words, b + t * b_stride, sizeof words);
    for (int64_t j = 0; j < kTile; ++j) any |= words[j];
    std::memcpy(packed + t * kTile, words, sizeof words);
  }
  return any != 0;
}

// The same for what is left at the edges, element by element in the same order.
void add_edge(float* out, int64_t out_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
              const int32_t* terms, int64_t num_terms, int64_t height, int64_t width) {
  for (int64_t i = 0; i < height; ++i)
    for (int64_t u = 0; u < num_terms; ++u) {
      const float factor = a[i * a_stride + terms[u]];
      const float* source = b + terms[u] * b_stride;
      for (int64_t j = 0; j < width; ++j)
        out[i * out_stride + j] = __builtin_fmaf(factor, source[j], out[i * out_stride + j]);
    }
}

// out (m, n) += a (m, k) b (k, n), k <= kBlock; the terms of an element are summed in rising k.
void add_product(float* out, int64_t out_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                 int64_t m, int64_t k, int64_t n) {
  std::vector<int32_t> terms(static_cast<size_t>((m + kTileRows - 1) / kTileRows * kBlock));
  std::vector<int64_t> counts;
  for (int64_t r = 0; r < m; r += kTileRows)
    counts.push_back(
        used_terms(a + r * a_stride, a_stride, std::min(kTileRows, m - r), k, terms.data() + r / kTileRows * kBlock));
  // Lines of b are a power of two apart in most models, so that a tile's fall on few sets of the cache.
  alignas(64) float packed[kBlock * kTile];
  for (int64_t c = 0; c < n; c += kTile) {
    const int64_t width = std::min(kTile, n - c);
    if (width == kTile && !pack_tile(b + c, b_stride, k, packed)) continue;
    for (int64_t r = 0; r < m; r += kTileRows) {
      const int64_t height = std::min(kTileRows, m - r), group = r / kTileRows;
      const int32_t* used = terms.data() + group * kBlock;
      float* target = out + r * out_stride + c;
      const float* left = a + r * a_stride;
      if (width == kTile && height == kTileRows)
        add_tile(target, out_stride, left, a_stride, packed, used, counts[static_cast<size_t>(group)]);
      else
        add_edge(target, out_stride, left, a_stride, b + c, b_stride, used, counts[static_cast<size_t>(group)], height,
                 width);
    }
  }
}

// y (n) += factor * x (n).
TAPER_CLONES void add_scaled(float* y, const float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = __builtin_fmaf(factor, x[i], y[i]);
}

// Nodes of a level of the tree, at least: narrower levels are repeated, so that every loop has whole vectors.
constexpr int64_t kLanes = 16;
constexpr int64_t kMaxLeaves = 1 << 8;

// The values of each level in bit-reversed order, in which the children of all nodes of a level are two runs; a level
// of fewer than kLanes nodes repeated to that many.
struct ReversedLevels {
  alignas(64) float values[kMaxLevels][kMaxLeaves];
  int64_t widths[kMaxLevels];
  int levels;
};

// Index, in that order, of the leaf with the least sum over its path of weights[l] (targets[l] - value)^2, the first of
// equals. Each level adds its own term to its parents' costs.
TAPER_CLONES int64_t nearest_leaf(const ReversedLevels& tree, const float* targets, const float* weights) {
  alignas(64) float costs[2][kMaxLeaves];
  for (int64_t j = 0; j < kLanes; ++j) costs[1][j] = 0.0f;
  int64_t parents = kLanes;
  for (int l = 0; l < tree.levels; ++l) {
    const float target = targets[l], weight = weights[l];
    const float* before = costs[(l + 1) % 2];
    float* after = costs[l % 2];
    for (int64_t begin = 0; begin < tree.widths[l]; begin += parents)
      for (int64_t i = 0; i < parents; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) {
          const float error = target - tree.values[l][begin + i + j];
          after[begin + i + j] = __builtin_fmaf(weight * error, error, before[i + j]);
        }
    parents = tree.widths[l];
  }
  // Floats that are not below 0 are in the order of their bits, whose least compilers find lane by lane.
  const float* leaves = costs[(tree.levels - 1) % 2];
  int32_t lanes[kLanes];
  std::memcpy(lanes, leaves, sizeof lanes);
  for (int64_t i = kLanes; i < parents; i += kLanes) {
    int32_t bits[kLanes];
    std::memcpy(bits, leaves + i, sizeof bits);
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = std::min(lanes[j], bits[j]);
  }
  int32_t best = lanes[0];
  for (int64_t j = 1; j < kLanes; ++j) best = std::min(best, lanes[j]);
  for (int64_t i = 0;; i += kLanes) {
    int32_t bits[kLanes], first = kLanes;
    std::memcpy(bits, leaves + i, sizeof bits);
    for (int32_t j = 0; j < kLanes; ++j) first = std::min(first, bits[j] == best ? j : static_cast<int32_t>(kLanes));
    if (first < kLanes) return i + first;
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

// Finds the leaf with the least weighted sum of squared errors over its path by trying them all, level by level: at
// most 508 nodes, 16 at a time.
class Tree {
 public:
  Tree(const SolverProblem& p) : max_bits_(p.max_bits), levels_(p.max_bits - p.min_bits + 1) {
    const float* values = p.values;
    reversed_.levels = levels_;
    for (int l = 0; l < levels_; ++l) {
      const int bits = p.min_bits + l;
      values_[l] = values;
      reversed_.widths[l] = std::max(kLanes, int64_t{1} << bits);
      for (int node = 0; node < reversed_.widths[l]; ++node)
        reversed_.values[l][node] = values[reverse(node & ((1 << bits) - 1), bits)];
      values += int64_t{1} << bits;
    }
  }

  int levels() const { return levels_; }
  float value(int level, int leaf) const { return values_[level][leaf >> (levels_ - 1 - level)]; }

  int nearest(const float* targets, const float* weights) const {
    return reverse(static_cast<int>(nearest_leaf(reversed_, targets, weights)), max_bits_);
  }

 private:
  static int reverse(int code, int bits) {
    int reversed = 0;
    for (int i = 0; i < bits; ++i) reversed |= (code >> i & 1) << (bits - 1 - i);
    return reversed;
  }

  int max_bits_;
  int levels_;
  const float* values_[kMaxLevels] = {};
  ReversedLevels reversed_ = {};
};

// One group of rows; line level * rows + row of the work arrays belongs to one row at one width.
class Group {
 public:
  Group(const SolverProblem& p, const SolverResult& result, int64_t begin, int64_t rows)
      : p_(p),
        result_(result),
        tree_(p),
        begin_(begin),
        rows_(rows),
        levels_(tree_.levels()),
        lines_(levels_ * rows),
        // An odd number of cache lines: the same column of all lines would fall on a few sets of the cache else.
        stride_(((p.cols / 16 + 1) | 1) * 16),
        values_(static_cast<size_t>(lines_ * stride_)) {}

  void solve() {
    sweep();
    products();
    for (int pass = 0; pass < p_.passes; ++pass) {
      if (p_.refit_scales) refit();
      descend();
    }
    if (p_.refit_scales) refit();
    finish();
  }

 private:
  float& scale(int level, int64_t row) { return result_.scales[level * p_.rows + begin_ + row]; }
  uint8_t& code(int64_t row, int64_t col) { return result_.codes[(begin_ + row) * p_.cols + col]; }
  float* line(std::vector<float>& array, int level, int64_t row) {
    return array.data() + (level * rows_ + row) * stride_;
  }

  // The leaf for targets[level], in the units of the weights.
  int choose(int64_t row, const float* targets) {
    float normal[kMaxLevels], weights[kMaxLevels];
    for (int l = 0; l < levels_; ++l) {
      const float s = scale(l, row);
      normal[l] = s > 0.0f ? targets[l] / s : 0.0f;
      weights[l] = p_.importance[l] * s * s;
    }
    return tree_.nearest(normal, weights);
  }

  // GPTQ (arXiv 2210.17323, algorithm 1) with one compensated copy of the remaining columns per width.
  void sweep() {
    std::vector<float> work(values_.size());
    std::vector<float> errors(static_cast<size_t>(lines_ * kBlock));
    for (int l = 0; l < levels_; ++l)
      for (int64_t r = 0; r < rows_; ++r)
        std::memcpy(line(work, l, r), p_.weights + (begin_ + r) * p_.cols,
                    static_cast<size_t>(p_.cols) * sizeof(float));
    for (int64_t c0 = 0; c0 < p_.cols; c0 += kBlock) {
      const int64_t c1 = std::min(c0 + kBlock, p_.cols);
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = 0; r < rows_; ++r) sweep_one(work, errors, r, c, c0, c1);
      add_product(work.data() + c1, stride_, errors.data(), kBlock, p_.factor + c0 * p_.cols + c1, p_.cols, lines_,
                  c1 - c0, p_.cols - c1);
    }
  }

  void sweep_one(std::vector<float>& work, std::vector<float>& errors, int64_t r, int64_t c, int64_t c0, int64_t c1) {
    float targets[kMaxLevels];
    for (int l = 0; l < levels_; ++l) targets[l] = line(work, l, r)[c];
    const int leaf = choose(r, targets);
    code(r, c) = static_cast<uint8_t>(leaf);
    const float* factor = p_.factor + c * p_.cols;
    for (int l = 0; l < levels_; ++l) {
      const float value = scale(l, r) * tree_.value(l, leaf);
      line(values_, l, r)[c] = value;
      const float error = (value - targets[l]) / factor[c];  // minus GPTQ's error: add_product adds
      errors[static_cast<size_t>((l * rows_ + r) * kBlock + c - c0)] = error;
      add_scaled(line(work, l, r) + c + 1, factor + c + 1, error, c1 - c - 1);
    }
  }

  // weighted_ = W H, gradient_ = (W - Q) H.
  void products() {
    weighted_.assign(static_cast<size_t>(rows_ * stride_), 0.0f);
    gradient_.assign(values_.size(), 0.0f);
    add_all(weighted_, p_.weights + begin_ * p_.cols, p_.cols, rows_);
    add_all(gradient_, values_.data(), stride_, lines_);
    for (int l = 0; l < levels_; ++l)
      for (int64_t r = 0; r < rows_; ++r) {
        float* g = line(gradient_, l, r);
        const float* w = weighted_.data() + r * stride_;
        for (int64_t c = 0; c < p_.cols; ++c) g[c] = w[c] - g[c];
      }
  }

  void add_all(std::vector<float>& out, const float* a, int64_t a_stride, int64_t m) {
    for (int64_t c = 0; c < p_.cols; c += kBlock)
      add_product(out.data(), stride_, a + c, a_stride, p_.hessian + c * p_.cols, p_.cols, m,
                  std::min(kBlock, p_.cols - c), p_.cols);
  }

  // One pass of coordinate descent over sum_l importance_l (w - q_l) H (w - q_l)^T.
  void descend() {
    std::vector<float> moves(static_cast<size_t>(lines_ * kBlock));
    for (int64_t c0 = 0; c0 < p_.cols; c0 += kBlock) {
      const int64_t c1 = std::min(c0 + kBlock, p_.cols);
      std::fill(moves.begin(), moves.end(), 0.0f);
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = 0; r < rows_; ++r) descend_one(moves, r, c, c0, c1);
      const float* hessian = p_.hessian + c0 * p_.cols;
      add_product(gradient_.data(), stride_, moves.data(), kBlock, hessian, p_.cols, lines_, c1 - c0, c0);
      add_product(gradient_.data() + c1, stride_, moves.data(), kBlock, hessian + c1, p_.cols, lines_, c1 - c0,
                  p_.cols - c1);
    }
  }

  void descend_one(std::vector<float>& moves, int64_t r, int64_t c, int64_t c0, int64_t c1) {
    const float* hessian = p_.hessian + c * p_.cols;
    float targets[kMaxLevels];
    for (int l = 0; l < levels_; ++l) targets[l] = line(values_, l, r)[c] + line(gradient_, l, r)[c] / hessian[c];
    const int leaf = choose(r, targets);
    if (leaf == code(r, c)) return;
    code(r, c) = static_cast<uint8_t>(leaf);
    for (int l = 0; l < levels_; ++l) {
      float& value = line(values_, l, r)[c];
      const float next = scale(l, r) * tree_.value(l, leaf);
      const float move = value - next;
      if (move == 0.0f) continue;
      value = next;
      moves[static_cast<size_t>((l * rows_ + r) * kBlock + c - c0)] = move;
      add_scaled(line(gradient_, l, r) + c0, hessian + c0, move, c1 - c0);
    }
  }

  // The scale of least error for the present codes: s = (w H v) / (v H v), v the values at scale 1.
  void refit() {
    for (int l = 0; l < levels_; ++l)
      for (int64_t r = 0; r < rows_; ++r) {
        float* g = line(gradient_, l, r);
        float* q = line(values_, l, r);
        const float* w = weighted_.data() + r * stride_;
        double cross = 0.0, square = 0.0;
        for (int64_t c = 0; c < p_.cols; ++c) {
          cross += static_cast<double>(w[c]) * q[c];
          square += (static_cast<double>(w[c]) - g[c]) * q[c];
        }
        if (!(cross > 0.0 && square > 0.0)) continue;
        const float before = scale(l, r);
        const float after = round_to_half(static_cast<float>(before * (cross / square)));
        if (!(after > 0.0f)) continue;
        scale(l, r) = after;
        const float ratio = after / before;
        for (int64_t c = 0; c < p_.cols; ++c) {
          g[c] = w[c] - ratio * (w[c] - g[c]);
          q[c] *= ratio;
        }
      }
  }

  void finish() {
    for (int l = 0; l < levels_; ++l)
      for (int64_t r = 0; r < rows_; ++r) {
        const float* w = p_.weights + (begin_ + r) * p_.cols;
        const float* q = line(values_, l, r);
        const float* g = line(gradient_, l, r);
        double error = 0.0;
        for (int64_t c = 0; c < p_.cols; ++c) error += (static_cast<double>(w[c]) - q[c]) * g[c];
        result_.errors[l * p_.rows + begin_ + r] = static_cast<float>(error);
      }
  }

  const SolverProblem& p_;
  const SolverResult& result_;
  Tree tree_;
  int64_t begin_;
  int64_t rows_;
  int levels_;
  int64_t lines_;
  int64_t stride_;
  std::vector<float> values_;    // dequantised, (levels * rows, cols)
  std::vector<float> weighted_;  // W H, (rows, cols)
  std::vector<float> gradient_;  // (W - Q) H, (levels * rows, cols)
};

}  // namespace

void solve_rows(const SolverProblem& problem, const SolverResult& result, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kGroup) Group(problem, result, row, std::min(kGroup, end - row)).solve();
}

}  // namespace taper
