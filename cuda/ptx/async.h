// cp.async: copies from global to shared memory that pass no register. A copy may land at any moment
// between its issue and the issuing thread's cp_async_wait for its group: until then the destination
// may be neither read nor written, and other threads need a barrier after the wait.
#pragma once

#include "ptx/memory.h"

namespace tersor {
namespace ptx {

// 16 bytes past L1. Beyond source_bytes (0 to 16) the destination is filled with zeros; 0 reads nothing.
TERSOR_PTX void cp_async_16(shared_t shared, const void* global, int source_bytes = 16) {
#if defined(TERSOR_EMULATION)
  emulation::copy_async(shared, global, 16, source_bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
               : "memory");
#endif
}

// The same for bytes read exactly once (weights): L2 gives them up first.
TERSOR_PTX void cp_async_16_once(shared_t shared, const void* global, int source_bytes = 16) {
#if defined(TERSOR_EMULATION)
  emulation::copy_async(shared, global, 16, source_bytes);
#else
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
               "r"(source_bytes), "l"(policy)
               : "memory");
#endif
}

TERSOR_PTX void cp_async_8(shared_t shared, const void* global, int source_bytes = 8) {
#if defined(TERSOR_EMULATION)
  emulation::copy_async(shared, global, 8, source_bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
               : "memory");
#endif
}

TERSOR_PTX void cp_async_4(shared_t shared, const void* global, int source_bytes = 4) {
#if defined(TERSOR_EMULATION)
  emulation::copy_async(shared, global, 4, source_bytes);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
               : "memory");
#endif
}

// Closes the group of the copies issued since the last commit (an empty group counts as one).
TERSOR_PTX void cp_async_commit() {
#if defined(TERSOR_EMULATION)
  emulation::commit_async();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most n of this thread's latest groups are still under way.
template <int n>
TERSOR_PTX void cp_async_wait() {
  static_assert(n >= 0, "a number of groups");
#if defined(TERSOR_EMULATION)
  emulation::wait_async(n);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

}  // namespace ptx
}  // namespace tersor
