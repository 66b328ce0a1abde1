#include <cmath>
#include <limits>

#include "kernels/reference/half.hpp"
#include "kernels/reference/reference.hpp"
#include "kernels/reference/sum16.hpp"

namespace taper::reference {
namespace {

float element(const void* data, KvType type, int64_t offset) {
  if (type == KvType::f32) return static_cast<const float*>(data)[offset];
  return from_half(static_cast<const uint16_t*>(data)[offset]);
}

void store(void* data, KvType type, int64_t offset, float value) {
  if (type == KvType::f32) {
    static_cast<float*>(data)[offset] = value;
  } else {
    static_cast<uint16_t*>(data)[offset] = to_half(value);
  }
}

// Of element i of a key, or of a value, of one KV head.
int64_t key_offset(int64_t head_dim, int64_t t, int64_t i) {
  return (t / kKeyBlock * head_dim + i) * kKeyBlock + t % kKeyBlock;
}

int64_t value_offset(int64_t head_dim, int64_t t, int64_t i) { return t * head_dim + i; }

// One head over one chunk.
void attend(const float* q, const AttentionArgs& args, float* max, float* sum, float* acc) {
  const int64_t dim = args.head_dim;
  float w[kAttentionChunk];
  *max = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < args.num_entries; ++t) {
    float score = 0.0f;
    for (int64_t i = 0; i < dim; ++i) {
      score = std::fma(q[i], element(args.keys, args.type, key_offset(dim, t, i)), score);
    }
    w[t] = score * args.scale;
    if (w[t] > *max) *max = w[t];
  }
  for (int64_t t = 0; t < args.num_entries; ++t) w[t] = weight32(w[t] - *max);
  *sum = sum16(w, args.num_entries);
  for (int64_t i = 0; i < dim; ++i) {
    acc[i] = 0.0f;
    for (int64_t t = 0; t < args.num_entries; ++t) {
      acc[i] = std::fma(w[t], element(args.values, args.type, value_offset(dim, t, i)), acc[i]);
    }
  }
}

}  // namespace

void rope(float* head, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; ++i) {
    const float x0 = head[i], x1 = head[i + half];
    head[i] = std::fma(-x1, sin[i], x0 * cos[i]);
    head[i + half] = std::fma(x0, sin[i], x1 * cos[i]);
  }
}

void rope_store(float* qkv, int64_t heads, const KvView& kv, int64_t position, const float* cos, const float* sin) {
  const int64_t dim = kv.head_dim;
  for (int64_t h = 0; h < heads + kv.kv_heads; ++h) rope(qkv + h * dim, dim / 2, cos, sin);
  const float* keys = qkv + heads * dim;
  const float* values = keys + kv.kv_heads * dim;
  for (int64_t h = 0; h < kv.kv_heads; ++h) {
    const int64_t head = h * kv.capacity * dim;
    for (int64_t i = 0; i < dim; ++i) {
      store(kv.keys, kv.type, head + key_offset(dim, position, i), keys[h * dim + i]);
      store(kv.values, kv.type, head + value_offset(dim, position, i), values[h * dim + i]);
    }
  }
}

void attention(const AttentionArgs& args, const AttentionState& out) {
  for (int64_t h = 0; h < args.heads; ++h) {
    attend(args.q + h * args.head_dim, args, out.max + h, out.sum + h, out.acc + h * args.head_dim);
  }
}

void attention_merge(int64_t heads, int64_t head_dim, const AttentionState& chunk, const AttentionState& into) {
  for (int64_t h = 0; h < heads; ++h) {
    const float max = chunk.max[h] > into.max[h] ? chunk.max[h] : into.max[h];
    const float a = exp32(into.max[h] - max), b = exp32(chunk.max[h] - max);
    into.max[h] = max;
    into.sum[h] = std::fma(into.sum[h], a, chunk.sum[h] * b);
    for (int64_t i = h * head_dim; i < (h + 1) * head_dim; ++i) {
      into.acc[i] = std::fma(into.acc[i], a, chunk.acc[i] * b);
    }
  }
}

void attention_finish(int64_t heads, int64_t head_dim, const AttentionState& state, float* out) {
  for (int64_t h = 0; h < heads; ++h) {
    const float factor = 1.0f / state.sum[h];
    for (int64_t i = h * head_dim; i < (h + 1) * head_dim; ++i) out[i] = state.acc[i] * factor;
  }
}

}  // namespace taper::reference
