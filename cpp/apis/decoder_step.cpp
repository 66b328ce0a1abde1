#include "apis/decoder_step.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>

#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

// 2048 elements take 1.4 us with norm and rotation (AVX-512); embedding and RoPE are in that range.
constexpr int64_t kPsPerElement = 700;

// Gates and ups at once, in floats: an eighth of the L2 of a Xeon with AMX, a quarter of Zen 4's.
constexpr int64_t kGateUpFloats = 64 * 1024;
constexpr int64_t kLeastGateUpRows = 32;  // that a matrix kernel multiplies together

// Phases of a layer, in this order; `embed` comes before the first layer, two of the head after the last.
enum Part { kPrepareQkv, kQkv, kRope, kAttention, kPrepareO, kO, kPrepareGateUp, kGateUp, kPrepareDown, kDown, kParts };

constexpr Stage kStages[kParts] = {Stage::prepare, Stage::qkv,     Stage::rope,    Stage::attention, Stage::merge,
                                   Stage::o,       Stage::prepare, Stage::gate_up, Stage::prepare,   Stage::down};

// Exponents of all ones are infinities and NaN.
bool all_finite(const float* x, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= (std::bit_cast<uint32_t>(x[i]) & 0x7f800000u) == 0x7f800000u;
  return found == 0;
}

class Step final : public Program {
 public:
  Step(const DecoderParts& parts, const StepInput& input, Workspace& workspace, float* logits, StageTimes* times)
      : parts_(parts),
        input_(input),
        kernels_(kernels()),
        work_(workspace),
        logits_(logits),
        times_(times),
        threads_(num_threads()),
        layers_(static_cast<int64_t>(parts.layers.size())),
        hidden_(parts.embedding.matrix->in_features()),
        mixed_width_(parts.attention.heads * parts.attention.head_dim),
        rows_(input.num_tokens()),
        embedding_(parts.embedding.matrix->view(parts.embedding.matrix->max_bits())),
        x_(workspace.x.at_least(rows_ * hidden_)),
        qkv_(workspace.qkv.at_least(rows_ * parts.attention.qkv_width())),
        mixed_(workspace.mixed.at_least(rows_ * mixed_width_)),
        attention_(&workspace.all) {
    std::vector<Span> spans, last;
    int64_t row = 0;
    for (const StepSequence& sequence : input.sequences) {
      spans.push_back({row, sequence.tokens, sequence.position});
      last.push_back({static_cast<int64_t>(last.size()), 1, sequence.position + sequence.tokens - 1});
      for (int64_t t = 0; t < sequence.tokens; ++t) places_.push_back({last.size() - 1, sequence.position + t});
      for (int64_t t = 0; t < sequence.tokens;) {
        t += rows_of_one_thread({{}, sequence.table}, sequence.position + t, sequence.tokens - t);
        run_starts_.push_back(row + t);
      }
      row += sequence.tokens;
    }
    work_.all.reset(spans);
    if (input.logits == Logits::last) work_.wanted.reset(last);
    caches_.resize(spans.size());
  }

  int64_t phases() const { return 1 + layers_ * kParts + 2; }

  int64_t begin(int64_t phase) override {
    count_time(stage_of(phase));
    if (phase == 0) return split(rows_, plan_items(rows_, hidden_ * kPsPerElement, threads_));
    layer_ = (phase - 1) / kParts;
    if (layer_ == layers_) return begin_head((phase - 1) % kParts);
    part_ = static_cast<Part>((phase - 1) % kParts);
    if (layer_ + 1 == layers_ && part_ == kAttention) keep_wanted_rows();
    return rows_ == 0 ? 0 : begin_part(parts_.layers[static_cast<size_t>(layer_)]);
  }

