// docs/numerics.md as plain scalar code: the oracle, and the way on a processor that has nothing better.
#pragma once

#include "taper/kernels.hpp"

namespace taper::reference {

void planes_gemv(const PlanesView&, const ActivationsView&, const OutputView&, int64_t row_begin, int64_t row_end);
void planes_gemm(const PlanesView&, const ActivationsView&, const OutputView&, int64_t row_begin, int64_t row_end);
void planes_unpack(const PlanesView&, int64_t row, int8_t* out);
void rms_norm(const float* x, const float* gain, float eps, int64_t n, float* y);
void rotate(float* x, const float* signs, int64_t n, int64_t block, bool inverse);
void quantize(const float* x, int64_t n, int64_t cols, int magnitude_bits, const QuantizedRow& out);
void swiglu(const float* gate, const float* up, int64_t n, float* y);
void exp(const float* x, int64_t n, float* y);
void rope_store(float* qkv, int64_t heads, const KvView& kv, int64_t position, const float* cos, const float* sin);
void attention(const AttentionArgs& args, const AttentionState& out);
void attention_merge(int64_t heads, int64_t head_dim, const AttentionState& chunk, const AttentionState& into);
void attention_finish(int64_t heads, int64_t head_dim, const AttentionState& state, float* out);
void planes_store(float* qkv, int64_t heads, const PlanesFormat& format, const PlanesBlock& block, int64_t entry,
                  const float* cos, const float* sin);
void planes_attention(const PlanesAttentionArgs& args, const AttentionState& out);
bool anda_exponents(const void* x, const AndaRow& row, uint8_t* exponents);
void anda_pack(const void* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words);
void anda_unpack(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, void* x);

// One element of `exp`.
float exp32(float x);
// A softmax's weight.
float weight32(float x);

// Rotates the pairs of one head.
void rope(float* head, int64_t half, const float* cos, const float* sin);

}  // namespace taper::reference
