// Exchanges within a warp. All 32 lanes take part. They order no memory accesses (sync_warp does).
#pragma once

#include "ptx/config.h"

namespace tersor {
namespace ptx {

// The lane of the calling thread in its warp.
TERSOR_PTX int lane_index() {
#if defined(TERSOR_EMULATION)
  return emulation::lane();
#else
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return static_cast<int>(lane);
#endif
}

#if !defined(TERSOR_EMULATION)
#define TERSOR_SHUFFLE(mode, operand, clamp)                                              \
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves one or two words");    \
  Registers<T> r(value);                                                                  \
  for (int i = 0; i < Registers<T>::count; ++i)                                           \
    asm volatile("shfl.sync." mode ".b32 %0, %0, %1, " clamp ", 0xffffffff;" : "+r"(r.words[i]) : "r"(operand)); \
  return r.value();
#endif

// The value of lane `lane` (taken modulo 32). T has 4 or 8 bytes.
template <class T>
TERSOR_PTX T shuffle(T value, int lane) {
#if defined(TERSOR_EMULATION)
  return emulation::shuffle(value, lane & 31);
#else
  TERSOR_SHUFFLE("idx", lane, "0x1f")
#endif
}

template <class T>
TERSOR_PTX T shuffle_xor(T value, int mask) {
#if defined(TERSOR_EMULATION)
  return emulation::shuffle(value, (emulation::lane() ^ mask) & 31);
#else
  TERSOR_SHUFFLE("bfly", mask, "0x1f")
#endif
}

// The value of the lane `distance` (0 to 31) above; the top lanes keep their own.
template <class T>
TERSOR_PTX T shuffle_down(T value, int distance) {
#if defined(TERSOR_EMULATION)
  const int from = emulation::lane() + distance;
  return emulation::shuffle(value, from > 31 ? emulation::lane() : from);
#else
  TERSOR_SHUFFLE("down", distance, "0x1f")
#endif
}

#if !defined(TERSOR_EMULATION)
#undef TERSOR_SHUFFLE
#endif

// Bit i is lane i's predicate.
TERSOR_PTX uint32_t ballot(bool predicate) {
#if defined(TERSOR_EMULATION)
  return emulation::ballot(predicate);
#else
  uint32_t result;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff;}"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)));
  return result;
#endif
}

TERSOR_PTX bool any(bool predicate) {
#if defined(TERSOR_EMULATION)
  return emulation::ballot(predicate) != 0;
#else
  uint32_t result;
  asm volatile("{.reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.u32 %0, 1, 0, q;}"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)));
  return result != 0;
#endif
}

TERSOR_PTX bool all(bool predicate) {
#if defined(TERSOR_EMULATION)
  return emulation::ballot(predicate) == 0xffffffffu;
#else
  uint32_t result;
  asm volatile("{.reg .pred p, q; setp.ne.u32 p, %1, 0; vote.sync.all.pred q, p, 0xffffffff; selp.u32 %0, 1, 0, q;}"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(predicate)));
  return result != 0;
#endif
}

}  // namespace ptx
}  // namespace tersor
