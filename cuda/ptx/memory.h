// Loads and stores. A shared address is a 32-bit byte address; a global one a pointer. T is trivially
// copyable, of 1, 2, 4, 8 or 16 bytes, and every address is a multiple of its size.
#pragma once

#include "ptx/config.h"

namespace tersor {
namespace ptx {

using shared_t = uint32_t;

// The start of the block's dynamic shared memory, a multiple of 128 bytes.
TERSOR_PTX shared_t dynamic_shared() {
#if defined(TERSOR_EMULATION)
  return emulation::dynamic_shared();
#else
  extern __shared__ __align__(128) unsigned char tersor_dynamic_shared[];
  return static_cast<shared_t>(__cvta_generic_to_shared(tersor_dynamic_shared));
#endif
}

template <class T>
TERSOR_PTX T load_shared(shared_t address) {
  static_assert(is_accessible<T>, "a shared access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  T value;
  emulation::read_shared(&value, address, sizeof(T));
  return value;
#else
  Registers<T> r;
  if constexpr (sizeof(T) == 1) asm volatile("ld.shared.u8 %0, [%1];" : "=r"(r.words[0]) : "r"(address));
  if constexpr (sizeof(T) == 2) asm volatile("ld.shared.u16 %0, [%1];" : "=r"(r.words[0]) : "r"(address));
  if constexpr (sizeof(T) == 4) asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r.words[0]) : "r"(address));
  if constexpr (sizeof(T) == 8)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.words[0]), "=r"(r.words[1]) : "r"(address));
  if constexpr (sizeof(T) == 16)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])
                 : "r"(address));
  return r.value();
#endif
}

template <class T>
TERSOR_PTX void store_shared(shared_t address, T value) {
  static_assert(is_accessible<T>, "a shared access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  emulation::write_shared(address, &value, sizeof(T));
#else
  const Registers<T> r(value);
  if constexpr (sizeof(T) == 1) asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(r.words[0]) : "memory");
  if constexpr (sizeof(T) == 2) asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "r"(r.words[0]) : "memory");
  if constexpr (sizeof(T) == 4) asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(r.words[0]) : "memory");
  if constexpr (sizeof(T) == 8)
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(r.words[0]), "r"(r.words[1]) : "memory");
  if constexpr (sizeof(T) == 16)
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r.words[0]), "r"(r.words[1]),
                 "r"(r.words[2]), "r"(r.words[3])
                 : "memory");
#endif
}

#if !defined(TERSOR_EMULATION)
// One body for the flavours of a global load: `name` is the instruction without its type.
#define TERSOR_LOAD_GLOBAL(name, qualifier)                                                                    \
  Registers<T> r;                                                                                              \
  if constexpr (sizeof(T) == 1) asm qualifier(name ".u8 %0, [%1];" : "=r"(r.words[0]) : "l"(p) : "memory");    \
  if constexpr (sizeof(T) == 2) asm qualifier(name ".u16 %0, [%1];" : "=r"(r.words[0]) : "l"(p) : "memory");   \
  if constexpr (sizeof(T) == 4) asm qualifier(name ".b32 %0, [%1];" : "=r"(r.words[0]) : "l"(p) : "memory");   \
  if constexpr (sizeof(T) == 8)                                                                                \
    asm qualifier(name ".v2.b32 {%0, %1}, [%2];" : "=r"(r.words[0]), "=r"(r.words[1]) : "l"(p) : "memory");    \
  if constexpr (sizeof(T) == 16)                                                                               \
    asm qualifier(name ".v4.b32 {%0, %1, %2, %3}, [%4];"                                                       \
                  : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])                     \
                  : "l"(p)                                                                                     \
                  : "memory");                                                                                 \
  return r.value();
#endif

