// Float operations on rows.
#pragma once

#include <cstdint>

#include "apis/activations.hpp"

namespace taper {

// Throws std::invalid_argument unless block is a power of two that divides n.
void check_block(int64_t n, int64_t block);

// y (tokens, n) from x (tokens, n).
void rms_norm(const float* x, int64_t tokens, int64_t n, const float* gain /* or null */, float eps, float* y);
void rotate(const float* x, int64_t tokens, int64_t n, const Rotation& rotation, bool inverse, float* y);
// y (tokens, n) from gate_up (tokens, 2n).
void swiglu(const float* gate_up, int64_t tokens, int64_t n, float* y);
// y (count) from x (count).
void exp(const float* x, int64_t count, float* y);

}  // namespace taper