  void run(int64_t phase, int64_t piece) override {
    const int64_t begin = piece * chunk_, end = std::min(begin + chunk_, count_);
    if (phase == 0) {
      for (int64_t row = begin; row < end; ++row) embed(row);
    } else if (layer_ == layers_) {
      (phase - 1) % kParts == 0 ? prepare(begin, end, x_, hidden_) : multiply_head(begin, end);
    } else {
      run_part(begin, end);
    }
  }

  // After the last phase: whether the logits, or what came before the last layer's attention, are finite.
  bool finish() {
    count_time(Stage::count);
    return input_.logits == Logits::none ? all_finite(x_, input_.num_tokens() * hidden_) : finite_.load();
  }

 private:
  struct Place {
    size_t sequence;
    int64_t position;
  };

  Stage stage_of(int64_t phase) const {
    if (phase == 0) return Stage::embed;
    const int64_t part = (phase - 1) % kParts;
    if ((phase - 1) / kParts == layers_) return part == 0 ? Stage::prepare : Stage::head;
    return kStages[part];
  }

  // Adds the time since the last call to the stage that was named there.
  void count_time(Stage next) {
    if (times_ == nullptr) return;
    const auto now = std::chrono::steady_clock::now();
    if (stage_ != Stage::count) {
      (*times_)[static_cast<size_t>(stage_)] +=
          std::chrono::duration_cast<std::chrono::nanoseconds>(now - since_).count();
    }
    stage_ = next;
    since_ = now;
  }

  // The phase runs over [0, count) in pieces of the plan. Returns their number.
  int64_t split(int64_t count, const Plan& plan) {
    count_ = count;
    chunk_ = plan.threads == 1 ? count : std::max(plan.chunk, (count + kMaxPieces - 1) / kMaxPieces);
    return (count + chunk_ - 1) / chunk_;
  }

  int64_t begin_part(const LayerParts& layer) {
    const int64_t inner = layer.down.matrix->in_features();
    switch (part_) {
      case kPrepareQkv:
        return begin_prepare(layer.qkv, 0);
      case kQkv:
      case kO:
      case kDown:
        return begin_multiply(weights_.rows);
      case kRope:
        set_caches();
        return split(runs(),
                     plan_items(runs(), rows_ * parts_.attention.qkv_width() * kPsPerElement / runs(), threads_));
      case kAttention:
        return split(attention_->items(), plan_items(attention_->items(), item_ps(), threads_));
      case kPrepareO:
        return begin_prepare(layer.o, 1);
      case kPrepareGateUp:
        return begin_prepare(layer.gate_up, 2);
      case kGateUp:
        inner_ = work_.inner.at_least(rows_ * inner);
        return begin_multiply(inner, 2);
      default:
        return begin_prepare(layer.down, 3);
    }
  }

  int64_t begin_head(int64_t part) {
    if (rows_ == 0) return 0;
    return part == 0 ? begin_prepare(parts_.head, 0) : begin_multiply(weights_.rows);
  }

  // From here on `linear` is the matrix at hand.
  int64_t begin_prepare(const LinearParts& linear, int64_t index) {
    linear_ = &linear;
    const int bits = input_.widths[layer_ * 4 + index];
    weights_ = linear.matrix->view(bits);
    magnitude_bits_ = linear.magnitude_bits[static_cast<size_t>(bits)];
    work_.input.reshape(rows_, weights_.cols, magnitude_bits_ > kNarrowMagnitudeBits, packs(kernels_, rows_));
    inputs_ = work_.input.view();
    return split(rows_, plan_prepare(work_.input, weights_.cols * kPsPerElement));
  }

  // Pieces of [0, rows), of which each stands for `matrices` rows of the weights.
  int64_t begin_multiply(int64_t rows, int64_t matrices = 1) {
    const int64_t input_rows = rows_ * (work_.input.wide() ? 2 : 1), cols = weights_.cols * matrices;
    const MatmulPlan plan = plan_matmul(rows, cols, weights_.bits, input_rows, kernels_.gemm_inputs, threads_);
    kernel_ = plan.gemm ? kernels_.planes_gemm : kernels_.planes_gemv;
    return split(rows, plan.rows);
  }

