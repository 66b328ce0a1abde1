// The operations that an instruction set provides. docs/numerics.md defines each result bit for bit.
//
// Kernels check nothing and start no threads: cpp/apis checks, cpp/heuristics chooses, the pool in cpp/runtime
// splits the range. A pointer that may be null says so.
#pragma once

#include <cstdint>

namespace taper {

// A weight matrix as bit planes, most significant first (docs/format.md, "A plane").
struct PlanesView {
  const uint8_t* const* planes;  // bits pointers to (rows, cols / 8) bytes, row-major
  int64_t rows;                  // out_features
  int64_t cols;                  // in_features rounded up to a multiple of 64
  int bits;                      // planes to read, 1..8
  const int8_t* table;           // 2^bits values in code order, -127..127; of the first row where rows have their own
  const float* row_scale;        // (rows)
  float level_scale;
  const float* bias;                  // (rows) or null
  int64_t table_stride = 0;           // bytes from one row's table to the next; 0: one table for all rows
  const int8_t* low_table = nullptr;  // or null: a value is 128 * table + low_table (bits 7 and 8, stride 0)
};

// The high part of a wide value or activation counts this often: 2^shift.
constexpr int kValueShift = 7;
constexpr int kInputShift = 8;
// The largest magnitude of an activation of so many bits. Of 15 it is what both int8 parts reach, 127 * 256 + 127.
constexpr int largest_activation(int magnitude_bits) {
  const int all_ones = (1 << magnitude_bits) - 1, of_parts = 127 * ((1 << kInputShift) + 1);
  return all_ones < of_parts ? all_ones : of_parts;
}

// Rows of activations as int8, or as two int8 parts, with one scale each.
struct ActivationsView {
  const int8_t* q;     // (tokens, cols), columns past in_features are zero
  const float* scale;  // (tokens)
  const int32_t* sum;  // (tokens) sum of q
  int64_t tokens;
  const int8_t* low = nullptr;       // like q, or null: an activation is 256 * q + low
  const int32_t* low_sum = nullptr;  // (tokens) sum of low
  const int8_t* packed = nullptr;    // q, and low, as pack_inputs leaves them; or null
  const int8_t* packed_low = nullptr;
};

constexpr int64_t kPackedTokens = 16;

// One row of activations to be filled; low and low_sum are null where magnitude_bits are at most 7.
struct QuantizedRow {
  int8_t* q;  // (cols)
  float* scale;
  int32_t* sum;
  int8_t* low;
  int32_t* low_sum;
};

// Rows first_row .. first_row + width - 1 of the results, all of the matrix or a part.
struct OutputView {
  float* out;             // (tokens, width)
  const float* residual;  // (tokens, width), may be out itself, or null
  int64_t width;
  int64_t first_row = 0;

