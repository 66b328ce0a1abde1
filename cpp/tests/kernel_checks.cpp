// Every operation over many shapes, each instruction set against the reference.
#include <algorithm>

#include "apis/planes.hpp"
#include "checks.hpp"

namespace taper::checks {
namespace {

void check_quantize(const std::vector<float>& x, int magnitude_bits, const char* kind) {
  const int64_t n = static_cast<int64_t>(x.size()), cols = padded_cols(n);
  compare(describe("quantize", {{kind, n}, {"magnitude bits", magnitude_bits}}), [&](const Kernels& k) {
    const bool wide = magnitude_bits > kNarrowMagnitudeBits;
    std::vector<int8_t> q(cols, 99), low(cols, 99);
    std::vector<float> scale(1);
    std::vector<int32_t> sum(1), low_sum(1);
    k.quantize(x.data(), n, cols, magnitude_bits,
               {q.data(), scale.data(), sum.data(), wide ? low.data() : nullptr, wide ? low_sum.data() : nullptr});
    return words(q, scale, sum, low, low_sum);
  });
}

void check_quantizers(int64_t n) {
  std::vector<float> tiny = floats(n), ties = floats(n);
  for (float& v : tiny) v *= 1e-39f;
  for (float& v : ties) v = std::rint(v * 32.0f) * 0.5f;
  for (int magnitude_bits = 1; magnitude_bits <= kMaxMagnitudeBits; ++magnitude_bits) {
    const std::vector<float> x = floats(n);
    check_quantize(x, magnitude_bits, "normal");
    check_quantize(ties, magnitude_bits, "ties");
    check_quantize(tiny, magnitude_bits, "subnormal");
    check_quantize(std::vector<float>(n, -0.0f), magnitude_bits, "zeros");
    check_quantize(sprinkle(x, {std::ldexp(1.0f, magnitude_bits) - 0.25f}, n / 2), magnitude_bits, "next power");
    const float limit = static_cast<float>(largest_activation(magnitude_bits));
    for (const float largest : {limit, limit + 0.5f, -limit - 0.5f, std::nextafter(limit + 0.5f, 0.0f)}) {
      check_quantize(sprinkle(x, {largest}, n / 2), magnitude_bits, "limit");
    }
    check_quantize(sprinkle(x, {3e38f}, n - 1), magnitude_bits, "largest");
    for (const float bad : {kInfinity, -kInfinity, kNan, -kNan}) {
      check_quantize(sprinkle(x, {bad}, 0), magnitude_bits, "not finite first");
      check_quantize(sprinkle(x, {bad}, n - 1), magnitude_bits, "not finite last");
    }
  }
}

// x and gain may hold anything.
void check_row(const std::vector<float>& x, const std::vector<float>& gain, const char* kind) {
  const int64_t n = static_cast<int64_t>(x.size());
  const auto check = [&](const char* operation, auto call) {
    compare(describe(operation, {{kind, n}}), [&](const Kernels& k) {
      std::vector<float> y(x);
      call(k, y.data());
      return words(y);
    });
  };
  check("rms_norm", [&](auto& k, float* y) { k.rms_norm(x.data(), gain.data(), 1e-5f, n, y); });
  check("rms_norm in place without a gain", [&](auto& k, float* y) { k.rms_norm(y, nullptr, 1e-5f, n, y); });
  check("swiglu", [&](auto& k, float* y) { k.swiglu(x.data(), gain.data(), n, y); });
  check("exp", [&](auto& k, float* y) { k.exp(x.data(), n, y); });
}

void check_rows(int64_t n) {
  const std::vector<float> x = floats(n), gain = floats(n);
  check_row(x, gain, "normal");
  std::vector<float> wide(x);
  for (float& v : wide) v *= 60.0f;  // exp from 0 to its largest
  check_row(wide, gain, "wide");
  check_row(sprinkle(x, {-87.0f, -87.00001f, 88.0f, 88.00001f, -0.0f, 1e-40f}, n / 3), gain, "edges of exp");
  for (const float bad : {kInfinity, -kInfinity, kNan}) check_row(sprinkle(wide, {bad}, n / 2), gain, "not finite");
}

void check_rotation(int64_t n, int64_t block) {
  const std::vector<float> x = floats(n);
  std::vector<float> signs = floats(n);
  for (float& sign : signs) sign = sign < 0.0f ? -1.0f : 1.0f;
  for (const bool inverse : {false, true}) {
    for (const float value : {1.0f, kInfinity, kNan}) {
      compare(describe("rotate", {{"n", n}, {"block", block}, {"inverse", inverse}}), [&](const Kernels& k) {
        std::vector<float> y = sprinkle(x, {value}, n / 2);
        k.rotate(y.data(), signs.data(), n, block, inverse);
        return words(y);
      });
    }
  }
}

struct PlanesCase {
  int64_t rows, cols;
  int bits;
  int64_t tokens;
  bool own_tables, wide_values, wide_inputs;
};

// Rows of random int8 from `least` on, with the sum of each.
std::vector<int8_t> inputs_of(int64_t tokens, int64_t cols, int least, std::vector<int32_t>& sum) {
  std::vector<int8_t> q = bytes<int8_t>(tokens * cols);
  sum.assign(tokens, 0);
  for (int64_t i = 0; i < tokens * cols; ++i)
    sum[i / cols] += q[i] = std::max<int8_t>(q[i], static_cast<int8_t>(least));
  return q;
}

// 2^bits values for each, and no byte more, so that the sanitiser sees a read past one.
std::vector<int8_t> tables_of(int64_t count, int bits) {
  std::vector<int8_t> out(count << bits);
  for (int8_t& value : out) value = static_cast<int8_t>(random_bits() % 255 - 127);
  return out;
}

void compare_products(const PlanesCase& c, const PlanesView& weights, const ActivationsView& inputs, bool extras) {
  const std::vector<float> residual = floats(c.tokens * c.rows);
  const auto check = [&](const char* operation, auto kernel, int64_t begin, int64_t end, bool narrow = false) {
    const std::string what = describe(operation, {{"rows", c.rows},
                                                  {"from", begin},
                                                  {"to", end},
                                                  {"columns", c.cols},
                                                  {"bits", c.bits},
                                                  {"tokens", c.tokens},
                                                  {"own tables", c.own_tables},
                                                  {"wide values", c.wide_values},
                                                  {"wide inputs", c.wide_inputs}});
    compare(what, [&](const Kernels& k) {
      const int64_t first = narrow ? begin : 0, width = narrow ? end - begin : c.rows;
      std::vector<float> out(residual.begin(), residual.begin() + c.tokens * width);
      (k.*kernel)(weights, inputs, {out.data(), extras ? out.data() : nullptr, width, first}, begin, end);
      return words(out);
    });
  };
  check("planes_gemv", &Kernels::planes_gemv, 0, c.rows);
  check("planes_gemm", &Kernels::planes_gemm, 0, c.rows);
  for (const bool narrow : {false, true}) {
    check("planes_gemv", &Kernels::planes_gemv, c.rows / 3, c.rows - c.rows / 4, narrow);
    check("planes_gemm", &Kernels::planes_gemm, c.rows / 3, c.rows - c.rows / 4, narrow);
  }
  compare(describe("planes_unpack", {{"columns", c.cols}, {"bits", c.bits}}), [&](const Kernels& k) {
    std::vector<int8_t> values(c.cols);
    k.planes_unpack(weights, c.rows - 1, values.data());
    return words(values);
  });
}

// Values, activations and tables at the ends of their ranges, so that the largest sums occur, or random.
void check_planes(const PlanesCase& c, bool largest = false) {
  std::vector<std::vector<uint8_t>> planes;
  std::vector<const uint8_t*> pointers;
  for (int p = 0; p < c.bits; ++p) {
    planes.push_back(bytes<uint8_t>(c.rows * c.cols / 8));
    if (largest) std::fill(planes.back().begin(), planes.back().end(), 0);
    pointers.push_back(planes.back().data());
  }
  std::vector<int8_t> tables = tables_of(c.own_tables ? c.rows : 1, c.bits), low_table = tables_of(1, c.bits);
  std::vector<int32_t> sum, low_sum;
  std::vector<int8_t> q = inputs_of(c.tokens, c.cols, -127, sum), low = inputs_of(c.tokens, c.cols, -128, low_sum);
  if (largest) {
    std::fill(tables.begin(), tables.end(), -127), std::fill(low_table.begin(), low_table.end(), -64);
    std::fill(q.begin(), q.end(), -127), std::fill(low.begin(), low.end(), -128);
    std::fill(sum.begin(), sum.end(), -127 * c.cols), std::fill(low_sum.begin(), low_sum.end(), -128 * c.cols);
  }
  const std::vector<float> row_scale = floats(c.rows), bias = floats(c.rows), scale = floats(c.tokens);
  const bool extras = random_bits() % 2 != 0;
  const PlanesView weights{pointers.data(),
                           c.rows,
                           c.cols,
                           c.bits,
                           tables.data(),
                           row_scale.data(),
                           0.5f,
                           extras ? bias.data() : nullptr,
                           c.own_tables ? int64_t{1} << c.bits : 0,
                           c.wide_values ? low_table.data() : nullptr};
  const ActivationsView inputs{q.data(),
                               scale.data(),
                               sum.data(),
                               c.tokens,
                               c.wide_inputs ? low.data() : nullptr,
                               c.wide_inputs ? low_sum.data() : nullptr};
  compare_products(c, weights, inputs, extras);
}

void check_all_planes() {
  for (const int64_t cols : {64, 128, 192, 256, 320, 448, 512, 576, 1088}) {
    for (int bits = 1; bits <= kMaxBits; ++bits) {
      for (const int64_t tokens : {1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 33}) {
        const int64_t rows = 1 + static_cast<int64_t>(random_bits() % 22);
        for (const bool wide : {false, true}) {
          check_planes({rows, cols, bits, tokens, false, false, wide});
          check_planes({rows, cols, bits, tokens, true, false, wide});
          if (bits >= kLeastWideBits) check_planes({rows, cols, bits, tokens, false, true, wide});
        }
      }
    }
  }
  for (const int bits : {2, 3, 7}) {  // rows in several tiles
    check_planes({75, 8256, bits, 9, false, bits == 7, false});
    check_planes({75, 4160, bits, 2, false, bits == 7, true});
  }
  for (const int bits : {4, 8}) check_planes({2, 131072, bits, 1, false, bits == 8, true}, true);
}

// From floats to the product, with columns past in_features.
void check_matrix(int64_t in_features, int bits, int64_t tokens) {
  const int64_t rows = 13, cols = padded_cols(in_features);
  std::vector<std::vector<uint8_t>> planes;
  PlanesParts parts{{}, rows, in_features, {}, {}, nullptr, 1, nullptr, 1};
  for (int p = 0; p < bits; ++p) parts.planes.push_back(planes.emplace_back(bytes<uint8_t>(rows * cols / 8)).data());
  LevelValues values{{}, nullptr, 0, int64_t{1} << bits};
  for (int64_t i = 0; i < values.size; ++i) values.shared.push_back(static_cast<int16_t>(i - values.size / 2));
  parts.values[bits] = values;
  parts.level_scales[bits] = 0.5f;
  const std::vector<float> scales = floats(rows), x = floats(tokens * in_features), signs(in_features, -1.0f);
  parts.row_scales = scales.data();
  const PlanedMatrix matrix(parts);
  for (const int magnitude_bits : {kNarrowMagnitudeBits, kMaxMagnitudeBits}) {
    const std::string what = describe("matrix", {{"columns", in_features}, {"bits", bits}, {"tokens", tokens}});
    compare(what, [&](const Kernels&) {
      const Activations inputs(tokens, cols, magnitude_bits > kNarrowMagnitudeBits);
      prepare(x.data(), in_features, {true, nullptr, 1e-5f}, {signs.data(), in_features & -in_features}, magnitude_bits,
              inputs);
      std::vector<float> out(tokens * rows);
      matrix.matmul(inputs, bits, nullptr, out.data());
      return words(out);
    });
  }
}

// Elements of a cache; as float16 with subnormals among them.
template <class T>
std::vector<T> cache_of(int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    return floats(n);
  } else {
    std::vector<T> out = bytes<T>(n);
    for (T& half : out) half = half % 32 == 0 ? half & 0x83ff : (half & 0x8fff) | 0x3000;
    return out;
  }
}

template <class T>
constexpr KvType kv_type() {
  return std::is_same_v<T, float> ? KvType::f32 : KvType::f16;
}

// special: values among those of the heads.
template <class T>
void check_rope_store(int64_t group, int64_t dim, int64_t position, const std::vector<float>& special) {
  const int64_t kv_heads = 2, heads = group * kv_heads, capacity = (position + 20) / kKeyBlock * kKeyBlock;
  const std::vector<float> qkv = sprinkle(floats((heads + 2 * kv_heads) * dim), special, heads * dim);
  const std::vector<float> cos = floats(dim / 2), sin = floats(dim / 2);
  const std::vector<T> cache = cache_of<T>(kv_heads * capacity * dim);
  compare(describe("rope_store", {{"group", group}, {"head_dim", dim}, {"position", position}}), [&](const Kernels& k) {
    std::vector<float> rotated(qkv);
    std::vector<T> keys(cache), values(cache);
    const KvView kv{keys.data(), values.data(), kv_type<T>(), kv_heads, capacity, dim};
    k.rope_store(rotated.data(), heads, kv, position, cos.data(), sin.data());
    return words(rotated, keys, values);
  });
}

// nan_entry: one whose key is NaN, or -1. Keys past the entries are NaN too; nobody may see those.
template <class T>
void check_attention(int64_t heads, int64_t dim, int64_t entries, float special, int64_t nan_entry = -1) {
  const std::vector<float> q = sprinkle(floats(heads * dim), {special}, dim / 2);
  const int64_t padded = (entries + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  std::vector<T> keys = cache_of<T>(padded * dim);
  const std::vector<T> values = cache_of<T>(entries * dim);
  for (int64_t t = 0; t < padded; ++t) {
    if (t < entries && t != nan_entry) continue;
    T* key = keys.data() + t / kKeyBlock * kKeyBlock * dim + t % kKeyBlock;
    for (int64_t d = 0; d < dim; ++d) key[d * kKeyBlock] = std::is_same_v<T, float> ? static_cast<T>(kNan) : T{0x7e00};
  }
  const AttentionArgs args{q.data(), heads, keys.data(), values.data(), kv_type<T>(), dim, entries, 0.3f};
  const std::string what =
      describe("attention",
               {{"heads", heads}, {"head_dim", dim}, {"entries", entries}, {"bytes", sizeof(T)}, {"NaN", nan_entry}});
  compare(what, [&](const Kernels& k) {
    std::vector<float> max(heads), sum(heads), acc(heads * dim);
    k.attention(args, {max.data(), sum.data(), acc.data()});
    return words(max, sum, acc);
  });
}

void check_merge(int64_t heads, int64_t dim, const std::vector<float>& special) {
  std::vector<float> chunk[] = {sprinkle(floats(heads), special, heads / 2), floats(heads), floats(heads * dim)};
  std::vector<float> earlier[] = {floats(heads), floats(heads), sprinkle(floats(heads * dim), special, dim)};
  const AttentionState state{chunk[0].data(), chunk[1].data(), chunk[2].data()};
  compare(describe("attention_merge", {{"heads", heads}, {"head_dim", dim}}), [&](const Kernels& k) {
    std::vector<float> max(earlier[0]), sum(earlier[1]), acc(earlier[2]);
    k.attention_merge(heads, dim, state, {max.data(), sum.data(), acc.data()});
    return words(max, sum, acc);
  });
  compare(describe("attention_finish", {{"heads", heads}, {"head_dim", dim}}), [&](const Kernels& k) {
    std::vector<float> out(heads * dim);
    k.attention_finish(heads, dim, {earlier[0].data(), earlier[1].data(), earlier[2].data()}, out.data());
    return words(out);
  });
}

template <class T>
void check_all_attention(int64_t dim) {
  // float16: the last that rounds down, the first that rounds to infinity, ties, subnormals and what rounds to zero
  const std::vector<float> edges{65519.9f, 65520.0f, -70000.0f, 1.00048828125f, 1.00146484375f, 6e-5f, 3e-8f, 2e-8f};
  for (const int64_t position : {0, 3, 15, 16, 40}) check_rope_store<T>(1 + position % 4, dim, position, {});
  check_rope_store<T>(2, dim, 20, edges);
  for (const int64_t heads : {1, 2, 3, 4, 5, 6, 7, 8}) {
    for (const int64_t entries : {1, 2, 15, 16, 17, 33, 64, 100, 256}) check_attention<T>(heads, dim, entries, 0.5f);
  }
  for (const float bad : {kInfinity, -kInfinity, kNan}) {
    check_rope_store<T>(2, dim, 20, {bad});
    check_attention<T>(3, dim, 40, bad);
  }
  // The largest score of a lane must outlive a NaN in it, whichever lane that is.
  for (int64_t t = 0; t < kKeyBlock; ++t) check_attention<T>(3, dim, 40, 0.5f, t + kKeyBlock);
}

}  // namespace

void check_kernels() {
  for (const int64_t n : {1, 2, 7, 15, 16, 17, 33, 64, 172, 576, 2048}) {
    check_rows(n);
    check_quantizers(n);
    for (int64_t block = 1; n % block == 0; block *= 2) check_rotation(n, block);
  }
  check_all_planes();
  for (const int64_t in_features : {1, 33, 64, 172, 576}) {
    for (const int bits : {1, 2, 3, 4, 6}) {
      for (const int64_t tokens : {1, 3, 9}) check_matrix(in_features, bits, tokens);
    }
  }
  for (const int64_t dim : {2, 6, 16, 20, 32, 48, 64, 80, 128}) {
    check_all_attention<uint16_t>(dim);
    check_all_attention<float>(dim);
    for (const int64_t heads : {1, 3, 8}) {
      for (const float value : {0.5f, kInfinity, -kInfinity, kNan}) check_merge(heads, dim, {value});
    }
  }
  check_kv_planes();
}

}  // namespace taper::checks