  int64_t item_ps() const {
    int64_t entries = 0;
    for (const Place& place : places_) entries += place.position + 1;
    return std::max<int64_t>(1, entries * mixed_width_ * kPsPerProduct / std::max<int64_t>(1, attention_->items()));
  }

  void run_part(int64_t begin, int64_t end) {
    const int64_t inner = weights_.rows / 2;
    switch (part_) {
      case kPrepareQkv:
      case kPrepareGateUp:
        return prepare(begin, end, x_, hidden_);
      case kQkv:
        return multiply(begin, end, {qkv_, nullptr, weights_.rows});
      case kRope:
        for (int64_t row = run_starts_[static_cast<size_t>(begin)]; row < run_starts_[static_cast<size_t>(end)];
             ++row) {
          rope(row);
        }
        return;
      case kAttention:
        for (int64_t i = begin; i < end; ++i) {
          attention_->run(kernels_, i, qkv_, parts_.attention.qkv_width(), caches_.data(), parts_.score_scale);
        }
        return;
      case kPrepareO:
        for (int64_t row = begin; row < end; ++row) attention_->finish(kernels_, row, mixed_ + row * mixed_width_);
        return prepare(begin, end, mixed_, mixed_width_);
      case kGateUp:
        return multiply_gate_up(begin, end, inner);
      case kPrepareDown:
        return prepare(begin, end, inner_, linear_->matrix->in_features());
      default:
        return multiply(begin, end, {x_, x_, weights_.rows});
    }
  }

  void embed(int64_t row) {
    const EmbeddingParts& embedding = parts_.embedding;
    const int64_t token = input_.tokens[row];
    float* x = x_ + row * hidden_;
    embedding.matrix->read_row(kernels_, token, embedding_, x);
    if (embedding.outliers != nullptr) embedding.outliers->add_rows(&token, 1, x);
    if (embedding.rotation.signs != nullptr) {
      kernels_.rotate(x, embedding.rotation.signs, hidden_, embedding.rotation.block, true);
    }
    for (int64_t i = 0; embedding.gain != nullptr && i < hidden_; ++i) x[i] *= embedding.gain[i];
  }

  void prepare(int64_t begin, int64_t end, const float* x, int64_t n) {
    for (int64_t row = begin; row < end; ++row) {
      prepare_row(kernels_, x + row * n, n, linear_->norm, linear_->rotation, magnitude_bits_, work_.input, row);
    }
    pack_rows(kernels_, work_.input, begin, end);
  }

  void multiply(int64_t begin, int64_t end, const OutputView& output) {
    kernel_(weights_, inputs_, output, begin, end);
    if (linear_->outliers != nullptr) linear_->outliers->add_product_rows(inputs_, weights_.cols, begin, end, output);
  }

  // Gates and what they weigh do not leave the L2, however large a piece is.
  void multiply_gate_up(int64_t begin, int64_t end, int64_t inner) {
    const int64_t fit = kGateUpFloats / (2 * rows_) / kLeastGateUpRows * kLeastGateUpRows;
    const int64_t at_once = std::max(fit, kLeastGateUpRows);
    for (int64_t row = begin; row < end; row += at_once) gate_up_rows(row, std::min(row + at_once, end), inner);
  }

  void gate_up_rows(int64_t begin, int64_t end, int64_t inner) {
    thread_local std::vector<float> memory;
    const int64_t width = end - begin;
    memory.resize(std::max<size_t>(memory.size(), static_cast<size_t>(2 * rows_ * width)));
    float *gate = memory.data(), *up = gate + rows_ * width;
    multiply(begin, end, {gate, nullptr, width, begin});
    multiply(inner + begin, inner + end, {up, nullptr, width, inner + begin});
    for (int64_t row = 0; row < rows_; ++row) {
      kernels_.swiglu(gate + row * width, up + row * width, width, inner_ + row * inner + begin);
    }
  }

