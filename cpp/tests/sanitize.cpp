// Runs every operation of every instruction set of this machine on heap arrays of exactly the size that it may touch,
// and compares with the reference. Built with the sanitisers (CMakePresets.json, "asan"), which see a byte too far.
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "runtime/dispatch.hpp"

namespace {

using namespace taper;

std::mt19937 random_bits(1);
int failures = 0;

std::vector<float> floats(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(random_bits);
  return out;
}

template <class T>
std::vector<T> bytes(int64_t n) {
  std::vector<T> out(n);
  for (T& x : out) x = static_cast<T>(random_bits());
  return out;
}

// Runs `operation` on a set's table and on the reference; it returns the bytes of its results.
template <class Operation>
void compare(const std::string& what, const Operation& operation) {
  use_isa("reference");
  const auto expected = operation(kernels());
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    if (operation(kernels()) == expected) continue;
    std::printf("%s: %s differs from the reference\n", isa.c_str(), what.c_str());
    ++failures;
  }
}

void check_rows(int64_t n) {
  const std::vector<float> x = floats(n), gain = floats(n), signs(n, -1.0f);
  const int64_t cols = (n + 63) / 64 * 64;
  const std::string at = " of " + std::to_string(n);
  const auto unary = [&](auto call) {
    return [&, call](const Kernels& k) {
      std::vector<float> y(x);
      call(k, y.data());
      return y;
    };
  };
  compare("rms_norm" + at, unary([&](auto& k, float* y) { k.rms_norm(x.data(), gain.data(), 1e-5f, n, y); }));
  compare("rotate" + at, unary([&](auto& k, float* y) { k.rotate(y, signs.data(), n, n & -n, false); }));
  compare("swiglu" + at, unary([&](auto& k, float* y) { k.swiglu(x.data(), gain.data(), n, y); }));
  compare("exp" + at, unary([&](auto& k, float* y) { k.exp(x.data(), n, y); }));
  for (const int magnitude_bits : {7, 14}) {
    compare("quantize" + at, [&](const Kernels& k) {
      std::vector<int8_t> q(cols), low(cols);
      float scale;
      int32_t sum, low_sum = 0;
      const bool wide = magnitude_bits > 7;
      k.quantize(x.data(), n, cols, magnitude_bits,
                 {q.data(), &scale, &sum, wide ? low.data() : nullptr, wide ? &low_sum : nullptr});
      return std::tuple(q, scale, sum, low, low_sum);
    });
  }
}

// Rows of random int8 above -128 with the sum of each.
std::vector<int8_t> inputs_of(int64_t tokens, int64_t cols, std::vector<int32_t>& sum) {
  std::vector<int8_t> q = bytes<int8_t>(tokens * cols);
  sum.assign(tokens, 0);
  for (int64_t i = 0; i < tokens * cols; ++i) sum[i / cols] += q[i] = q[i] == -128 ? 0 : q[i];
  return q;
}

// tables: 2^bits values each, of exactly that size, so that a byte read past one is seen.
std::vector<int8_t> tables_of(int64_t count, int bits) {
  std::vector<int8_t> out(count << bits);
  for (int8_t& value : out) value = static_cast<int8_t>(random_bits() % 255 - 127);
  return out;
}

void check_planes(int64_t cols, int bits, int64_t tokens, bool own_tables, bool wide) {
  const int64_t rows = 21;
  std::vector<std::vector<uint8_t>> planes;
  std::vector<const uint8_t*> pointers;
  for (int p = 0; p < bits; ++p) {
    planes.push_back(bytes<uint8_t>(rows * cols / 8));
    pointers.push_back(planes.back().data());
  }
  const std::vector<int8_t> tables = tables_of(own_tables ? rows : 1, bits), low_table = tables_of(1, bits);
  std::vector<int32_t> sum, low_sum;
  const std::vector<int8_t> q = inputs_of(tokens, cols, sum), low = inputs_of(tokens, cols, low_sum);
  const std::vector<float> row_scale = floats(rows), bias = floats(rows), scale = floats(tokens);
  const std::vector<float> residual = floats(tokens * rows);
  const bool wide_values = wide && bits >= 7 && !own_tables;
  const PlanesView weights{pointers.data(),
                           rows,
                           cols,
                           bits,
                           tables.data(),
                           row_scale.data(),
                           0.5f,
                           bias.data(),
                           own_tables ? int64_t{1} << bits : 0,
                           wide_values ? low_table.data() : nullptr};
  const ActivationsView inputs{
      q.data(), scale.data(), sum.data(), tokens, wide ? low.data() : nullptr, wide ? low_sum.data() : nullptr};
  const std::string at = " of " + std::to_string(cols) + " columns, " + std::to_string(bits) + " bits";
  const auto multiply = [&](auto kernel) {
    return [&, kernel](const Kernels& k) {
      std::vector<float> out(tokens * rows);
      (k.*kernel)(weights, inputs, {out.data(), residual.data()}, 0, rows);
      return out;
    };
  };
  compare("planes_gemv" + at, multiply(&Kernels::planes_gemv));
  compare("planes_gemm" + at, multiply(&Kernels::planes_gemm));
  compare("planes_unpack" + at, [&](const Kernels& k) {
    std::vector<int8_t> values(cols);
    k.planes_unpack(weights, rows - 1, values.data());
    return values;
  });
}

template <class T>
void check_attention(KvType type, int64_t group, int64_t dim, int64_t position) {
  const int64_t kv_heads = 2, heads = group * kv_heads, capacity = position + 1;
  const std::vector<float> qkv = floats((heads + 2 * kv_heads) * dim), cos = floats(dim / 2), sin = floats(dim / 2);
  const std::vector<T> cache(kv_heads * capacity * dim, T{1});
  compare("attention of " + std::to_string(dim), [&](const Kernels& k) {
    std::vector<float> rotated(qkv), out(heads * dim), scratch(attention_scratch(group, capacity, dim));
    std::vector<T> keys(cache), values(cache);
    const KvView kv{keys.data(), values.data(), type, kv_heads, capacity, dim};
    k.rope_store(rotated.data(), heads, kv, position, cos.data(), sin.data());
    const AttentionArgs args{rotated.data(), 0, kv, heads, position, 0.1f, out.data(), scratch.data()};
    for (int64_t h = 0; h < kv_heads; ++h) k.attention(args, 0, h);
    return std::tuple(rotated, keys, values, out);
  });
}

}  // namespace

int main() {
  for (const int64_t n : {1, 7, 16, 33, 64, 172, 576, 2048}) check_rows(n);
  for (const int64_t cols : {64, 128, 192, 320, 448, 512, 576, 1088}) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (const int64_t tokens : {1, 2, 3, 4, 7, 13}) {
        for (const bool own_tables : {false, true}) {
          for (const bool wide : {false, true}) check_planes(cols, bits, tokens, own_tables, wide);
        }
      }
    }
  }
  for (const int64_t dim : {2, 6, 16, 20, 64, 80, 128}) {
    for (const int64_t group : {1, 2, 3, 5, 8}) {
      for (const int64_t position : {0, 6, 15, 16, 40}) {
        check_attention<uint16_t>(KvType::f16, group, dim, position);
        check_attention<float>(KvType::f32, group, dim, position);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
