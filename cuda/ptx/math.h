// Functions of one number that the hardware approximates, and a count of bits. Not part of ptx.h: few kernels want them.
#pragma once

#include "ptx/config.h"

#if defined(TERSOR_EMULATION)
#include <cmath>
#endif

namespace tersor {
namespace ptx {

// 2^x within 2^-22 of it; results below 2^-126 become 0, 2^-infinity is 0.
TERSOR_PTX float exp2_approx(float x) {
#if defined(TERSOR_EMULATION)
  return emulation::flush_subnormal(std::exp2(emulation::flush_subnormal(x)));
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// How many bits are set.
TERSOR_PTX int count_bits(uint32_t value) {
#if defined(TERSOR_EMULATION)
  return __builtin_popcount(value);
#else
  return __popc(value);
#endif
}

}  // namespace ptx
}  // namespace tersor
