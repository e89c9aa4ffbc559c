// Memory for the harness's copies of tensors: far apart, so that an address computed wrongly for one buffer does
// not happen to lie in another, as it may when allocations are neighbours.
#include <sys/mman.h>

#include <cstdint>

#include "emulation/runtime.h"

namespace tersor {
namespace emulation {
namespace {

constexpr size_t slots = 64, page = 4096;
char* arena = nullptr;
size_t slot_bytes = 0;
size_t used = 0;

bool reserve() {
  for (size_t bytes = size_t{8} << 30; bytes >= size_t{64} << 20; bytes /= 4) {
    void* p = mmap(nullptr, slots * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) continue;
    arena = static_cast<char*>(p);
    slot_bytes = bytes;
    return true;
  }
  return false;
}

}  // namespace
}  // namespace emulation
}  // namespace tersor

extern "C" {

void* emulation_allocate(size_t bytes, size_t offset) {
  using namespace tersor::emulation;
  if (!arena && !reserve()) return nullptr;
  const size_t needed = (offset % 256 + bytes + 256 + page - 1) / page * page;
  if (used == slots || needed > slot_bytes / 2) return nullptr;
  char* start = arena + slot_bytes * used++ + slot_bytes / 4;
  if (mprotect(start, needed, PROT_READ | PROT_WRITE) != 0) return nullptr;
  return start + offset % 256;
}

void emulation_release() {
  using namespace tersor::emulation;
  // One call drops the pages and the access to all of them.
  if (used) mmap(arena, slot_bytes * used, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  used = 0;
}
}
