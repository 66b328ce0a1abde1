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

unsigned char* allocate(int64_t tokens, int64_t cols, bool wide) {
  require(tokens >= 1, "activations have ", tokens, " rows, expected at least 1");
  require(cols >= 1 && cols % kColumnAlignment == 0, "activations have ", cols, " columns, expected a multiple of ",
          kColumnAlignment);
  const int64_t parts = wide ? 2 : 1, bytes = tokens * (parts * (cols + sizeof(int32_t)) + sizeof(float));
  return static_cast<unsigned char*>(::operator new[](bytes, kAlignment));
}

void check_prepare(int64_t n, const Rotation& rotation, int magnitude_bits, const Activations& out) {
  require(n >= 1, "rows have ", n, " elements, expected at least 1");
  require(padded_cols(n) == out.cols(), "cols is ", out.cols(), ", expected ", padded_cols(n), " for rows of ", n);
  require(magnitude_bits >= 1 && magnitude_bits <= kMaxMagnitudeBits, "magnitude_bits is ", magnitude_bits,
          ", expected 1..", kMaxMagnitudeBits);
  require(out.wide() == (magnitude_bits > kNarrowMagnitudeBits), "magnitude_bits is ", magnitude_bits,
          ", but the rows ", out.wide() ? "have" : "lack", " low parts");
  if (rotation.signs != nullptr) check_block(n, rotation.block);
}

// Runs fill(token, row buffer of n floats) -> rotate -> quantise for every token.
template <class Fill>
void for_each_token(int64_t n, const Rotation& rotation, int magnitude_bits, const Activations& out, const Fill& fill) {
  check_prepare(n, rotation, magnitude_bits, out);
  const Kernels& table = kernels();
  const Plan plan = plan_items(out.tokens(), n * kPsPerElement, num_threads());
  parallel_for(out.tokens(), plan.chunk, plan.threads, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> row;
    row.resize(std::max<size_t>(row.size(), n));
    for (int64_t t = begin; t < end; ++t) {
      const float* ready = fill(table, t, row.data());
      if (rotation.signs != nullptr) {
        if (ready != row.data()) std::copy(ready, ready + n, row.data());
        table.rotate(row.data(), rotation.signs, n, rotation.block, false);
        ready = row.data();
      }
      table.quantize(ready, n, out.cols(), magnitude_bits, out.row(t));
    }
  });
}

}  // namespace

void Activations::Free::operator()(unsigned char* memory) const { ::operator delete[](memory, kAlignment); }

Activations::Activations(int64_t tokens, int64_t cols, bool wide)
    : tokens_(tokens), cols_(cols), wide_(wide), memory_(allocate(tokens, cols, wide)) {}

void prepare(const float* x, int64_t n, const Norm& norm, const Rotation& rotation, int magnitude_bits,
             const Activations& out) {
  for_each_token(n, rotation, magnitude_bits, out, [&](const Kernels& table, int64_t t, float* row) -> const float* {
    if (!norm.enabled) return x + t * n;
    table.rms_norm(x + t * n, norm.gain, norm.eps, n, row);
    return row;
  });
}

void prepare_swiglu(const float* gate_up, int64_t n, const Rotation& rotation, int magnitude_bits,
                    const Activations& out) {
  for_each_token(n, rotation, magnitude_bits, out, [&](const Kernels& table, int64_t t, float* row) -> const float* {
    const float* gate = gate_up + t * 2 * n;
    table.swiglu(gate, gate + n, n, row);
    return row;
  });
}

}  // namespace taper
