#include "apis/outliers.hpp"

#include <algorithm>
#include <vector>

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"
#include "bindings/matrices.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

void add_product(const HeldOutliers& self, const Activations& activations, nb::handle out) {
  const Buffer sums(out, "out", {Dtype::f32}, 2, true);
  const int64_t rows = self.outliers().rows();
  require(sums.shape(0) == activations.tokens() && sums.shape(1) == rows, "out has shape (", sums.shape(0), ", ",
          sums.shape(1), "), expected (", activations.tokens(), ", ", rows, ")");
  nb::gil_scoped_release release;
  self.outliers().add_product(activations, sums.as<float>());
}

void add_rows(const HeldOutliers& self, nb::handle indices, nb::handle out) {
  const Buffer given(indices, "indices", {Dtype::i32, Dtype::i64}, 1), rows(out, "out", {Dtype::f32}, 2, true);
  const int64_t in_features = self.outliers().in_features();
  require(rows.shape(0) == given.size() && rows.shape(1) == in_features, "out has shape (", rows.shape(0), ", ",
          rows.shape(1), "), expected (", given.size(), ", ", in_features, ")");
  std::vector<int64_t> wide(given.size());
  if (given.dtype() == Dtype::i32) {
    std::copy_n(given.as<int32_t>(), wide.size(), wide.begin());
  } else {
    std::copy_n(given.as<int64_t>(), wide.size(), wide.begin());
  }
  nb::gil_scoped_release release;
  self.outliers().add_rows(wide.data(), given.size(), rows.as<float>());
}

}  // namespace

void bind_outliers(nb::module_& m) {
  nb::class_<HeldOutliers>(m, "Outliers")
      .def(nb::init<nb::handle, nb::handle, nb::handle, int64_t>(), "starts"_a, "columns"_a, "values"_a,
           "in_features"_a)
      .def_prop_ro("num_bytes", [](const HeldOutliers& o) { return o.outliers().bytes(); })
      .def("add_product", &add_product, "activations"_a, "out"_a)
      .def("add_rows", &add_rows, "indices"_a, "out"_a);
}

}  // namespace taper