  int64_t at(int64_t token, int64_t row) const { return token * width + row - first_row; }
};

enum class KvType : int { f16 = 0, f32 = 1 };

// Entries of a block of keys, which lie side by side: one load then holds an element of sixteen keys, and their scores
// need no sums across lanes.
constexpr int64_t kKeyBlock = 16;
// Entries of a chunk: softmax runs over one chunk at a time, and chunks are merged in rising order.
constexpr int64_t kAttentionChunk = 256;
// Query heads of one KV head that a call takes at most: their scores of a chunk are 8 KiB.
constexpr int64_t kAttentionHeads = 8;

// Keys (kv_heads, capacity / 16, head_dim, 16) and values (kv_heads, capacity, head_dim) of one layer.
struct KvView {
  void* keys;
  void* values;
  KvType type;
  int64_t kv_heads;
  int64_t capacity;  // a multiple of kKeyBlock
  int64_t head_dim;
};

// Query heads of one token that share a KV head, over one chunk of its entries.
struct AttentionArgs {
  const float* q;      // (heads, head_dim), after RoPE
  int64_t heads;       // 1..kAttentionHeads
  const void* keys;    // of the chunk: (blocks, head_dim, 16)
  const void* values;  // of the chunk: (entries, head_dim)
  KvType type;
  int64_t head_dim;
  int64_t num_entries;  // that the token sees, 1..kAttentionChunk
  float scale;
};

// A softmax under way: for each head its largest score, the sum of its weights exp(score - max), and the weighted sum
// of the values.
struct AttentionState {
  float* max;  // (heads)
  float* sum;  // (heads)
  float* acc;  // (heads, head_dim)
};

// A cache as bit planes in the Anda format (docs/numerics.md, "KV cache as planes"): each entry of a KV head in groups
// that share a 5-bit exponent, sign and magnitude bits apart.
//
// Entries of a block, whose bits lie side by side.
constexpr int64_t kBlockEntries = 64;
constexpr int64_t kChunkBlocks = kAttentionChunk / kBlockEntries;
constexpr int kMaxPlanesBits = 7;        // with the sign an int8
constexpr int64_t kPlanesDimUnit = 16;   // head_dim is a multiple of this
constexpr int64_t kMaxPlanesDim = 256;   // and at most this
constexpr int64_t kMaxPlanesGroup = 64;  // elements that share an exponent, at most
constexpr int kExponentBits = 5;
constexpr int kNotFiniteExponent = 31;  // of a group that holds an infinity, NaN or more than float16 does

// Bytes of one plane of one KV head in a block, and of one group's exponents.
constexpr int64_t plane_bytes(int64_t head_dim) { return kBlockEntries / 8 * head_dim; }
constexpr int64_t kExponentBytes = kExponentBits * kBlockEntries / 8;
// Elements that share an exponent: the largest power of two that divides head_dim, at most kMaxPlanesGroup.
constexpr int64_t planes_group(int64_t head_dim) {
  const int64_t power = head_dim & -head_dim;
  return power < kMaxPlanesGroup ? power : kMaxPlanesGroup;
}

// Stored magnitude bits of keys and of values. The sign and the first `upper` magnitude planes lie in a block's upper
// part, the rest in its lower part, which is given up when nothing reads it any more.
struct PlanesFormat {
  int64_t kv_heads;
  int64_t head_dim;
  int key_bits, key_upper;  // 1 <= upper <= bits <= kMaxPlanesBits
  int value_bits, value_upper;
};

// One layer of one block; heads follow one another in each part. The lower parts may be null where upper == bits.
struct PlanesBlock {
  uint8_t* keys;             // (kv_heads, 1 + key_upper, plane_bytes): signs, then magnitudes, most significant first
  uint8_t* low_keys;         // (kv_heads, key_bits - key_upper, plane_bytes)
  uint8_t* values;           // (kv_heads, 1 + value_upper, plane_bytes)
  uint8_t* low_values;       // (kv_heads, value_bits - value_upper, plane_bytes)
  uint8_t* key_exponents;    // (kv_heads, groups, kExponentBytes): five words of 64 bits, most significant bit first
  uint8_t* value_exponents;  // likewise
};

// Keys or values of one KV head in one block, and how many of their magnitude bits are read.
struct PlanesPart {
  const uint8_t* upper;
  const uint8_t* lower;  // null where bits <= upper planes
  const uint8_t* exponents;
  int bits;
};

// Query heads of one token that share a KV head, over one chunk of its entries.
struct PlanesAttentionArgs {
  const float* q;  // (heads, head_dim), after RoPE and rotation
  int64_t heads;   // 1..kAttentionHeads
  PlanesFormat format;
  PlanesPart keys[kChunkBlocks];  // as many as num_entries needs
  PlanesPart values[kChunkBlocks];
  int64_t num_entries;  // that the token sees, 1..kAttentionChunk
  float scale;
  PlanesPart next_keys[kChunkBlocks] = {};  // of the chunk that will be asked for next, where upper is not null
};

// The Anda format (docs/anda.md): value i of a row is bit i % 64 of word first_word + i / 64, counted through all rows.
// Sixteen words lie side by side at an address; from there on M + 1 addresses hold the signs and the magnitude planes,
// most significant first.
constexpr int64_t kAndaWordValues = 64;
constexpr int64_t kAndaWordsAtAddress = 16;
constexpr int kMaxAndaBits = 16;
constexpr int kAndaBias = 15;  // of exponents

struct AndaRow {
  int64_t values;
  int64_t group;  // values that share an exponent
  int64_t first_word;
  int magnitude_bits;  // stored
  KvType type;         // of the values, float16 or float32

