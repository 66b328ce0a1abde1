#include "apis/planes.hpp"

#include <algorithm>
#include <deque>
#include <optional>
#include <vector>

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"
#include "bindings/matrices.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

nb::object matmul(const Planes& self, const Activations& activations, int bits, nb::handle residual) {
  const int64_t tokens = activations.tokens(), rows = self.matrix().rows();
  std::optional<Buffer> added;
  if (!residual.is_none()) {
    added.emplace(borrow<float>(residual, "residual", 2));
    require(added->shape(0) == tokens && added->shape(1) == rows, "residual has shape (", added->shape(0), ", ",
            added->shape(1), "), expected (", tokens, ", ", rows, ")");
  }
  NewArray<float> out = new_array<float>({tokens, rows});
  {
    nb::gil_scoped_release release;
    self.matrix().matmul(activations, bits, added ? added->as<float>() : nullptr, out.data);
  }
  return std::move(out.array);
}

nb::object read_rows(const Planes& self, nb::handle indices, int bits) {
  const Buffer given(indices, "indices", {Dtype::i32, Dtype::i64}, 1);
  std::vector<int64_t> wide(given.size());
  if (given.dtype() == Dtype::i32) {
    std::copy_n(given.as<int32_t>(), wide.size(), wide.begin());
  } else {
    std::copy_n(given.as<int64_t>(), wide.size(), wide.begin());
  }
  const int64_t count = given.size();
  NewArray<float> out = new_array<float>({count, self.matrix().in_features()});
  {
    nb::gil_scoped_release release;
    self.matrix().read_rows(wide.data(), count, bits, out.data);
  }
  return std::move(out.array);
}

nb::object pack(nb::handle codes, int parent_bits) {
  const Buffer given = borrow<uint8_t>(codes, "codes", 2);
  require(parent_bits >= 1 && parent_bits <= kMaxBits, "parent_bits is ", parent_bits, ", expected 1..", kMaxBits);
  nb::list planes;
  std::vector<uint8_t*> pointers;
  for (int p = 0; p < parent_bits; ++p) {
    NewArray<uint8_t> plane = new_array<uint8_t>({given.shape(0), padded_cols(given.shape(1)) / 8});
    pointers.push_back(plane.data);
    planes.append(plane.array);
  }
  {
    nb::gil_scoped_release release;
    pack_planes(given.as<uint8_t>(), given.shape(0), given.shape(1), parent_bits, pointers.data());
  }
  return planes;
}

nb::object unpack(nb::sequence planes, int bits, int64_t in_features) {
  std::deque<Buffer> buffers;
  std::vector<const uint8_t*> pointers;
  for (nb::handle plane : planes) {
    Buffer& bytes = buffers.emplace_back(borrow<uint8_t>(plane, "a plane", 2));
    require(bytes.shape(0) == buffers.front().shape(0) && bytes.shape(1) == padded_cols(in_features) / 8,
            "a plane has shape (", bytes.shape(0), ", ", bytes.shape(1), "), expected (", buffers.front().shape(0),
            ", ", padded_cols(in_features) / 8, ")");
    pointers.push_back(bytes.as<uint8_t>());
  }
  require(bits >= 1 && bits <= static_cast<int>(pointers.size()), "bits is ", bits, ", expected 1..", pointers.size(),
          " (the planes given)");
  NewArray<uint8_t> codes = new_array<uint8_t>({buffers.front().shape(0), in_features});
  {
    nb::gil_scoped_release release;
    unpack_codes(pointers.data(), bits, buffers.front().shape(0), in_features, codes.data);
  }
  return std::move(codes.array);
}

}  // namespace

void bind_planes(nb::module_& m) {
  nb::class_<Planes>(m, "Planes")
      .def(nb::init<nb::sequence, nb::dict, nb::dict, nb::handle, nb::handle, int64_t>(), "planes"_a, "values"_a,
           "level_scales"_a, "row_scales"_a, "bias"_a.none(), "in_features"_a)
      .def_prop_ro("out_features", [](const Planes& p) { return p.matrix().rows(); })
      .def_prop_ro("in_features", [](const Planes& p) { return p.matrix().in_features(); })
      .def_prop_ro("cols", [](const Planes& p) { return p.matrix().cols(); })
      .def_prop_ro("min_bits", [](const Planes& p) { return p.matrix().min_bits(); })
      .def_prop_ro("max_bits", [](const Planes& p) { return p.matrix().max_bits(); })
      .def(
          "bytes_read", [](const Planes& p, int bits) { return p.matrix().bytes_read(bits); }, "bits"_a)
      .def("matmul", &matmul, "activations"_a, "bits"_a, "residual"_a.none() = nb::none())
      .def("rows", &read_rows, "indices"_a, "bits"_a);
  m.def("pack_planes", &pack, "codes"_a, "parent_bits"_a);
  m.def("unpack_codes", &unpack, "planes"_a, "bits"_a, "in_features"_a);
  m.def(
      "padded_cols",
      [](int64_t features) {
        require(features >= 1, "features is ", features, ", expected at least 1");
        return padded_cols(features);
      },
      "features"_a);
}

}  // namespace taper
