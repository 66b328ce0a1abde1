#include "apis/activations.hpp"

#include <algorithm>
#include <vector>

#include "apis/check.hpp"
#include "apis/planes.hpp"
#include "apis/rows.hpp"
#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

// 2048 elements take 1.4 us with norm and rotation (AVX-512).
constexpr int64_t kPsPerElement = 700;

void check_prepare(int64_t n, const Rotation& rotation, int magnitude_bits, const Activations& out) {
  require(n >= 1, "rows have ", n, " elements, expected at least 1");
  require(padded_cols(n) == out.cols(), "cols is ", out.cols(), ", expected ", padded_cols(n), " for rows of ", n);
  require(magnitude_bits >= 1 && magnitude_bits <= kMaxMagnitudeBits, "magnitude_bits is ", magnitude_bits,
          ", expected 1..", kMaxMagnitudeBits);
  require(out.wide() == (magnitude_bits > kNarrowMagnitudeBits), "magnitude_bits is ", magnitude_bits,
          ", but the rows ", out.wide() ? "have" : "lack", " low parts");
  if (rotation.signs != nullptr) check_block(n, rotation.block);
}

// Floats of this thread.
float* scratch_row(int64_t n) {
  thread_local std::vector<float> row;
  row.resize(std::max<size_t>(row.size(), n));
  return row.data();
}

void rotate_and_quantize(const Kernels& kernels, const float* x, float* row, int64_t n, const Rotation& rotation,
                         int magnitude_bits, const Activations& out, int64_t token) {
  if (rotation.signs != nullptr) {
    if (x != row) std::copy(x, x + n, row);
    kernels.rotate(row, rotation.signs, n, rotation.block, false);
    x = row;
  }
  kernels.quantize(x, n, out.cols(), magnitude_bits, out.row(token));
}

// Runs body(token) for every token.
template <class Body>
void for_each_token(int64_t n, const Rotation& rotation, int magnitude_bits, const Activations& out, const Body& body) {
  check_prepare(n, rotation, magnitude_bits, out);
  const Plan plan = plan_prepare(out, n * kPsPerElement);
  parallel_for(out.tokens(), plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t);
    pack_rows(kernels(), out, begin, end);
  });
}

}  // namespace

void Activations::reshape(int64_t tokens, int64_t cols, bool wide, bool packed) {
  require(tokens >= 1, "activations have ", tokens, " rows, expected at least 1");
  require(cols >= 1 && cols % kColumnAlignment == 0, "activations have ", cols, " columns, expected a multiple of ",
          kColumnAlignment);
  tokens_ = tokens;
  cols_ = cols;
  wide_ = wide;
  packed_ = packed;
  const auto row_bytes = static_cast<int64_t>(parts() * (cols + sizeof(int32_t)) + sizeof(float));
  const int64_t bytes = tokens * row_bytes + (packed ? parts() * packed_bytes() : 0);
  if (bytes <= bytes_) return;
  memory_.reset(static_cast<unsigned char*>(allocate_pages(bytes)));
  bytes_ = bytes;
}

bool packs(const Kernels& kernels, int64_t tokens) {
  constexpr int64_t kLeastTokens = 64;
  return kernels.pack_inputs != nullptr && tokens >= kLeastTokens && tokens <= kMaxPieces * kPackedTokens;
}

void pack_rows(const Kernels& kernels, const Activations& out, int64_t begin, int64_t end) {
  if (!out.packed()) return;
  kernels.pack_inputs(out.q(), out.tokens(), out.cols(), begin, end, out.packed(false));
  if (out.wide()) kernels.pack_inputs(out.low(), out.tokens(), out.cols(), begin, end, out.packed(true));
}

Plan plan_prepare(const Activations& out, int64_t ps_each) {
  Plan plan = plan_items(out.tokens(), ps_each, num_threads());
  if (out.packed()) plan.chunk = (plan.chunk + kPackedTokens - 1) / kPackedTokens * kPackedTokens;
  return plan;
}

void prepare_row(const Kernels& kernels, const float* x, int64_t n, const Norm& norm, const Rotation& rotation,
                 int magnitude_bits, const Activations& out, int64_t token) {
  float* row = scratch_row(n);
  if (norm.enabled) kernels.rms_norm(x, norm.gain, norm.eps, n, row);
  rotate_and_quantize(kernels, norm.enabled ? row : x, row, n, rotation, magnitude_bits, out, token);
}

void prepare(const float* x, int64_t n, const Norm& norm, const Rotation& rotation, int magnitude_bits,
             const Activations& out) {
  const Kernels& table = kernels();
  for_each_token(n, rotation, magnitude_bits, out,
                 [&](int64_t t) { prepare_row(table, x + t * n, n, norm, rotation, magnitude_bits, out, t); });
}

void prepare_swiglu(const float* gate_up, int64_t n, const Rotation& rotation, int magnitude_bits,
                    const Activations& out) {
  const Kernels& table = kernels();
  for_each_token(n, rotation, magnitude_bits, out, [&](int64_t t) {
    float* row = scratch_row(n);
    table.swiglu(gate_up + t * 2 * n, gate_up + t * 2 * n + n, n, row);
    rotate_and_quantize(table, row, row, n, rotation, magnitude_bits, out, t);
  });
}

}  // namespace taper
