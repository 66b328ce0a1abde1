// A KV cache of planes: what is stored, and attention over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.hpp"
#include "kernels/reference/half.hpp"

namespace taper::checks {
namespace {

// A chunk of one layer on heap arrays of exactly the size that may be touched.
struct Cache {
  explicit Cache(const PlanesFormat& of) : format(of) {
    const int64_t plane = plane_bytes(of.head_dim), groups = of.head_dim / planes_group(of.head_dim);
    for (int64_t b = 0; b < kChunkBlocks; ++b) {
      parts.push_back({bytes<uint8_t>(of.kv_heads * (1 + of.key_upper) * plane),
                       bytes<uint8_t>(of.kv_heads * (of.key_bits - of.key_upper) * plane),
                       bytes<uint8_t>(of.kv_heads * (1 + of.value_upper) * plane),
                       bytes<uint8_t>(of.kv_heads * (of.value_bits - of.value_upper) * plane),
                       bytes<uint8_t>(of.kv_heads * groups * kExponentBytes),
                       bytes<uint8_t>(of.kv_heads * groups * kExponentBytes)});
    }
  }

  PlanesBlock block(int64_t b) {
    auto& of = parts[b];
    return {of[0].data(), of[1].data(), of[2].data(), of[3].data(), of[4].data(), of[5].data()};
  }

