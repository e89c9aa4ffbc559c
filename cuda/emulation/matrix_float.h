// Host versions of the warp-wide products of 8- and 4-bit floats.
#pragma once

#include <cstdint>

namespace tersor {
namespace emulation {

// Kinds beside those of runtime.h; the counters know them under these names. mx: the elements of A, then of B.
enum class FloatMma {
  m16n8k32_e4m3,
  m16n8k64_mxf4,
  m16n8k64_nvf4,
  m16n8k32_mx_e4m3_e4m3,
  m16n8k32_mx_e2m3_e4m3,
  m16n8k32_mx_e2m1_e4m3,
  m16n8k32_mx_e4m3_e2m3,
  m16n8k32_mx_e2m3_e2m3,
  m16n8k32_mx_e2m1_e2m3,
};

// d: this lane's four sums, updated; a: four registers, b: two; the lane's words of scales (block-scaled kinds).
void mma(FloatMma kind, float* d, const uint32_t* a, const uint32_t* b, uint32_t scale_a, uint32_t scale_b);

}  // namespace emulation
}  // namespace tersor
