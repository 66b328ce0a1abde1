// The joint tree of one row: the interval recursion f_b(i, j) = w_b cost(i, j) + min_k [f_{b+1}(i, k) + f_{b+1}(k, j)]
// on cells of the sorted row, then Lloyd's two steps on the tree, off the grid. Every sum and minimum has one order.
#include <cmath>

#include "apis/row_tables_rows.hpp"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)  // musl has no ifunc
#define TAPER_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define TAPER_CLONES
#endif

namespace taper {
namespace {

constexpr int kSweeps = 30;  // nearly all rows stand still before

// Begins of at most `cells` cells. A cell's share is the sum of (mass^1/3 gap^2/3) over its elements, which for many
// elements is the integral of the cube root of the density: the spacing of least error (Panter and Dite, 1951).
std::vector<int64_t> cut_cells(const SortedRow& row, int64_t cells) {
  const int64_t n = row.size();
  std::vector<double> share(n, 0.0);
  std::vector<int64_t> firsts{0};
  for (int64_t i = 1; i < n; ++i) {
    const double gap = row.value(i) - row.value(i - 1);
    share[i] = share[i - 1] + std::cbrt(row.weight(i)) * std::cbrt(gap * gap);
    if (gap > 0.0) firsts.push_back(i);
  }
  if (static_cast<int64_t>(firsts.size()) > cells && share[n - 1] > 0.0) {
    firsts.assign(1, 0);
    for (int64_t c = 1; c < cells; ++c) {
      const double wanted = share[n - 1] * static_cast<double>(c) / static_cast<double>(cells);
      const int64_t i = std::lower_bound(share.begin(), share.end(), wanted) - share.begin();
      if (i > firsts.back() && i < n) firsts.push_back(i);
    }
  }
  firsts.push_back(n);
  return firsts;
}

// f of one width for all i <= j, (size, size); entries below the diagonal are never read.
using Table = std::vector<float>;

// out(i, j) += min_k below(i, k) + below(k, j) for i <= j. Additions and minima only, so every instruction set agrees.
TAPER_CLONES void add_merged(float* out, const float* below, float* least, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    std::copy_n(below + i * size, size, least);  // k = i, as f(i, i) = 0
    for (size_t k = i + 1; k < size; ++k) {
      const float left = below[i * size + k];
      const float* right = below + k * size;
      for (size_t j = k; j < size; ++j) least[j] = left + right[j] < least[j] ? left + right[j] : least[j];
    }
    for (size_t j = i; j < size; ++j) out[i * size + j] += least[j];
  }
}

// The best tree on the cells.
class Programme {
 public:
  Programme(const SortedRow& row, const RowTablesProblem& p) : cells_(cut_cells(row, p.cells)), size_(cells_.size()) {
    const double total = row.cost(0, row.size());
    const double unit = total > 0.0 ? 1.0 / total : 1.0;
    Table cost(size_ * size_, 0.0f);
    for (size_t i = 0; i < size_; ++i)
      for (size_t j = i + 1; j < size_; ++j)
        cost[i * size_ + j] = static_cast<float>(row.cost(cells_[i], cells_[j]) * unit);
    best_.resize(p.max_bits + 1);
    Table least(size_);
    best_[p.max_bits] = scaled(cost, p.importance[p.max_bits - p.min_bits]);
    for (int bits = p.max_bits - 1; bits >= 1; --bits) {
      best_[bits] = bits >= p.min_bits ? scaled(cost, p.importance[bits - p.min_bits]) : Table(size_ * size_, 0.0f);
      add_merged(best_[bits].data(), best_[bits + 1].data(), least.data(), size_);
    }
  }

  // Begins of the leaves in the sorted row, and its end.
  std::vector<int64_t> edges() const {
    std::vector<size_t> nodes{0, size_ - 1};
    for (size_t bits = 1; bits < best_.size(); ++bits) {
      std::vector<size_t> next;
      for (size_t node = 0; node + 1 < nodes.size(); ++node) {
        next.push_back(nodes[node]);
        next.push_back(split(best_[bits], nodes[node], nodes[node + 1]));
      }
      next.push_back(nodes.back());
      nodes = std::move(next);
    }
    std::vector<int64_t> positions;
    for (size_t node : nodes) positions.push_back(cells_[node]);
    return positions;
  }

 private:
  static Table scaled(const Table& cost, float factor) {
    Table out(cost);
    for (float& x : out) x *= factor;
    return out;
  }

  size_t split(const Table& below, size_t i, size_t j) const {
    size_t least = i;
    for (size_t k = i + 1; k <= j; ++k)
      if (below[i * size_ + k] + below[k * size_ + j] < below[i * size_ + least] + below[least * size_ + j]) least = k;
    return least;
  }

  std::vector<int64_t> cells_;
  size_t size_;
  std::vector<Table> best_;  // by bits; none for 0
};

// The nodes' centroids; an empty node has its parent's.
void fit_values(const SortedRow& row, RowTree& tree, int max_bits) {
  tree.levels.assign(max_bits + 1, {});
  tree.levels[0] = {row.centroid(0, row.size(), 0.0)};
  for (int bits = 1; bits <= max_bits; ++bits) {
    const size_t width = size_t{1} << (max_bits - bits);
    for (size_t node = 0; node < size_t{1} << bits; ++node)
      tree.levels[bits].push_back(
          row.centroid(tree.edges[node * width], tree.edges[(node + 1) * width], tree.levels[bits - 1][node / 2]));
  }
}

// Each element to the leaf of least sum_b w_b (x - v_b)^2 over its path. That is x^2 sum w - 2 x a + c for a leaf, so
// the leaves that are ever best are the lower hull of lines of falling slope, in the order of the leaves.
void fit_edges(const SortedRow& row, const RowTablesProblem& p, RowTree& tree) {
  struct Line {
    double a, c;
    size_t leaf;
    double from;  // least x at which it is best
  };
  std::vector<Line> hull;
  const size_t leaves = size_t{1} << p.max_bits;
  for (size_t leaf = 0; leaf < leaves; ++leaf) {
    Line line{0.0, 0.0, leaf, 0.0};
    for (int bits = p.min_bits; bits <= p.max_bits; ++bits) {
      const double v = tree.levels[bits][leaf >> (p.max_bits - bits)], w = p.importance[bits - p.min_bits];
      line.a += w * v;
      line.c += w * v * v;
    }
    while (!hull.empty()) {
      const Line& last = hull.back();
      if (line.a > last.a) {
        line.from = (line.c - last.c) / (2.0 * (line.a - last.a));
        if (hull.size() == 1 || line.from > last.from) break;
      } else if (line.c >= last.c) {
        break;
      }
      hull.pop_back();
    }
    if (hull.empty() || line.a > hull.back().a) hull.push_back(line);
  }
  tree.edges.assign(leaves + 1, 0);
  size_t next = 0;  // leaf whose begin is not yet known
  for (size_t h = 0; h < hull.size(); ++h) {
    const int64_t begin = h == 0 ? 0 : row.position(hull[h].from);
    for (; next <= hull[h].leaf; ++next) tree.edges[next] = begin;
  }
  for (; next <= leaves; ++next) tree.edges[next] = row.size();
}

}  // namespace

RowTree joint_tree(const SortedRow& row, const RowTablesProblem& p) {
  RowTree tree;
  tree.edges = Programme(row, p).edges();
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    fit_values(row, tree, p.max_bits);
    const std::vector<int64_t> before = tree.edges;
    fit_edges(row, p, tree);
    if (tree.edges == before) break;
  }
  fit_values(row, tree, p.max_bits);
  return tree;
}

}  // namespace taper
