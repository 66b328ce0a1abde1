#include "apis/decoder.hpp"

#include <utility>

#include "apis/check.hpp"
#include "apis/decoder_step.hpp"
#include "apis/rows.hpp"

namespace taper {
namespace {

// Workspaces of steps up to so many rows are kept: a decode step should not allocate, and a prefill's would hold tens
// of megabytes.
constexpr int64_t kKeptRows = 16;

void check_linear(const char* name, const LinearParts& linear, int64_t in_features, int64_t rows) {
  const PlanedMatrix& matrix = *linear.matrix;
  require(matrix.in_features() == in_features && matrix.rows() == rows, name, " is (", matrix.rows(), ", ",
          matrix.in_features(), "), expected (", rows, ", ", in_features, ")");
  require(
      linear.outliers == nullptr || (linear.outliers->rows() == rows && linear.outliers->in_features() == in_features),
      "the outliers of ", name, " have another shape");
  if (linear.rotation.signs != nullptr) check_block(in_features, linear.rotation.block);
  for (int bits = matrix.min_bits(); bits <= matrix.max_bits(); ++bits) {
    const int magnitude = linear.magnitude_bits[static_cast<size_t>(bits)];
    require(magnitude >= 1 && magnitude <= kMaxMagnitudeBits, name, " at ", bits, " bits has activations of ",
            magnitude, " bits, expected 1..", kMaxMagnitudeBits);
  }
}

}  // namespace

int64_t StepInput::num_tokens() const {
  int64_t count = 0;
  for (const StepSequence& sequence : sequences) count += sequence.tokens;
  return count;
}

int64_t StepInput::num_logits() const {
  if (logits == Logits::none) return 0;
  return logits == Logits::all ? num_tokens() : static_cast<int64_t>(sequences.size());
}

Decoder::Decoder(DecoderParts parts) : parts_(std::move(parts)) {
  check_shape(parts_.attention);
  require(parts_.attention.head_dim % 2 == 0, "head_dim is ", parts_.attention.head_dim, ", expected an even number");
  require(!parts_.layers.empty(), "a decoder needs at least one layer");
  const int64_t width = hidden(), mixed = parts_.attention.heads * parts_.attention.head_dim;
  if (parts_.embedding.rotation.signs != nullptr) check_block(width, parts_.embedding.rotation.block);
  for (const LayerParts& layer : parts_.layers) {
    const int64_t inner = layer.down.matrix->in_features();
    check_linear("qkv", layer.qkv, width, parts_.attention.qkv_width());
    check_linear("o", layer.o, mixed, width);
    check_linear("gate_up", layer.gate_up, width, 2 * inner);
    check_linear("down", layer.down, inner, width);
  }
  check_linear("head", parts_.head, width, parts_.head.matrix->rows());
  const auto add_widths = [&](const LinearParts& linear) {
    widths_.push_back(
        {static_cast<uint8_t>(linear.matrix->min_bits()), static_cast<uint8_t>(linear.matrix->max_bits())});
  };
  for (const LayerParts& layer : parts_.layers) {
    for (const LinearParts* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) add_widths(*linear);
  }
  add_widths(parts_.head);
}

Decoder::~Decoder() = default;

void Decoder::check(const StepInput& input) const {
  require(!input.sequences.empty(), "a step needs at least one sequence");
  for (const StepSequence& sequence : input.sequences) {
    require(sequence.tokens >= 1, "a sequence brings ", sequence.tokens, " tokens, expected at least 1");
    if (sequence.table != nullptr) {
      const PlanesLayout& layout = *sequence.table->layout;
      require(layout.layers() == static_cast<int64_t>(parts_.layers.size()) &&
                  layout.kv_heads() == parts_.attention.kv_heads && layout.head_dim() == parts_.attention.head_dim,
              "a KV cache is for ", layout.layers(), " layers of ", layout.kv_heads(), " heads of ", layout.head_dim(),
              " elements, the model has ", parts_.layers.size(), " of ", parts_.attention.kv_heads, " of ",
              parts_.attention.head_dim);
      check_table(*sequence.table, sequence.position, sequence.tokens);
    } else {
      require(sequence.position >= 0 && sequence.position + sequence.tokens <= sequence.capacity, "positions ",
              sequence.position, "..", sequence.position + sequence.tokens - 1, " are outside a KV cache of ",
              sequence.capacity);
    }
    require(sequence.position + sequence.tokens <= sequence.num_table_rows, "position ",
            sequence.position + sequence.tokens - 1, " is outside RoPE tables of ", sequence.num_table_rows, " rows");
  }
  const int64_t vocabulary = parts_.embedding.matrix->rows(), count = input.num_tokens();
  for (int64_t i = 0; i < count; ++i) {
    require(input.tokens[i] >= 0 && input.tokens[i] < vocabulary, "token ", input.tokens[i],
            " is outside the vocabulary 0..", vocabulary - 1);
  }
  const int64_t num_widths = static_cast<int64_t>(widths_.size());
  require(input.num_widths == num_widths, "widths has ", input.num_widths, " elements, expected ", num_widths);
  for (size_t i = 0; i < widths_.size(); ++i) {
    require(input.widths[i] >= widths_[i].least && input.widths[i] <= widths_[i].largest, "bits ", input.widths[i],
            " is outside a matrix's ", widths_[i].least, "..", widths_[i].largest);
  }
}

bool Decoder::step(const StepInput& input, float* logits, StageTimes* times) {
  check(input);
  std::unique_ptr<Workspace> workspace;
  {
    std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      workspace = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (workspace == nullptr) workspace = std::make_unique<Workspace>(parts_.attention);
  const bool finite = run_step(parts_, input, *workspace, logits, times);
  if (input.num_tokens() <= kKeptRows) {
    std::lock_guard lock(mutex_);
    idle_.push_back(std::move(workspace));
  }
  return finite;
}

}  // namespace taper
