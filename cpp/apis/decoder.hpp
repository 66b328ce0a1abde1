// A step of the whole decoder over planes as one program: token ids in, logits out, one call.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "apis/activations.hpp"
#include "apis/attention.hpp"
#include "apis/outliers.hpp"
#include "apis/planes.hpp"

namespace taper {

// A matrix with what comes before its product. What it points to belongs to the caller and outlives the decoder.
struct LinearParts {
  const PlanedMatrix* matrix = nullptr;
  const Outliers* outliers = nullptr;  // or null
  Norm norm{};
  Rotation rotation{};
  std::array<int8_t, kMaxBits + 1> magnitude_bits{};  // of the activations, by width
};

struct LayerParts {
  LinearParts qkv, o, gate_up, down;
};

struct EmbeddingParts {
  const PlanedMatrix* matrix = nullptr;  // read at all its planes
  const Outliers* outliers = nullptr;    // or null
  Rotation rotation{};
  const float* gain = nullptr;  // (hidden) or null
};

struct DecoderParts {
  AttentionShape attention{};
  float score_scale = 1;
  EmbeddingParts embedding;
  std::vector<LayerParts> layers;
  LinearParts head;
};

// The next tokens of one sequence. The cache holds all layers: (layers, 2, kv_heads, capacity, head_dim), keys first,
// as in KvView, or it is planes, where `table` is not null. cos and sin are tables of num_table_rows positions.
struct StepSequence {
  int64_t tokens;
  int64_t position;
  void* cache;
  KvType type;
  int64_t capacity;
  const float* cos;
  const float* sin;
  int64_t num_table_rows;
  const PlanesTable* table = nullptr;
};

enum class Logits { none, last, all };  // of which tokens of each sequence

struct StepInput {
  const int32_t* tokens = nullptr;  // of the sequences one after another
  std::vector<StepSequence> sequences;
  const uint8_t* widths = nullptr;  // planes to read: qkv, o, gate_up, down of each layer, then the head
  int64_t num_widths = 0;
  Logits logits = Logits::last;

  int64_t num_tokens() const;
  int64_t num_logits() const;  // rows
};

// What a step's time goes to, in the order in which a layer needs it.
enum class Stage { embed, prepare, qkv, rope, attention, merge, o, gate_up, down, head, count };

using StageTimes = std::array<int64_t, static_cast<size_t>(Stage::count)>;  // ns

class Workspace;

// Steps of different callers may run at the same time.
class Decoder {
 public:
  // Throws std::invalid_argument for parts that do not fit together.
  explicit Decoder(DecoderParts parts);
  ~Decoder();

  const DecoderParts& parts() const { return parts_; }
  int64_t hidden() const { return parts_.embedding.matrix->in_features(); }
  int64_t vocab_size() const { return parts_.head.matrix->rows(); }

  // logits: (num_logits, vocab_size). Writes the caches. With `times` the step's time is added to it by stage. Returns
  // whether the logits, or without any the residual stream, are finite.
  // Throws std::invalid_argument for tokens, widths, positions or caches outside the model, before anything is written.
  bool step(const StepInput& input, float* logits, StageTimes* times);

 private:
  void check(const StepInput& input) const;

  struct Widths {
    uint8_t least, largest;
  };

  DecoderParts parts_;
  std::vector<Widths> widths_;  // of the matrices in the order of StepInput, side by side
  std::mutex mutex_;            // guards idle_
  std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace taper
