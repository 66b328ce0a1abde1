#include "apis/attention.hpp"

#include "apis/check.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

// Keys (kv_heads, blocks, head_dim, 16) and values (kv_heads, 16 blocks, head_dim).
class KvArrays {
 public:
  KvArrays(nb::handle keys, nb::handle values, bool writable)
      : keys_(keys, "keys", {Dtype::f16, Dtype::f32}, 4, writable),
        values_(values, "values", {Dtype::f16, Dtype::f32}, 3, writable) {
    require(keys_.dtype() == values_.dtype(), "keys and values have different dtypes");
    require(keys_.shape(3) == kKeyBlock, "keys have blocks of ", keys_.shape(3), " entries, expected ", kKeyBlock);
    require(keys_.shape(0) == values_.shape(0) && keys_.shape(1) * kKeyBlock == values_.shape(1) &&
                keys_.shape(2) == values_.shape(2),
            "keys have ", keys_.shape(0), " heads of ", keys_.shape(1) * kKeyBlock, " entries of ", keys_.shape(2),
            " elements, values have ", values_.shape(0), " of ", values_.shape(1), " of ", values_.shape(2));
  }
  KvView view() const {
    return {keys_.data(),     values_.data(),   keys_.dtype() == Dtype::f16 ? KvType::f16 : KvType::f32,
            values_.shape(0), values_.shape(1), values_.shape(2)};
  }

 private:
  Buffer keys_;
  Buffer values_;
};

nb::object make_rope_tables(nb::handle inv_freq, int64_t num_positions, double attention_factor) {
  const Buffer frequencies = borrow<double>(inv_freq, "inv_freq", 1);
  require(num_positions >= 1, "num_positions is ", num_positions, ", expected at least 1");
  const int64_t half = frequencies.size();
  NewArray<float> cos = new_array<float>({num_positions, half}), sin = new_array<float>({num_positions, half});
  {
    nb::gil_scoped_release release;
    rope_tables(frequencies.as<double>(), half, num_positions, attention_factor, cos.data, sin.data);
  }
  return nb::make_tuple(cos.array, sin.array);
}

void rope_store_rows(nb::handle qkv, int64_t heads, nb::handle keys, nb::handle values, int64_t position,
                     nb::handle cos, nb::handle sin) {
  const Buffer rows(qkv, "qkv", {Dtype::f32}, 2, true);
  const KvArrays kv(keys, values, true);
  const Buffer cosines = borrow<float>(cos, "cos", 2), sines = borrow<float>(sin, "sin", 2);
  const int64_t half = kv.view().head_dim / 2;
  require(cosines.shape(1) == half, "cos has ", cosines.shape(1), " columns, expected ", half, " (half of head_dim)");
  require(sines.shape(0) == cosines.shape(0) && sines.shape(1) == half, "cos and sin differ in shape");
  nb::gil_scoped_release release;
  rope_store(rows.as<float>(), {rows.shape(0), rows.shape(1), heads}, kv.view(), position, cosines.as<float>(),
             sines.as<float>(), cosines.shape(0));
}

nb::object attention_rows(nb::handle qkv, int64_t heads, nb::handle keys, nb::handle values, int64_t position,
                          float scale) {
  const Buffer rows = borrow<float>(qkv, "qkv", 2);
  const KvArrays kv(keys, values, false);
  require(heads >= 1, "heads is ", heads, ", expected at least 1");
  NewArray<float> out = new_array<float>({rows.shape(0), heads * kv.view().head_dim});
  {
    nb::gil_scoped_release release;
    attention(rows.as<float>(), {rows.shape(0), rows.shape(1), heads}, kv.view(), position, scale, out.data);
  }
  return std::move(out.array);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("rope_tables", &make_rope_tables, "inv_freq"_a, "num_positions"_a, "attention_factor"_a = 1.0);
  m.def("rope_store", &rope_store_rows, "qkv"_a, "heads"_a, "keys"_a, "values"_a, "position"_a, "cos"_a, "sin"_a);
  m.def("attention", &attention_rows, "qkv"_a, "heads"_a, "keys"_a, "values"_a, "position"_a, "scale"_a);
}

}  // namespace taper