  void multiply_head(int64_t begin, int64_t end) {
    multiply(begin, end, {logits_, nullptr, weights_.rows});
    for (int64_t row = 0; row < rows_; ++row) {
      if (!all_finite(logits_ + row * weights_.rows + begin, end - begin)) finite_.store(false);
    }
  }

  void rope(int64_t row) {
    const auto [sequence, position] = places_[static_cast<size_t>(row)];
    const StepSequence& of = input_.sequences[sequence];
    const int64_t half = parts_.attention.head_dim / 2;
    store_token(kernels_, qkv_ + row * parts_.attention.qkv_width(), parts_.attention.heads, caches_[sequence],
                position, of.cos + position * half, of.sin + position * half);
  }

  int64_t runs() const { return static_cast<int64_t>(run_starts_.size()) - 1; }

  // The caches' part of this layer.
  void set_caches() {
    const AttentionShape& shape = parts_.attention;
    for (size_t i = 0; i < caches_.size(); ++i) {
      const StepSequence& sequence = input_.sequences[i];
      if (sequence.table != nullptr) {
        caches_[i] = {{}, sequence.table, layer_};
        continue;
      }
      const int64_t bytes =
          shape.kv_heads * sequence.capacity * shape.head_dim * (sequence.type == KvType::f16 ? 2 : 4);
      char* keys = static_cast<char*>(sequence.cache) + layer_ * 2 * bytes;
      caches_[i] = {{keys, keys + bytes, sequence.type, shape.kv_heads, sequence.capacity, shape.head_dim}};
    }
  }

  // In the last layer the other rows have to leave their keys and values, and nobody asks for the rest.
  void keep_wanted_rows() {
    if (input_.logits == Logits::all) return;
    if (input_.logits == Logits::none) {
      rows_ = 0;
      return;
    }
    const int64_t width = parts_.attention.qkv_width();
    int64_t row = -1, kept = 0;
    std::vector<Place> places;
    for (const StepSequence& sequence : input_.sequences) {
      row += sequence.tokens;
      if (row != kept) {  // lower rows are done with
        std::copy_n(x_ + row * hidden_, hidden_, x_ + kept * hidden_);
        std::copy_n(qkv_ + row * width, width, qkv_ + kept * width);
      }
      places.push_back(places_[static_cast<size_t>(row)]);
      ++kept;
    }
    places_ = std::move(places);
    rows_ = kept;
    attention_ = &work_.wanted;
  }

  const DecoderParts& parts_;
  const StepInput& input_;
  const Kernels& kernels_;
  Workspace& work_;
  float* logits_;
  StageTimes* times_;
  const int threads_;
  const int64_t layers_, hidden_, mixed_width_;
  int64_t rows_;
  const PlanesView embedding_;
  float *x_, *qkv_, *mixed_, *inner_ = nullptr;
  std::vector<Place> places_;           // of the rows
  std::vector<int64_t> run_starts_{0};  // rows that one thread stores, and the end
  std::vector<CacheView> caches_;
  AttentionWork* attention_;

  // The phase at hand.
  int64_t layer_ = 0, count_ = 0, chunk_ = 1;
  Part part_ = kPrepareQkv;
  const LinearParts* linear_ = nullptr;
  PlanesView weights_{};
  ActivationsView inputs_{};
  int magnitude_bits_ = kNarrowMagnitudeBits;
  void (*kernel_)(const PlanesView&, const ActivationsView&, const OutputView&, int64_t, int64_t) = nullptr;
  std::atomic<bool> finite_{true};
  Stage stage_ = Stage::count;
  std::chrono::steady_clock::time_point since_;
};

}  // namespace

bool run_step(const DecoderParts& parts, const StepInput& input, Workspace& workspace, float* logits,
              StageTimes* times) {
  Step step(parts, input, workspace, logits, times);
  run_program(step, step.phases(), num_threads());
  return step.finish();
}

}  // namespace taper
