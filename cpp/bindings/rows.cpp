#include "apis/rows.hpp"

#include <optional>

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

nb::object rms_norm_rows(nb::handle x, nb::handle gain, float eps) {
  const Buffer rows = borrow<float>(x, "x", 2);
  std::optional<Buffer> gains;
  if (!gain.is_none()) {
    gains.emplace(borrow<float>(gain, "gain", 1));
    require_size(*gains, "gain", rows.shape(1));
  }
  NewArray<float> out = new_array<float>({rows.shape(0), rows.shape(1)});
  {
    nb::gil_scoped_release release;
    rms_norm(rows.as<float>(), rows.shape(0), rows.shape(1), gains ? gains->as<float>() : nullptr, eps, out.data);
  }
  return std::move(out.array);
}

nb::object rotate_rows(nb::handle x, nb::handle signs, int64_t block, bool inverse) {
  const Buffer rows = borrow<float>(x, "x", 2), sign_values = borrow<float>(signs, "signs", 1);
  require_size(sign_values, "signs", rows.shape(1));
  NewArray<float> out = new_array<float>({rows.shape(0), rows.shape(1)});
  {
    nb::gil_scoped_release release;
    rotate(rows.as<float>(), rows.shape(0), rows.shape(1), {sign_values.as<float>(), block}, inverse, out.data);
  }
  return std::move(out.array);
}

nb::object swiglu_rows(nb::handle gate_up) {
  const Buffer rows = borrow<float>(gate_up, "gate_up", 2);
  require(rows.shape(1) % 2 == 0, "gate_up has ", rows.shape(1), " columns, expected an even number");
  NewArray<float> out = new_array<float>({rows.shape(0), rows.shape(1) / 2});
  {
    nb::gil_scoped_release release;
    swiglu(rows.as<float>(), rows.shape(0), rows.shape(1) / 2, out.data);
  }
  return std::move(out.array);
}

nb::object exp_elements(nb::handle x) {
  const Buffer given = borrow<float>(x, "x", -1);
  NewArray<float> out = new_array<float>({given.size()});
  {
    nb::gil_scoped_release release;
    exp(given.as<float>(), given.size(), out.data);
  }
  return given.ndim() == 1 ? std::move(out.array) : out.array.attr("reshape")(x.attr("shape"));
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("rms_norm", &rms_norm_rows, "x"_a, "gain"_a.none(), "eps"_a);
  m.def("rotate", &rotate_rows, "x"_a, "signs"_a, "block"_a, "inverse"_a = false);
  m.def("swiglu", &swiglu_rows, "gate_up"_a);
  m.def("exp", &exp_elements, "x"_a);
}

}  // namespace taper
