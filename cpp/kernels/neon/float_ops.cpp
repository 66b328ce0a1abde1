// The float operations of the neon table.
#include "kernels/common/anda.hpp"
#include "kernels/common/attention.hpp"
#include "kernels/common/lanes.hpp"
#include "kernels/common/planes_attention.hpp"
#include "kernels/common/planes_store.hpp"
#include "kernels/neon/ints.hpp"
#include "kernels/neon/neon.hpp"
#include "kernels/neon/vec16.hpp"

namespace taper::neon {

void rms_norm(const float* x, const float* gain, float eps, int64_t n, float* y) {
  lanes::rms_norm<Vec16>(x, gain, eps, n, y);
}

void rotate(float* x, const float* signs, int64_t n, int64_t block, bool inverse) {
  lanes::rotate<Vec16>(x, signs, n, block, inverse);
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) { lanes::swiglu<Vec16>(gate, up, n, y); }

void exp(const float* x, int64_t n, float* y) { lanes::exp<Vec16>(x, n, y); }

void rope_store(float* qkv, int64_t heads, const KvView& kv, int64_t position, const float* cos, const float* sin) {
  lanes::rope_store<Vec16>(qkv, heads, kv, position, cos, sin);
}

void attention(const AttentionArgs& args, const AttentionState& out) { lanes::attention<Vec16>(args, out); }

void attention_merge(int64_t heads, int64_t head_dim, const AttentionState& chunk, const AttentionState& into) {
  lanes::attention_merge<Vec16>(heads, head_dim, chunk, into);
}

void attention_finish(int64_t heads, int64_t head_dim, const AttentionState& state, float* out) {
  lanes::attention_finish<Vec16>(heads, head_dim, state, out);
}

void planes_store(float* qkv, int64_t heads, const PlanesFormat& format, const PlanesBlock& block, int64_t entry,
                  const float* cos, const float* sin) {
  lanes::planes_store<Vec16>(qkv, heads, format, block, entry, cos, sin);
}

void planes_attention(const PlanesAttentionArgs& args, const AttentionState& out) {
  lanes::planes_attention<Vec16, Ints>(args, out);
}

bool anda_exponents(const void* x, const AndaRow& row, uint8_t* exponents) {
  return lanes::anda_exponents<lanes::BytesWord<Vec16>>(x, row, exponents);
}

void anda_pack(const void* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words) {
  lanes::anda_pack<lanes::BytesWord<Vec16>>(x, row, exponents, truncate, words);
}

void anda_unpack(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, void* x) {
  lanes::anda_unpack<lanes::BytesWord<Vec16>>(words, row, exponents, bits, x);
}

}  // namespace taper::neon
