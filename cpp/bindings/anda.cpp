#include "apis/anda.hpp"

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

KvType type_of(const Buffer& floats) { return floats.dtype() == Dtype::f32 ? KvType::f32 : KvType::f16; }

// Words travel as int64: the bits are what counts.
void pack(nb::handle x, int64_t group_size, int magnitude_bits, bool truncate, nb::handle words, nb::handle exponents) {
  const Buffer rows(x, "x", {Dtype::f32, Dtype::f16}, 2);
  const AndaShape shape{rows.shape(0), rows.shape(1), group_size, magnitude_bits};
  const Buffer out(words, "words", {Dtype::i64}, 3, true), bytes(exponents, "exponents", {Dtype::u8}, 1, true);
  require(group_size >= 1 && magnitude_bits >= 1, "group_size is ", group_size, " and magnitude_bits ", magnitude_bits,
          ", expected at least 1");
  require(
      out.shape(0) == shape.addresses() && out.shape(1) == magnitude_bits + 1 && out.shape(2) == kAndaWordsAtAddress,
      "words has shape (", out.shape(0), ", ", out.shape(1), ", ", out.shape(2), "), expected (", shape.addresses(),
      ", ", magnitude_bits + 1, ", ", kAndaWordsAtAddress, ")");
  require_size(bytes, "exponents", shape.exponent_bytes());
  nb::gil_scoped_release release;
  anda_pack(rows.data(), type_of(rows), shape, truncate, static_cast<uint64_t*>(out.data()),
            static_cast<uint8_t*>(bytes.data()));
}

void unpack(nb::handle words, nb::handle exponents, int64_t num_rows, int64_t num_values, int64_t group_size,
            int magnitude_bits, int bits, nb::handle out) {
  const Buffer in = borrow<int64_t>(words, "words", 3);
  const Buffer bytes = borrow<uint8_t>(exponents, "exponents", 1);
  require(num_rows >= 1 && num_values >= 1 && group_size >= 1, "rows are (", num_rows, ", ", num_values,
          ") in groups of ", group_size, ", expected at least 1 of each");
  const AndaShape shape{num_rows, num_values, group_size, magnitude_bits};
  require(in.shape(0) == shape.addresses() && in.shape(1) == magnitude_bits + 1 && in.shape(2) == kAndaWordsAtAddress,
          "words has shape (", in.shape(0), ", ", in.shape(1), ", ", in.shape(2), "), expected (", shape.addresses(),
          ", ", magnitude_bits + 1, ", ", kAndaWordsAtAddress, ")");
  require_size(bytes, "exponents", shape.exponent_bytes());
  const Buffer rows(out, "out", {Dtype::f32, Dtype::f16}, 2, true);
  require(rows.shape(0) == num_rows && rows.shape(1) == num_values, "out has shape (", rows.shape(0), ", ",
          rows.shape(1), "), expected (", num_rows, ", ", num_values, ")");
  nb::gil_scoped_release release;
  anda_unpack(reinterpret_cast<const uint64_t*>(in.as<int64_t>()), bytes.as<uint8_t>(), shape, bits, type_of(rows),
              rows.data());
}

}  // namespace

void bind_anda(nb::module_& m) {
  m.def("anda_pack", &pack, "x"_a, "group_size"_a, "magnitude_bits"_a, "truncate"_a, "words"_a, "exponents"_a);
  m.def("anda_unpack", &unpack, "words"_a, "exponents"_a, "num_rows"_a, "num_values"_a, "group_size"_a,
        "magnitude_bits"_a, "bits"_a, "out"_a);
}

}  // namespace taper
