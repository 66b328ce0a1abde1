#include "apis/decoder.hpp"

#include <nanobind/stl/string.h>

#include <optional>

#include "bindings/bindings.hpp"
#include "bindings/matrices.hpp"
#include "bindings/planes_cache.hpp"

namespace taper {
namespace {

using nb::literals::operator""_a;

constexpr const char* kStageNames[] = {"embed", "prepare", "qkv",     "rope", "attention",
                                       "merge", "o",       "gate_up", "down", "head"};
static_assert(std::size(kStageNames) == static_cast<size_t>(Stage::count));

// A decoder and the arrays and matrices that it points into.
class HeldDecoder {
 public:
  // A linear layer is (planes, outliers or None, signs or None, block, eps or None, gain or None, {bits: magnitude
  // bits}), the embedding (planes, outliers or None, signs or None, block, gain or None).
  HeldDecoder(int64_t heads, int64_t kv_heads, int64_t head_dim, float score_scale, nb::tuple embedding,
              nb::sequence layers, nb::tuple head) {
    DecoderParts parts;
    parts.attention = {heads, kv_heads, head_dim};
    parts.score_scale = score_scale;
    parts.embedding = embedding_of(embedding);
    for (nb::handle layer : layers) {
      const nb::tuple matrices = nb::cast<nb::tuple>(layer);
      require(matrices.size() == 4, "a layer has ", matrices.size(), " matrices, expected 4");
      parts.layers.push_back({linear(matrices[0]), linear(matrices[1]), linear(matrices[2]), linear(matrices[3])});
    }
    parts.head = linear(head);
    decoder_.emplace(std::move(parts));
  }

  HeldDecoder(const HeldDecoder&) = delete;

  Decoder& decoder() { return *decoder_; }

 private:
  const PlanedMatrix* planes(nb::handle object) {
    objects_.emplace_back(nb::borrow(object));
    return &nb::cast<const Planes&>(object).matrix();
  }

  const Outliers* outliers(nb::handle object) {
    if (object.is_none()) return nullptr;
    objects_.emplace_back(nb::borrow(object));
    return &nb::cast<const HeldOutliers&>(object).outliers();
  }

  const float* floats(nb::handle array, const char* name, int64_t size) {
    if (array.is_none()) return nullptr;
    const Buffer& buffer = buffers_.emplace_back(borrow<float>(array, name, 1));
    require_size(buffer, name, size);
    return buffer.as<float>();
  }

  LinearParts linear(nb::handle object) {
    const nb::tuple parts = nb::cast<nb::tuple>(object);
    require(parts.size() == 7, "a linear layer has ", parts.size(), " parts, expected 7");
    LinearParts made;
    made.matrix = planes(parts[0]);
    made.outliers = outliers(parts[1]);
    const int64_t n = made.matrix->in_features();
    made.rotation = {floats(parts[2], "signs", n), nb::cast<int64_t>(parts[3])};
    made.norm = {!parts[4].is_none(), floats(parts[5], "gain", n),
                 parts[4].is_none() ? 0.0f : nb::cast<float>(parts[4])};
    for (auto [bits, magnitude] : nb::cast<nb::dict>(parts[6])) {
      const int width = nb::cast<int>(bits);
      require(width >= 1 && width <= kMaxBits, "activations are for ", width, " bits, expected 1..", kMaxBits);
      made.magnitude_bits[static_cast<size_t>(width)] = nb::cast<int8_t>(magnitude);
    }
    return made;
  }

  EmbeddingParts embedding_of(const nb::tuple& parts) {
    require(parts.size() == 5, "an embedding has ", parts.size(), " parts, expected 5");
    EmbeddingParts made;
    made.matrix = planes(parts[0]);
    made.outliers = outliers(parts[1]);
    const int64_t n = made.matrix->in_features();
    made.rotation = {floats(parts[2], "signs", n), nb::cast<int64_t>(parts[3])};
    made.gain = floats(parts[4], "gain", n);
    return made;
  }

