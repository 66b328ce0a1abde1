// The two ways to cut one sorted row.
#pragma once

#include "apis/row_tables.hpp"
#include "apis/sorted_row.hpp"

namespace taper {

// Least sum over the widths of importance times weighted squared error, on cells, then refined.
RowTree joint_tree(const SortedRow& row, const RowTablesProblem& p);

// Weighted k-means at the least width (SqueezeLLM, arXiv 2306.07629), every cluster then split in two width by width
// (Any-Precision LLM, arXiv 2402.10517, section 3.2). `seed` is the row's own.
RowTree greedy_tree(const SortedRow& row, const RowTablesProblem& p, uint64_t seed);

}  // namespace taper
