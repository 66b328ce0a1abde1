#include "apis/solver.hpp"

#include <algorithm>

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

int64_t num_values(int min_bits, int max_bits) {
  int64_t count = 0;
  for (int bits = std::max(min_bits, 0); bits <= std::min(max_bits, 8); ++bits) count += int64_t{1} << bits;
  return count;
}

nb::object solve_nested(nb::handle weights, nb::handle hessian, nb::handle factor, nb::handle root, nb::handle values,
                        nb::handle importance, nb::handle scales, int min_bits, int max_bits, int passes,
                        bool refit_scales) {
  const Buffer w = borrow<float>(weights, "weights", 2), h = borrow<float>(hessian, "hessian", 2),
               u = borrow<float>(factor, "factor", 2), m = borrow<float>(root, "root", 2),
               v = borrow<float>(values, "values", 1), i = borrow<float>(importance, "importance", 1),
               s = borrow<float>(scales, "scales", 2);
  const int64_t rows = w.shape(0), cols = w.shape(1), levels = max_bits - min_bits + 1;
  require(levels >= 1, "bits are ", min_bits, "..", max_bits, ", expected 1 <= min <= max <= 8");
  require(h.shape(0) == cols && h.shape(1) == cols, "hessian has shape (", h.shape(0), ", ", h.shape(1),
          "), expected (", cols, ", ", cols, ")");
  require(u.shape(0) == cols && u.shape(1) == cols, "factor has shape (", u.shape(0), ", ", u.shape(1), "), expected (",
          cols, ", ", cols, ")");
  require(m.shape(0) == cols && m.shape(1) == cols, "root has shape (", m.shape(0), ", ", m.shape(1), "), expected (",
          cols, ", ", cols, ")");
  require(s.shape(0) == levels && s.shape(1) == rows, "scales has shape (", s.shape(0), ", ", s.shape(1),
          "), expected (", levels, ", ", rows, ")");
  require_size(v, "values", num_values(min_bits, max_bits));
  require_size(i, "importance", levels);
  NewArray<uint8_t> codes = new_array<uint8_t>({rows, cols});
  NewArray<float> fitted = new_array<float>({levels, rows}), errors = new_array<float>({levels, rows}),
                  energies = new_array<float>({rows});
  std::copy_n(s.as<float>(), s.size(), fitted.data);
  {
    nb::gil_scoped_release release;
    solve({w.as<float>(), h.as<float>(), u.as<float>(), m.as<float>(), v.as<float>(), i.as<float>(), rows, cols,
           min_bits, max_bits, passes, refit_scales},
          {codes.data, fitted.data, errors.data, energies.data});
  }
  return nb::make_tuple(codes.array, fitted.array, errors.array, energies.array);
}

}  // namespace

void bind_solver(nb::module_& m) {
  m.def("solve_nested", &solve_nested, "weights"_a, "hessian"_a, "factor"_a, "root"_a, "values"_a, "importance"_a,
        "scales"_a, "min_bits"_a, "max_bits"_a, "passes"_a, "refit_scales"_a);
}

}  // namespace taper