  std::vector<nb::object> objects_;
  std::deque<Buffer> buffers_;
  std::optional<Decoder> decoder_;
};

// An array of all layers: (layers, 2, kv_heads, capacity, head_dim).
void set_cache(const DecoderParts& parts, const Buffer& cache, StepSequence& sequence) {
  const AttentionShape& shape = parts.attention;
  const int64_t layers = static_cast<int64_t>(parts.layers.size());
  require(cache.shape(0) == layers && cache.shape(1) == 2 && cache.shape(2) == shape.kv_heads &&
              cache.shape(4) == shape.head_dim && cache.shape(3) % kKeyBlock == 0,
          "cache has shape (", cache.shape(0), ", ", cache.shape(1), ", ", cache.shape(2), ", ", cache.shape(3), ", ",
          cache.shape(4), "), expected (", layers, ", 2, ", shape.kv_heads, ", a multiple of ", kKeyBlock, ", ",
          shape.head_dim, ")");
  sequence.cache = cache.data();
  sequence.type = cache.dtype() == Dtype::f16 ? KvType::f16 : KvType::f32;
  sequence.capacity = cache.shape(3);
}

// What the arrays of a step are kept in.
struct Held {
  std::deque<Buffer> buffers;
  std::deque<PlanesTable> tables;
};

// (tokens, position, cache, cos, sin) as the step takes it; `held` keeps the arrays in place.
StepSequence sequence_of(const DecoderParts& parts, nb::handle object, Held& held) {
  const nb::tuple given = nb::cast<nb::tuple>(object);
  require(given.size() == 5, "a sequence has ", given.size(), " parts, expected 5");
  StepSequence made{};
  made.tokens = nb::cast<int64_t>(given[0]);
  made.position = nb::cast<int64_t>(given[1]);
  if (nb::isinstance<PlanesBlocks>(given[2])) {
    require(made.position >= 0 && made.tokens >= 1, "a sequence brings ", made.tokens, " tokens at position ",
            made.position, ", expected at least 1 from 0 on");
    const PlanesBlocks& blocks = nb::cast<const PlanesBlocks&>(given[2]);
    made.table = &held.tables.emplace_back(blocks.table(made.position + made.tokens));
  } else {
    set_cache(parts, held.buffers.emplace_back(Buffer(given[2], "cache", {Dtype::f16, Dtype::f32}, 5, true)), made);
  }
  const Buffer& cos = held.buffers.emplace_back(borrow<float>(given[3], "cos", 2));
  const Buffer& sin = held.buffers.emplace_back(borrow<float>(given[4], "sin", 2));
  const int64_t half = parts.attention.head_dim / 2;
  require(cos.shape(1) == half && sin.shape(1) == cos.shape(1) && sin.shape(0) == cos.shape(0), "cos has ",
          cos.shape(1), " columns, expected ", half, " (half of head_dim), and sin as many");
  made.cos = cos.as<float>();
  made.sin = sin.as<float>();
  made.num_table_rows = cos.shape(0);
  return made;
}

Logits logits_of(const std::string& name) {
  if (name == "last") return Logits::last;
  if (name == "all") return Logits::all;
  require(name == "none", "logits is '", name, "', expected last, all or none");
  return Logits::none;
}

nb::object step(HeldDecoder& self, nb::handle tokens, nb::sequence sequences, nb::handle widths,
                const std::string& logits, nb::handle times) {
  Decoder& decoder = self.decoder();
  Held held;
  const Buffer ids = borrow<int32_t>(tokens, "tokens", 1), bits = borrow<uint8_t>(widths, "widths", 1);
  StepInput input;
  input.tokens = ids.as<int32_t>();
  for (nb::handle sequence : sequences) input.sequences.push_back(sequence_of(decoder.parts(), sequence, held));
  input.widths = bits.as<uint8_t>();
  input.num_widths = bits.size();
  input.logits = logits_of(logits);
  require_size(ids, "tokens", input.num_tokens());
  StageTimes spent{};
  bool finite = false;
  NewArray<float> out = new_array<float>({input.num_logits(), decoder.vocab_size()});
  {
    nb::gil_scoped_release release;
    finite = decoder.step(input, out.data, times.is_none() ? nullptr : &spent);
  }
  if (!times.is_none()) {
    nb::dict named = nb::cast<nb::dict>(times);
    for (size_t i = 0; i < spent.size(); ++i) {
      const int64_t before = named.contains(kStageNames[i]) ? nb::cast<int64_t>(named[kStageNames[i]]) : 0;
      named[kStageNames[i]] = before + spent[i];
    }
  }
  return nb::make_tuple(input.logits == Logits::none ? nb::none() : out.array, finite);
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<HeldDecoder>(m, "Decoder")
      .def(nb::init<int64_t, int64_t, int64_t, float, nb::tuple, nb::sequence, nb::tuple>(), nb::kw_only(), "heads"_a,
           "kv_heads"_a, "head_dim"_a, "score_scale"_a, "embedding"_a, "layers"_a, "head"_a)
      .def("step", &step, "tokens"_a, "sequences"_a, "widths"_a, "logits"_a, "times"_a.none() = nb::none());
}

}  // namespace taper