  // Where the signs of a word are among the words of all rows; planes follow kAndaWordsAtAddress apart.
  int64_t word(int64_t index) const {
    return index / kAndaWordsAtAddress * (magnitude_bits + 1) * kAndaWordsAtAddress + index % kAndaWordsAtAddress;
  }
};

struct Kernels {
  const char* name;

  // out rows [row_begin, row_end) for every token. gemv is meant for few tokens (unpacks in registers), gemm for many
  // (unpacks a tile of rows once): from `gemm_inputs` int8 rows of activations on. Both give the same bytes.
  int64_t gemm_inputs;
  void (*planes_gemv)(const PlanesView&, const ActivationsView&, const OutputView&, int64_t row_begin, int64_t row_end);
  void (*planes_gemm)(const PlanesView&, const ActivationsView&, const OutputView&, int64_t row_begin, int64_t row_end);
  // Or null. The tokens [begin, end) of q (tokens, cols), begin a multiple of kPackedTokens, in the order in which
  // planes_gemm multiplies them; packed: (tokens rounded up to a multiple, cols) of all tokens.
  void (*pack_inputs)(const int8_t* q, int64_t tokens, int64_t cols, int64_t begin, int64_t end, int8_t* packed);
  // One row's values of `table` in column order: out (cols).
  void (*planes_unpack)(const PlanesView&, int64_t row, int8_t* out);

  // Each works on one row of n floats; y may be x.
  void (*rms_norm)(const float* x, const float* gain /* or null */, float eps, int64_t n, float* y);
  void (*rotate)(float* x, const float* signs /* +1 or -1 */, int64_t n, int64_t block, bool inverse);
  void (*quantize)(const float* x, int64_t n, int64_t cols, int magnitude_bits, const QuantizedRow& out);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
  void (*exp)(const float* x, int64_t n, float* y);

  // One token: rotates the query heads in place, rotates the key heads and stores keys and values at `position`.
  // qkv: (heads + 2 kv_heads) * head_dim floats; cos, sin: (head_dim / 2) floats.
  void (*rope_store)(float* qkv, int64_t heads, const KvView& kv, int64_t position, const float* cos, const float* sin);
  // The state of one chunk alone.
  void (*attention)(const AttentionArgs&, const AttentionState& out);
  // Adds a later chunk's state to `into`.
  void (*attention_merge)(int64_t heads, int64_t head_dim, const AttentionState& chunk, const AttentionState& into);
  // out (heads, head_dim) = acc / sum.
  void (*attention_finish)(int64_t heads, int64_t head_dim, const AttentionState& state, float* out);

  // The same over planes. The store rotates query heads, too, and overwrites the entry's bits, whatever they were.
  // Entries of a block share bytes: those of one sequence within sixteen from a multiple of sixteen on must be stored
  // by one thread.
  void (*planes_store)(float* qkv, int64_t heads, const PlanesFormat& format, const PlanesBlock& block, int64_t entry,
                       const float* cos, const float* sin);
  void (*planes_attention)(const PlanesAttentionArgs&, const AttentionState& out);

  // The Anda format, a row at a time. The first gives E of each group, and false where the format cannot hold a value:
  // E is 0 there. Words: those of all rows; the bits past a row's end become zero. `bits`: 1..row.magnitude_bits.
  bool (*anda_exponents)(const void* x, const AndaRow& row, uint8_t* exponents);
  void (*anda_pack)(const void* x, const AndaRow& row, const uint8_t* exponents, bool truncate, uint64_t* words);
  void (*anda_unpack)(const uint64_t* words, const AndaRow& row, const uint8_t* exponents, int bits, void* x);
};

// Tables by instruction set; null where this build does not contain it.
const Kernels* reference_kernels();
const Kernels* neon_kernels();
const Kernels* neon_i8mm_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* amx_emulated_kernels();

}  // namespace taper
