#include "bindings/planes_cache.hpp"

#include "apis/attention.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

PlanesLayout* layout_of(int64_t kv_heads, int64_t head_dim, nb::sequence layers) {
  std::vector<StoredBits> stored;
  for (nb::handle layer : layers) {
    const nb::tuple bits = nb::cast<nb::tuple>(layer);
    require(bits.size() == 4, "a layer has ", bits.size(),
            " bits, expected 4: of keys, their upper part, values, their upper part");
    stored.push_back({nb::cast<int>(bits[0]), nb::cast<int>(bits[1]), nb::cast<int>(bits[2]), nb::cast<int>(bits[3])});
  }
  return new PlanesLayout(kv_heads, head_dim, std::move(stored));
}

void store_rows(nb::handle qkv, int64_t heads, const PlanesBlocks& blocks, int64_t layer, int64_t position,
                nb::handle cos, nb::handle sin) {
  const Buffer rows(qkv, "qkv", {Dtype::f32}, 2, true);
  const Buffer cosines = borrow<float>(cos, "cos", 2), sines = borrow<float>(sin, "sin", 2);
  require(position >= 0, "position is ", position, ", expected at least 0");
  const PlanesTable table = blocks.table(position + rows.shape(0));
  const int64_t half = table.layout->head_dim() / 2;
  require(cosines.shape(1) == half && sines.shape(1) == half && sines.shape(0) == cosines.shape(0), "cos has ",
          cosines.shape(1), " columns, expected ", half, " (half of head_dim), and sin the same shape");
  nb::gil_scoped_release release;
  rope_store(rows.as<float>(), {rows.shape(0), rows.shape(1), heads}, table, layer, position, cosines.as<float>(),
             sines.as<float>(), cosines.shape(0));
}

nb::object attention_rows(nb::handle qkv, int64_t heads, const PlanesBlocks& blocks, int64_t layer, int64_t position,
                          float scale) {
  const Buffer rows = borrow<float>(qkv, "qkv", 2);
  require(heads >= 1, "heads is ", heads, ", expected at least 1");
  require(position >= 0, "position is ", position, ", expected at least 0");
  const PlanesTable table = blocks.table(position + rows.shape(0));
  NewArray<float> out = new_array<float>({rows.shape(0), heads * table.layout->head_dim()});
  {
    nb::gil_scoped_release release;
    attention(rows.as<float>(), {rows.shape(0), rows.shape(1), heads}, table, layer, position, scale, out.data);
  }
  return std::move(out.array);
}

}  // namespace

void bind_planes_cache(nb::module_& m) {
  nb::class_<PlanesLayout>(m, "PlanesLayout")
      .def(nb::new_(&layout_of), "kv_heads"_a, "head_dim"_a, "layers"_a)
      .def_prop_ro("upper_bytes", &PlanesLayout::upper_bytes)
      .def_prop_ro("lower_bytes", &PlanesLayout::lower_bytes);
  nb::class_<PlanesBlocks>(m, "PlanesBlocks")
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, int64_t>(), "layout"_a, "upper"_a,
           "lower"_a.none(), "table"_a, "bits"_a, "window"_a);
  m.def("planes_rope_store", &store_rows, "qkv"_a, "heads"_a, "blocks"_a, "layer"_a, "position"_a, "cos"_a, "sin"_a);
  m.def("planes_attention", &attention_rows, "qkv"_a, "heads"_a, "blocks"_a, "layer"_a, "position"_a, "scale"_a);
}

}  // namespace taper
