// Aligned scratch of the calling thread, kept between calls. Internal linkage: each file that includes it has its own.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace taper {
namespace {

// At least `bytes` bytes at a multiple of 64; what an earlier call left there is lost when it grows.
inline uint8_t* scratch(int64_t bytes) {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> buffer;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    capacity = 0;
    buffer.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64)));
    if (!buffer) throw std::bad_alloc();
    capacity = bytes;
  }
  return buffer.get();
}

}  // namespace
}  // namespace taper
