// Barriers, fences and atomics.
//
// Between blocks, data is handed over thus: write; fence(); atomic or volatile store of a flag -- atomic or
// volatile load of the flag; fence(); read. barrier() carries the order to the block's other threads.
#pragma once

#include "ptx/config.h"

namespace tersor {
namespace ptx {

// All threads of the block.
TERSOR_PTX void barrier() {
#if defined(TERSOR_EMULATION)
  emulation::barrier(0, 0, true);
#else
  asm volatile("bar.sync 0;" ::: "memory");
#endif
}

// `threads` threads (whole warps) of the block meet at barrier `id` (1 to 15; 0 is barrier()'s own).
TERSOR_PTX void named_barrier(int id, int threads) {
#if defined(TERSOR_EMULATION)
  emulation::barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts this warp at the barrier without waiting there: a producer's side.
TERSOR_PTX void named_barrier_arrive(int id, int threads) {
#if defined(TERSOR_EMULATION)
  emulation::barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Orders the shared and global accesses of a warp's 32 lanes. Shuffles, votes, ldmatrix and mma do not.
TERSOR_PTX void sync_warp() {
#if defined(TERSOR_EMULATION)
  emulation::sync_warp();
#else
  __syncwarp();
#endif
}

// __threadfence: orders this thread's accesses before and after it, as seen by the whole device.
TERSOR_PTX void fence() {
#if defined(TERSOR_EMULATION)
  emulation::fence();
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// ---- atomics: relaxed, on global memory, each returns the value found ------------------------------------
TERSOR_PTX uint32_t atomic_add(uint32_t* p, uint32_t value) {
#if defined(TERSOR_EMULATION)
  return emulation::atomic(p, value, [](uint32_t old, uint32_t v) { return old + v; });
#else
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
#endif
}

// In global memory subnormal operands and sums become zeros of their sign.
TERSOR_PTX float atomic_add(float* p, float value) {
#if defined(TERSOR_EMULATION)
  return emulation::atomic(p, value, [](float old, float v) {
    return emulation::flush_subnormal(emulation::flush_subnormal(old) + emulation::flush_subnormal(v));
  });
#else
  float old;
  asm volatile("atom.relaxed.gpu.global.add.f32 %0, [%1], %2;" : "=f"(old) : "l"(p), "f"(value) : "memory");
  return old;
#endif
}

TERSOR_PTX uint32_t atomic_max(uint32_t* p, uint32_t value) {
#if defined(TERSOR_EMULATION)
  return emulation::atomic(p, value, [](uint32_t old, uint32_t v) { return old > v ? old : v; });
#else
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.max.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
#endif
}

TERSOR_PTX uint32_t atomic_exchange(uint32_t* p, uint32_t value) {
#if defined(TERSOR_EMULATION)
  return emulation::atomic(p, value, [](uint32_t, uint32_t v) { return v; });
#else
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.exch.b32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
#endif
}

// Writes `value` where `expected` is found.
TERSOR_PTX uint32_t atomic_compare_exchange(uint32_t* p, uint32_t expected, uint32_t value) {
#if defined(TERSOR_EMULATION)
  return emulation::atomic(p, value, [expected](uint32_t old, uint32_t v) { return old == expected ? v : old; });
#else
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old)
               : "l"(p), "r"(expected), "r"(value)
               : "memory");
  return old;
#endif
}

// Counts 0, 1, ... top, 0: the counter is as it was found after top + 1 calls, so no launch clears it.
TERSOR_PTX uint32_t atomic_inc_wrap(uint32_t* p, uint32_t top) {
#if defined(TERSOR_EMULATION)
  return emulation::atomic(p, top, [](uint32_t old, uint32_t t) { return old >= t ? 0u : old + 1; });
#else
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(top) : "memory");
  return old;
#endif
}

}  // namespace ptx
}  // namespace tersor
