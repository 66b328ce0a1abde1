// A KV cache of planes: what is stored, and attention over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.hpp"

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

// Rows into the Anda format and back; every count of values in a word, and what saturates, ties and is zero.
void check_anda(int magnitude_bits, int64_t count) {
  const std::vector<float> x = sprinkle(floats(64), {0.0f, -0.0f, 0.5f, 1.5f, 1e-30f, 200.0f}, count);
  std::vector<float> factors(64), units(64);
  for (size_t i = 0; i < 64; ++i) {
    factors[i] = std::ldexp(1.0f, magnitude_bits - 2 - static_cast<int>(i / 16));
    units[i] = 1.0f / factors[i];
  }
  for (const bool truncate : {false, true}) {
    compare(describe("anda_pack", {{"bits", magnitude_bits}, {"count", count}, {"truncate", truncate}}),
            [&](const Kernels& k) {
              std::vector<uint64_t> packed(static_cast<size_t>(magnitude_bits) + 1);
              k.anda_pack(x.data(), count, factors.data(), magnitude_bits, truncate, packed.data());
              std::vector<float> back(static_cast<size_t>(count));
              k.anda_unpack(packed.data(), magnitude_bits, units.data(), count, back.data());
              std::vector<uint32_t> halves(2 * packed.size());
              std::memcpy(halves.data(), packed.data(), packed.size() * sizeof(uint64_t));
              return words(back, halves, std::vector<uint32_t>{k.largest_bits(x.data(), count)});
            });
  }
}

}  // namespace

void check_kv_planes() {
  for (int bits = 1; bits <= 16; ++bits) {
    for (const int64_t count : {1, 15, 16, 17, 33, 48, 63, 64}) check_anda(bits, count);
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
