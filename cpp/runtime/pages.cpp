#include "runtime/pages.hpp"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace taper {

void FreePages::operator()(void* memory) const { std::free(memory); }

void* allocate_pages(int64_t bytes) {
  constexpr int64_t kLine = 64, kHugePage = 2 * 1024 * 1024;
  const int64_t alignment = bytes < kHugePage ? kLine : kHugePage;
  const int64_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(whole));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, static_cast<size_t>(whole), MADV_HUGEPAGE);  // a wish
#endif
  return memory;
}

}  // namespace taper
