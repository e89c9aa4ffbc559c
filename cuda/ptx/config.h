// How one kernel source serves two compilers. nvcc compiles the instructions; g++ (with
// -include emulation/cuda.h, which defines TERSOR_EMULATION) compiles each wrapper's host version.
// Everything in this folder exists twice, side by side in one function; nothing outside it does.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(TERSOR_EMULATION)
#include "emulation/runtime.h"
// For helpers of kernels (cuda/tile, cuda/kernels).
#define TERSOR_DEVICE inline
// For the wrappers here: always inlined, so that the return address which the host run sees is the
// place in the kernel from which memory was accessed. The counters group a warp's accesses by it.
#define TERSOR_PTX inline __attribute__((always_inline))
#else
#define TERSOR_DEVICE __device__ __forceinline__
#define TERSOR_PTX __device__ __forceinline__
#endif

namespace tersor {
namespace ptx {

// n values that move as one access: aligned to their size, which must be 1, 2, 4, 8 or 16 bytes.
template <class T, int n>
struct alignas(sizeof(T) * n) Vec {
  static_assert(sizeof(T) * n <= 16, "one access moves at most 16 bytes");
  T values[n];
  TERSOR_PTX T& operator[](int i) { return values[i]; }
  TERSOR_PTX const T& operator[](int i) const { return values[i]; }
};

template <class T>
constexpr bool is_accessible = std::is_trivially_copyable<T>::value &&
                               (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 ||
                                sizeof(T) == 16);

#if !defined(TERSOR_EMULATION)
// A value as the registers an instruction takes: 32-bit words (one, zero-extended, for 1 and 2 bytes).
template <class T>
struct Registers {
  static constexpr int count = sizeof(T) < 4 ? 1 : sizeof(T) / 4;
  uint32_t words[count] = {};
  TERSOR_PTX Registers() {}
  TERSOR_PTX explicit Registers(const T& value) { memcpy(words, &value, sizeof(T)); }
  TERSOR_PTX T value() const {
    T result;
    memcpy(&result, words, sizeof(T));
    return result;
  }
};
#endif

// Names the part of the kernel whose accesses the host run counts apart from here on; nothing on a device.
TERSOR_PTX void region(const char* name) {
#if defined(TERSOR_EMULATION)
  emulation::region(name);
#else
  (void)name;
#endif
}

}  // namespace ptx
}  // namespace tersor