  PlanesFormat format;
  std::vector<std::vector<std::vector<uint8_t>>> parts;
};

std::vector<uint32_t> everything(const Cache& cache, const std::vector<float>& rows) {
  std::vector<uint32_t> out = words(rows);
  for (const auto& block : cache.parts) {
    for (const auto& part : block) out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

// Rows of tokens at rising positions from `first` on, over whatever the blocks held before.
void check_store(const PlanesFormat& format, int64_t group, int64_t first, int64_t tokens,
                 const std::vector<float>& special) {
  const int64_t heads = group * format.kv_heads, width = (heads + 2 * format.kv_heads) * format.head_dim;
  const std::vector<float> qkv = sprinkle(floats(tokens * width), special, heads * format.head_dim);
  const std::vector<float> cos = floats(format.head_dim / 2), sin = floats(format.head_dim / 2);
  const Cache blank(format);
  compare(describe("planes_store", {{"head_dim", format.head_dim},
                                    {"key bits", format.key_bits},
                                    {"upper", format.key_upper},
                                    {"value bits", format.value_bits},
                                    {"first", first},
                                    {"special", special.size()}}),
          [&](const Kernels& k) {
            Cache cache = blank;
            std::vector<float> rows(qkv);
            for (int64_t t = 0; t < tokens; ++t) {
              k.planes_store(rows.data() + t * width, heads, format, cache.block((first + t) / kBlockEntries),
                             (first + t) % kBlockEntries, cos.data(), sin.data());
            }
            return everything(cache, rows);
          });
}

// bits: read of the first blocks and of the last one. exponent: of all groups where it is not negative, and of one
// group of `odd_entry`, or of none.
void check_attention(const PlanesFormat& format, int64_t heads, int64_t entries, const int (&bits)[2], float special,
                     int exponent = -1, int64_t odd_entry = -1) {
  Cache cache(format);
  const int64_t groups = format.head_dim / planes_group(format.head_dim);
  const auto set_exponent = [&](std::vector<uint8_t>& of, int64_t group, int64_t t, int e) {
    for (int j = 0; j < kExponentBits; ++j) {
      uint8_t& byte = of[static_cast<size_t>(group * kExponentBytes + 8 * j + t / 8)];
      byte = static_cast<uint8_t>((byte & ~(1 << t % 8)) | (e >> (kExponentBits - 1 - j) & 1) << t % 8);
    }
  };
  for (int64_t t = 0; t < kAttentionChunk; ++t) {
    for (int64_t g = 0; g < format.kv_heads * groups; ++g) {
      for (const int which : {4, 5}) {
        const bool odd = t == odd_entry && g == 0;
        const int e = odd ? kNotFiniteExponent : exponent >= 0 ? exponent : 10 + static_cast<int>(random_bits() % 6);
        set_exponent(cache.parts[t / kBlockEntries][which], g, t % kBlockEntries, e);
      }
    }
  }
  const std::vector<float> q = sprinkle(floats(heads * format.head_dim), {special}, format.head_dim / 2);
  PlanesAttentionArgs args{q.data(), heads, format, {}, {}, entries, 0.3f};
  const int64_t blocks = (entries + kBlockEntries - 1) / kBlockEntries;
  for (int64_t b = 0; b < blocks; ++b) {
    const PlanesBlock block = cache.block(b);
    const int wanted = bits[b + 1 == blocks];
    const int key_bits = std::min(wanted, format.key_bits), value_bits = std::min(wanted, format.value_bits);
    args.keys[b] = {block.keys, key_bits > format.key_upper ? block.low_keys : nullptr, block.key_exponents, key_bits};
    args.values[b] = {block.values, value_bits > format.value_upper ? block.low_values : nullptr, block.value_exponents,
                      value_bits};
  }
  compare(describe("planes_attention", {{"heads", heads},
                                        {"head_dim", format.head_dim},
                                        {"entries", entries},
                                        {"key bits", format.key_bits},
                                        {"upper", format.key_upper},
                                        {"read", bits[0]},
                                        {"read last", bits[1]},
                                        {"exponent", exponent},
                                        {"NaN", odd_entry}}),
          [&](const Kernels& k) {
            std::vector<float> max(heads), sum(heads), acc(heads * format.head_dim);
            k.planes_attention(args, {max.data(), sum.data(), acc.data()});
            return words(max, sum, acc);
          });
}

template <class T>
std::vector<T> floats_of(const std::vector<float>& x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    std::vector<T> halves;
    for (const float value : x) halves.push_back(reference::to_half(value));
    return halves;
  }
}

// Rows into the Anda format and back, from the middle of an address on: what saturates, ties, is zero or subnormal.
template <class T>
void check_anda(int magnitude_bits, int64_t n, int64_t group) {
  std::vector<float> edges{0.0f, -0.0f, 0.5f, 1.5f, 1e-30f, 65504.0f, -3.9999f, 5.9604645e-8f, -6.2e-5f};
  const KvType type = std::is_same_v<T, float> ? KvType::f32 : KvType::f16;
  const AndaRow row{n, group, 13, magnitude_bits, type};
  for (const float poison : {0.0f, 65520.0f, kInfinity, -kInfinity, kNan}) {
    if (poison != 0) edges = {poison};
    const std::vector<T> x = floats_of<T>(sprinkle(floats(n), edges, n / 2));
    for (const bool truncate : {false, true}) {
      compare(describe("anda", {{"bits", magnitude_bits}, {"n", n}, {"group", group}, {"truncate", truncate}}),
              [&](const Kernels& k) {
                std::vector<uint8_t> exponents(static_cast<size_t>((n + group - 1) / group));
                const bool is_held = k.anda_exponents(x.data(), row, exponents.data());
                std::vector<uint32_t> found(exponents.begin(), exponents.end());
                found.push_back(is_held);
                if (!is_held) return found;
                const int64_t last = row.first_word + (n - 1) / kAndaWordValues;
                std::vector<uint64_t> packed(
                    static_cast<size_t>((last / kAndaWordsAtAddress + 1) * (magnitude_bits + 1) * kAndaWordsAtAddress),
                    0xAAAAAAAAAAAAAAAAu);
                k.anda_pack(x.data(), row, exponents.data(), truncate, packed.data());
                for (const uint64_t word : packed) {
                  found.push_back(static_cast<uint32_t>(word));
                  found.push_back(static_cast<uint32_t>(word >> 32));
                }
                for (const int bits : {1, (magnitude_bits + 1) / 2, magnitude_bits}) {
                  std::vector<T> back(static_cast<size_t>(n));
                  k.anda_unpack(packed.data(), row, exponents.data(), bits, back.data());
                  const std::vector<uint32_t> read = words(back);
                  found.insert(found.end(), read.begin(), read.end());
                }
                return found;
              });
    }
  }
}

}  // namespace

void check_kv_planes() {
  for (int bits = 1; bits <= 16; ++bits) {
    for (const int64_t n : {1, 15, 33, 63, 64, 65, 200, 320}) {
      for (const int64_t group : {int64_t{1}, int64_t{8}, int64_t{32}, int64_t{64}, int64_t{128}, n}) {
        check_anda<float>(bits, n, group);
        check_anda<uint16_t>(bits, n, group);
      }
    }
  }
  for (const int64_t dim : {16, 32, 48, 64, 80, 96, 128, 256}) {
    for (int bits = 1; bits <= kMaxPlanesBits; ++bits) {
      const int upper = 1 + bits / 2, value_bits = kMaxPlanesBits + 1 - bits;
      const PlanesFormat format{2, dim, bits, std::min(upper, bits), value_bits, value_bits};
      check_store(format, 1 + bits % 4, 13 * bits, 40, {});
      for (int read = 1; read <= kMaxPlanesBits; ++read) check_attention(format, 3, 150, {read, kMaxPlanesBits}, 0.5f);
    }
    const PlanesFormat format{1, dim, 7, 4, 7, 4};
    // the largest that is kept, the first that is not, subnormals of float16, what saturates, ties, zeros of both signs
    check_store(format, 2, 0, 3, {65504.0f, 6e-5f, 3e-8f, 1e-30f, 1.9999f, 127.5f, 0.0f, -0.0f});
    for (const float bad : {65520.0f, kInfinity, -kInfinity, kNan}) {
      check_store(format, 2, 0, 3, {bad});
      check_attention(format, 3, 40, {7, 7}, bad);
    }
    for (const int64_t heads : {1, 2, 3, 4, 5, 6, 7, 8}) {
      for (const int64_t entries : {1, 3, 4, 15, 16, 17, 63, 64, 65, 100, 128, 255, 256}) {
        check_attention(format, heads, entries, {4, 7}, 0.5f);
      }
    }
    for (const int exponent : {1, 30}) check_attention(format, 3, 256, {4, 7}, 0.5f, exponent);
    for (const int64_t odd : {0, 17, 99}) check_attention(format, 3, 100, {4, 7}, 0.5f, -1, odd);
  }
}

}  // namespace taper::checks