// Coherent at the moment of the load within the block; another block's data needs load_global_volatile or
// an acquire (sync.h) first.
template <class T>
TERSOR_PTX T load_global(const T* p) {
  static_assert(is_accessible<T>, "a global access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  T value;
  emulation::read_global(&value, p, sizeof(T), emulation::Order::plain);
  return value;
#else
  TERSOR_LOAD_GLOBAL("ld.global", volatile)
#endif
}

// For data that no thread writes during the launch: the compiler may move or merge it.
template <class T>
TERSOR_PTX T load_global_constant(const T* p) {
  static_assert(is_accessible<T>, "a global access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  T value;
  emulation::read_global(&value, p, sizeof(T), emulation::Order::constant);
  return value;
#else
  Registers<T> r;
  if constexpr (sizeof(T) == 1) asm("ld.global.nc.u8 %0, [%1];" : "=r"(r.words[0]) : "l"(p));
  if constexpr (sizeof(T) == 2) asm("ld.global.nc.u16 %0, [%1];" : "=r"(r.words[0]) : "l"(p));
  if constexpr (sizeof(T) == 4) asm("ld.global.nc.b32 %0, [%1];" : "=r"(r.words[0]) : "l"(p));
  if constexpr (sizeof(T) == 8)
    asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(r.words[0]), "=r"(r.words[1]) : "l"(p));
  if constexpr (sizeof(T) == 16)
    asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])
        : "l"(p));
  return r.value();
#endif
}

// The same for data read exactly once: it is not kept in L1.
template <class T>
TERSOR_PTX T load_global_once(const T* p) {
  static_assert(is_accessible<T>, "a global access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  T value;
  emulation::read_global(&value, p, sizeof(T), emulation::Order::constant);
  return value;
#else
  TERSOR_LOAD_GLOBAL("ld.global.nc.L1::no_allocate", volatile)
#endif
}

// A load that sees other blocks' atomics and volatile stores: the one to spin on. It orders nothing by
// itself: fence() after it, before reading what the other block wrote.
template <class T>
TERSOR_PTX T load_global_volatile(const T* p) {
  static_assert(is_accessible<T>, "a global access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  T value;
  emulation::read_global(&value, p, sizeof(T), emulation::Order::relaxed);
  return value;
#else
  TERSOR_LOAD_GLOBAL("ld.relaxed.gpu.global", volatile)
#endif
}

#if !defined(TERSOR_EMULATION)
#undef TERSOR_LOAD_GLOBAL
#define TERSOR_STORE_GLOBAL(name)                                                                              \
  const Registers<T> r(value);                                                                                 \
  if constexpr (sizeof(T) == 1) asm volatile(name ".u8 [%0], %1;" ::"l"(p), "r"(r.words[0]) : "memory");       \
  if constexpr (sizeof(T) == 2) asm volatile(name ".u16 [%0], %1;" ::"l"(p), "r"(r.words[0]) : "memory");      \
  if constexpr (sizeof(T) == 4) asm volatile(name ".b32 [%0], %1;" ::"l"(p), "r"(r.words[0]) : "memory");      \
  if constexpr (sizeof(T) == 8)                                                                                \
    asm volatile(name ".v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(r.words[0]), "r"(r.words[1]) : "memory");        \
  if constexpr (sizeof(T) == 16)                                                                               \
    asm volatile(name ".v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r.words[0]), "r"(r.words[1]),            \
                 "r"(r.words[2]), "r"(r.words[3])                                                              \
                 : "memory");
#endif

template <class T>
TERSOR_PTX void store_global(T* p, T value) {
  static_assert(is_accessible<T>, "a global access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  emulation::write_global(p, &value, sizeof(T), emulation::Order::plain);
#else
  TERSOR_STORE_GLOBAL("st.global")
#endif
}

// A store that other blocks' volatile loads and atomics may meet. fence() before it publishes what came before.
template <class T>
TERSOR_PTX void store_global_volatile(T* p, T value) {
  static_assert(is_accessible<T>, "a global access moves 1, 2, 4, 8 or 16 bytes");
#if defined(TERSOR_EMULATION)
  emulation::write_global(p, &value, sizeof(T), emulation::Order::relaxed);
#else
  TERSOR_STORE_GLOBAL("st.relaxed.gpu.global")
#endif
}

#if !defined(TERSOR_EMULATION)
#undef TERSOR_STORE_GLOBAL
#endif

}  // namespace ptx
}  // namespace tersor
