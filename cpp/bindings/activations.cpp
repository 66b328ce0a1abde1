#include "apis/activations.hpp"

#include <algorithm>
#include <optional>

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"
#include "runtime/dispatch.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

Activations from_arrays(nb::handle q, nb::handle scale, nb::handle sum, nb::handle low, nb::handle low_sum) {
  const Buffer values = borrow<int8_t>(q, "q", 2);
  const Buffer scales = borrow<float>(scale, "scale", 1), sums = borrow<int32_t>(sum, "sum", 1);
  require_size(scales, "scale", values.shape(0));
  require_size(sums, "sum", values.shape(0));
  require(low.is_none() == low_sum.is_none(), "low and low_sum come together or not at all");
  Activations made(values.shape(0), values.shape(1), !low.is_none());
  std::copy_n(values.as<int8_t>(), values.size(), made.q());
  std::copy_n(scales.as<float>(), scales.size(), made.scale());
  std::copy_n(sums.as<int32_t>(), sums.size(), made.sum());
  if (made.wide()) {
    const Buffer low_values = borrow<int8_t>(low, "low", 2), low_sums = borrow<int32_t>(low_sum, "low_sum", 1);
    require(low_values.shape(0) == made.tokens() && low_values.shape(1) == made.cols(), "low has shape (",
            low_values.shape(0), ", ", low_values.shape(1), "), expected (", made.tokens(), ", ", made.cols(), ")");
    require_size(low_sums, "low_sum", made.tokens());
    std::copy_n(low_values.as<int8_t>(), low_values.size(), made.low());
    std::copy_n(low_sums.as<int32_t>(), low_sums.size(), made.low_sum());
  }
  return made;
}

template <class T>
nb::object copy_of(const T* data, std::initializer_list<int64_t> shape, int64_t size) {
  NewArray<T> made = new_array<T>(shape);
  std::copy_n(data, size, made.data);
  return std::move(made.array);
}

// An argument that may be None, as a vector of n floats.
class OptionalVector {
 public:
  OptionalVector(nb::handle array, const char* name, int64_t n) {
    if (array.is_none()) return;
    buffer_.emplace(borrow<float>(array, name, 1));
    require_size(*buffer_, name, n);
  }
  const float* data() const { return buffer_ ? buffer_->as<float>() : nullptr; }

 private:
  std::optional<Buffer> buffer_;
};

Activations prepare_rows(nb::handle x, int64_t cols, nb::handle signs, int64_t block, nb::handle eps, nb::handle gain,
                         int magnitude_bits) {
  const Buffer rows = borrow<float>(x, "x", 2);
  const int64_t n = rows.shape(1);
  const OptionalVector sign_values(signs, "signs", n), gains(gain, "gain", n);
  require(gains.data() == nullptr || !eps.is_none(), "gain is given without eps, which a norm needs");
  const Norm norm{!eps.is_none(), gains.data(), eps.is_none() ? 0.0f : nb::cast<float>(eps)};
  Activations out(rows.shape(0), cols, magnitude_bits > kNarrowMagnitudeBits, packs(kernels(), rows.shape(0)));
  nb::gil_scoped_release release;
  prepare(rows.as<float>(), n, norm, {sign_values.data(), block}, magnitude_bits, out);
  return out;
}

Activations prepare_swiglu_rows(nb::handle gate_up, int64_t cols, nb::handle signs, int64_t block, int magnitude_bits) {
  const Buffer rows = borrow<float>(gate_up, "gate_up", 2);
  require(rows.shape(1) % 2 == 0, "gate_up has ", rows.shape(1), " columns, expected an even number");
  const int64_t n = rows.shape(1) / 2;
  const OptionalVector sign_values(signs, "signs", n);
  Activations out(rows.shape(0), cols, magnitude_bits > kNarrowMagnitudeBits, packs(kernels(), rows.shape(0)));
  nb::gil_scoped_release release;
  prepare_swiglu(rows.as<float>(), n, {sign_values.data(), block}, magnitude_bits, out);
  return out;
}

}  // namespace

void bind_activations(nb::module_& m) {
  nb::class_<Activations>(m, "Activations")
      .def(
          "__init__",
          [](Activations* self, nb::handle q, nb::handle scale, nb::handle sum, nb::handle low, nb::handle low_sum) {
            new (self) Activations(from_arrays(q, scale, sum, low, low_sum));
          },
          "q"_a, "scale"_a, "sum"_a, "low"_a.none() = nb::none(), "low_sum"_a.none() = nb::none())
      .def_prop_ro("q",
                   [](const Activations& a) { return copy_of(a.q(), {a.tokens(), a.cols()}, a.tokens() * a.cols()); })
      .def_prop_ro("scale", [](const Activations& a) { return copy_of(a.scale(), {a.tokens()}, a.tokens()); })
      .def_prop_ro("sum", [](const Activations& a) { return copy_of(a.sum(), {a.tokens()}, a.tokens()); })
      .def_prop_ro("low",
                   [](const Activations& a) -> nb::object {
                     if (!a.wide()) return nb::none();
                     return copy_of(a.low(), {a.tokens(), a.cols()}, a.tokens() * a.cols());
                   })
      .def_prop_ro("low_sum",
                   [](const Activations& a) -> nb::object {
                     if (!a.wide()) return nb::none();
                     return copy_of(a.low_sum(), {a.tokens()}, a.tokens());
                   })
      .def_prop_ro("num_tokens", &Activations::tokens)
      .def_prop_ro("cols", &Activations::cols);
  m.def("prepare", &prepare_rows, "x"_a, nb::kw_only(), "cols"_a, "signs"_a.none(), "block"_a,
        "eps"_a.none() = nb::none(), "gain"_a.none() = nb::none(), "magnitude_bits"_a = kNarrowMagnitudeBits);
  m.def("prepare_swiglu", &prepare_swiglu_rows, "gate_up"_a, nb::kw_only(), "cols"_a, "signs"_a.none(), "block"_a,
        "magnitude_bits"_a = kNarrowMagnitudeBits);
}

}  // namespace taper
