#include <cmath>
#include <limits>

#include "kernels/reference/half.hpp"
#include "kernels/reference/reference.hpp"
#include "kernels/reference/sum16.hpp"

namespace taper::reference {
namespace {

// Entry `index` of one head's keys or values, in either type.
struct Entry {
  const void* data;
  KvType type;
  int64_t offset;  // elements

  float operator[](int64_t i) const {
    if (type == KvType::f32) return static_cast<const float*>(data)[offset + i];
    return from_half(static_cast<const uint16_t*>(data)[offset + i]);
  }
};

void store(void* data, KvType type, int64_t offset, float value) {
  if (type == KvType::f32) {
    static_cast<float*>(data)[offset] = value;
  } else {
    static_cast<uint16_t*>(data)[offset] = to_half(value);
  }
}

int64_t entry_offset(const KvView& kv, int64_t kv_head, int64_t position) {
  return (kv_head * kv.capacity + position) * kv.head_dim;
}

void rope(float* head, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; ++i) {
    const float x0 = head[i], x1 = head[i + half];
    head[i] = std::fma(-x1, sin[i], x0 * cos[i]);
    head[i + half] = std::fma(x0, sin[i], x1 * cos[i]);
  }
}

void attend(const float* q, const AttentionArgs& args, int64_t kv_head, int64_t num_entries, float* out) {
  const KvView& kv = args.kv;
  float* w = args.scratch;
  float max = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < num_entries; ++t) {
    w[t] = dot16(q, Entry{kv.keys, kv.type, entry_offset(kv, kv_head, t)}, kv.head_dim) * args.scale;
    if (w[t] > max) max = w[t];
  }
  for (int64_t t = 0; t < num_entries; ++t) w[t] = exp32(w[t] - max);
  const float inv = 1.0f / sum16(w, num_entries);
  for (int64_t d = 0; d < kv.head_dim; ++d) {
    float sum = 0.0f;
    for (int64_t t = 0; t < num_entries; ++t) {
      sum = std::fma(w[t], Entry{kv.values, kv.type, entry_offset(kv, kv_head, t)}[d], sum);
    }
    out[d] = sum * inv;
  }
}

}  // namespace

void rope_store(float* qkv, int64_t heads, const KvView& kv, int64_t position, const float* cos, const float* sin) {
  const int64_t dim = kv.head_dim;
  for (int64_t h = 0; h < heads + kv.kv_heads; ++h) rope(qkv + h * dim, dim / 2, cos, sin);
  const float* keys = qkv + heads * dim;
  const float* values = keys + kv.kv_heads * dim;
  for (int64_t h = 0; h < kv.kv_heads; ++h) {
    for (int64_t i = 0; i < dim; ++i) {
      store(kv.keys, kv.type, entry_offset(kv, h, position) + i, keys[h * dim + i]);
      store(kv.values, kv.type, entry_offset(kv, h, position) + i, values[h * dim + i]);
    }
  }
}

void attention(const AttentionArgs& args, int64_t token, int64_t kv_head) {
  const int64_t dim = args.kv.head_dim, group = args.heads / args.kv.kv_heads;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    attend(args.q + token * args.q_stride + h * dim, args, kv_head, args.position + token + 1,
           args.out + (token * args.heads + h) * dim);
  }
}

}  // namespace taper::reference
