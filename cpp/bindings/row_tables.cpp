#include "apis/row_tables.hpp"

#include <algorithm>

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

nb::object fit(nb::handle weights, nb::handle sensitivity, nb::handle importance, int min_bits, int max_bits,
               int64_t cells, bool greedy, uint64_t seed) {
  const Buffer w = borrow<float>(weights, "weights", 2), f = borrow<float>(sensitivity, "sensitivity", 2),
               i = borrow<float>(importance, "importance", 1);
  const int64_t rows = w.shape(0), cols = w.shape(1);
  require(min_bits >= 1 && min_bits <= max_bits && max_bits <= 8, "bits are ", min_bits, "..", max_bits,
          ", expected 1 <= min <= max <= 8");
  require(f.shape(1) == cols, "sensitivity has ", f.shape(1), " columns, expected ", cols);
  require_size(i, "importance", max_bits - min_bits + 1);
  NewArray<uint8_t> codes = new_array<uint8_t>({rows, cols});
  NewArray<float> values = new_array<float>({rows, (int64_t{2} << max_bits) - (int64_t{1} << min_bits)});
  {
    nb::gil_scoped_release release;
    fit_row_tables(
        {w.as<float>(), f.as<float>(), f.shape(0), i.as<float>(), rows, cols, min_bits, max_bits, cells, greedy, seed},
        {codes.data, values.data});
  }
  return nb::make_tuple(codes.array, values.array);
}

}  // namespace

void bind_row_tables(nb::module_& m) {
  m.def("fit_row_tables", &fit, "weights"_a, "sensitivity"_a, "importance"_a, "min_bits"_a, "max_bits"_a, "cells"_a,
        "greedy"_a, "seed"_a);
}

}  // namespace taper
