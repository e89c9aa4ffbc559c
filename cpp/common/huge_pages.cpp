#include "common/huge_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#if !defined(MADV_COLLAPSE)
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#endif

namespace tersor {

size_t huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t size = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + size - 1) / size * size;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / size * size;
  if (begin >= end) return 0;
  void* const first = reinterpret_cast<void*>(begin);
  const bool later = madvise(first, end - begin, MADV_HUGEPAGE) == 0;
  const bool now = madvise(first, end - begin, MADV_COLLAPSE) == 0;
  return now || later ? end - begin : 0;
#else
  (void)data;
  (void)bytes;
  return 0;
#endif
}

}  // namespace tersor
