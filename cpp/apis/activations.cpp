#include "apis/activations.hpp"

#include <algorithm>
#include <new>
#include <vector>

#include "apis/check.hpp"
#include "apis/planes.hpp"
#include "apis/rows.hpp"
#include "heuristics/plan.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace taper {
namespace {

constexpr std::align_val_t kAlignment{64};

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
  const Plan plan = plan_items(out.tokens(), n * kPsPerElement, num_threads());
  parallel_for(out.tokens(), plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t);
  });
}

}  // namespace

void Activations::Free::operator()(unsigned char* memory) const { ::operator delete[](memory, kAlignment); }

void Activations::reshape(int64_t tokens, int64_t cols, bool wide) {
  require(tokens >= 1, "activations have ", tokens, " rows, expected at least 1");
  require(cols >= 1 && cols % kColumnAlignment == 0, "activations have ", cols, " columns, expected a multiple of ",
          kColumnAlignment);
  const int64_t parts = wide ? 2 : 1, bytes = tokens * (parts * (cols + sizeof(int32_t)) + sizeof(float));
  if (bytes > bytes_) {
    memory_.reset(static_cast<unsigned char*>(::operator new[](bytes, kAlignment)));
    bytes_ = bytes;
  }
  tokens_ = tokens;
  cols_ = cols;
  wide_ = wide;
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
