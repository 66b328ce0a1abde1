// The program of a decoder's step, and the memory that it works in.
#pragma once

#include <memory>
#include <vector>

#include "apis/decoder.hpp"
#include "runtime/pages.hpp"

namespace taper {

// Floats that grow and are not cleared.
class Floats {
 public:
  float* at_least(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<float*>(allocate_pages(count * static_cast<int64_t>(sizeof(float)))));
      size_ = count;
    }
    return data_.get();
  }

 private:
  Pages<float> data_;
  int64_t size_ = 0;
};

class Workspace {
 public:
  explicit Workspace(const AttentionShape& shape) : all(shape), wanted(shape) {}

  Floats x;      // (rows, hidden): the residual stream
  Floats qkv;    // (rows, qkv_width)
  Floats mixed;  // (rows, heads * head_dim)
  Floats inner;  // (rows, inner)
  Activations input;
  AttentionWork all, wanted;  // of every row, and of the rows that the last layer goes on with
};

// Checks nothing; returns as Decoder::step.
bool run_step(const DecoderParts& parts, const StepInput& input, Workspace& workspace, float* logits,
              StageTimes* times);

}  // namespace taper
