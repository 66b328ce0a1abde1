// Memory for what grows with the tokens of a step, uncleared: in huge pages where there is enough of it.
#pragma once

#include <cstdint>
#include <memory>

namespace taper {

struct FreePages {
  void operator()(void* memory) const;
};

template <class T>
using Pages = std::unique_ptr<T[], FreePages>;

// At least `bytes` bytes at a multiple of 64. Throws std::bad_alloc.
void* allocate_pages(int64_t bytes);

}  // namespace taper
